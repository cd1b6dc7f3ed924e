"""The works that are interrupted at every line: edits, patches, adapters, captures and scores of a tiny model."""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import nn

from benchmarks.families import tokenizer
from benchmarks.interrupting import Swept, Work, sweep
from benchmarks.robustness_artefacts import COUNTS
from easyedit_moe.adapters.attachment import attach, detach, find_adapter
from easyedit_moe.editor import MoEEditor
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import EditingWarning
from easyedit_moe.evaluation.generation import generate_answers
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import MoEHyperParams, hyperparams_class
from easyedit_moe.moe.capture import LayerInputs, capture_facts
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import measured_tail
from easyedit_moe.storage.strict_json import json_text, read_json, write_json
from easyedit_moe.workflow.session import applied

FACTS = (
    {"prompt": "Ana is in", "subject": "Ana", "target_new": "Rome", "ground_truth": "Bonn"},
    {"prompt": "Leo has a", "subject": "Leo", "target_new": "cat", "ground_truth": "dog"},
)


METHODS = ("Global", "MoTE", "MoE-FT", "MoE-LoRA", "UnKE", "MEMoE")
NAMES = (
    *(f"edit by {method}" for method in METHODS), "second edit by MEMoE", "sequential edit with scores",
    "edit with scores, taken back", "undo", "apply a patch", "revert a patch", "merge patches and apply",
    "patches on a model for a while", "attach an adapter", "detach an adapter", "capture", "scores and answers",
    "caches",
)  # fmt: skip
"""What is interrupted."""


def small_model() -> nn.Module:
    """Two layers of four experts, as small as they go."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=260, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        intermediate_size=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    next(iter(model.parameters())).requires_grad_(False)  # flags are not all alike, so that mixing them up shows
    model.model.layers[0].input_layernorm.train()
    return model


def settings(method: str, folder: Path, **changes: Any) -> MoEHyperParams:
    """One layer, one or two steps."""
    values: dict[str, Any] = {"alg_name": method, "model_name": "tiny", "layers": [0], "dtype": "float32"}
    known = set(hyperparams_class(method).__dataclass_fields__)
    few = {
        "v_num_grad_steps": 1, "metric": "identity", "stats_dir": str(folder), "num_steps": 1, "steps": 2,
        "optim_num_step": 1, "preserve_n_samples": 0, "locality_weight": 0.0, "expert_width": 4, "rank": 1,
        "mom2_dataset": str(folder / "corpus.txt"), "mom2_n_samples": 2, "max_length": 16, "coverage_target": None,
    }  # fmt: skip
    values |= {name: value for name, value in few.items() if name in known}
    return hyperparams_class(method).from_dict(values | changes)


def works(folder: Path) -> dict[str, Callable[[], Work]]:
    """By name; each has a model of its own."""
    (folder / "corpus.txt").write_text("Ana saw Leo in Rome.\nA cat and a dog.\n", encoding="utf-8")
    edits = {method: _editing(method, folder) for method in METHODS}
    return {
        **{f"edit by {method}": edit for method, edit in edits.items()},
        "second edit by MEMoE": _second_of_memoe(folder),
        "sequential edit with scores": _calls(folder, sequential_edit=True),
        "edit with scores, taken back": _calls(folder, sequential_edit=False),
        "undo": _undo(folder),
        "apply a patch": _patching("apply", folder),
        "revert a patch": _patching("revert", folder),
        "merge patches and apply": _merged(folder),
        "patches on a model for a while": _for_a_while(folder),
        "attach an adapter": _attaching(folder),
        "detach an adapter": _detaching(folder),
        "capture": _capture,
        "scores and answers": _scores,
        "caches": _caches(folder),
    }


def _editing(method: str, folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model, tok, facts = small_model(), tokenizer(), parse_requests(FACTS[:1])
        editor = make_editor(settings(method, folder), progress=False)

        def reset() -> None:
            if editor.newest is not None:
                editor.newest.patch.revert(model)
            editor.newest = None

        act = partial(editor.edit, model, tok, facts)
        return Work(f"edit by {method}", model, act, lambda: editor.newest is not None, reset)

    return make


def _second_of_memoe(folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model, tok = small_model(), tokenizer()
        editor = make_editor(settings("MEMoE", folder), progress=False)
        first, second = parse_requests(FACTS[:1]), parse_requests(FACTS[1:])
        editor.edit(model, tok, first)
        editor.newest = None

        def reset() -> None:
            if editor.newest is not None:
                editor.newest.patch.revert(model)
            editor.newest = None

        act = partial(editor.edit, model, tok, second)
        return Work("second edit by MEMoE", model, act, lambda: editor.newest is not None, reset)

    return make


def _calls(folder: Path, sequential_edit: bool) -> Callable[[], Work]:
    def make() -> Work:
        editor = MoEEditor(settings("Global", folder), small_model(), tokenizer())
        editor.edit_requests(FACTS[:1], sequential_edit=True, verbose=False)

        def act() -> None:
            editor.edit_requests(FACTS[1:], sequential_edit=sequential_edit, verbose=False)

        def reset() -> None:
            while len(editor.patches) > 1:
                editor.undo()

        name = "sequential edit with scores" if sequential_edit else "edit with scores, taken back"
        return Work(name, editor.model, act, lambda: len(editor.patches), reset)

    return make


def _undo(folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        editor = MoEEditor(settings("Global", folder), small_model(), tokenizer())

        def reset() -> None:
            if not editor.patches:
                editor.edit_requests(FACTS[:1], sequential_edit=True, verbose=False)

        reset()
        return Work("undo", editor.model, editor.undo, lambda: len(editor.patches), reset)

    return make


def _patching(what: str, folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model = small_model()
        patch: Any = (
            make_editor(settings("Global", folder), progress=False)
            .edit(model, tokenizer(), parse_requests(FACTS))
            .patch
        )

        def reset() -> None:
            if what == "apply" and patch.originals:
                patch.revert(model)
            if what == "revert" and not patch.originals:
                patch.apply(model)

        reset()
        return Work(f"{what} a patch", model, lambda: getattr(patch, what)(model), lambda: bool(patch.originals), reset)

    return make


def _chain(folder: Path, model: nn.Module) -> list[Any]:
    """Two patches, one on the other, both taken off again."""
    tok, patches, parent = tokenizer(), [], None
    for fact in FACTS:
        result = make_editor(settings("Global", folder), progress=False).edit(model, tok, parse_requests([fact]))
        result.patch.parent = parent
        parent = result.patch.id
        patches.append(result.patch)
    for patch in reversed(patches):
        patch.revert(model)
    return patches


def _merged(folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model = small_model()
        patches = _chain(folder, model)
        done: list[Any] = []

        def act() -> None:
            done[:] = [type(patches[0]).concat(patches)]
            done[0].apply(model)

        def label() -> bool:
            return bool(done and done[0].originals)

        def reset() -> None:
            if label():
                done[0].revert(model)

        return Work("merge patches and apply", model, act, label, reset)

    return make


def _for_a_while(folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model, tok = small_model(), tokenizer()
        patches = _chain(folder, model)

        def act() -> None:
            with applied(model, tok, patches):
                pass

        return Work("patches on a model for a while", model, act, lambda: any(patch.originals for patch in patches))

    return make


def _adapter(folder: Path, model: nn.Module) -> Any:
    make_editor(settings("MEMoE", folder), progress=False).edit(model, tokenizer(), parse_requests(FACTS))
    return detach(model)


def _attaching(folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model, tok = small_model(), tokenizer()
        adapter = _adapter(folder, model)

        def reset() -> None:
            if adapter.attachment is not None:
                detach(model)

        act = partial(attach, model, tok, adapter)
        return Work("attach an adapter", model, act, lambda: adapter.attachment is not None, reset)

    return make


def _detaching(folder: Path) -> Callable[[], Work]:
    def make() -> Work:
        model, tok = small_model(), tokenizer()
        adapter = _adapter(folder, model)

        def reset() -> None:
            if find_adapter(model) is None:
                attach(model, tok, adapter)

        reset()
        act = partial(detach, model)
        return Work("detach an adapter", model, act, lambda: adapter.attachment is not None, reset)

    return make


def _capture() -> Work:
    model = small_model()
    view = MoELayerView(model)

    def act() -> None:
        inputs = LayerInputs([0, 1])
        capture_facts(view, [[5, 6, 7], [8, 9]], [2, 1], [0, 1], [1], 0, 1, inputs)
        capture_facts(view, [[5, 6, 7], [8, 9]], [2, 1], [1], [1], 0, 1, inputs, start=1)
        measured_tail(view, 0, [5, 6, 7, 8], 0)

    return Work("capture", model, act)


def _scores() -> Work:
    model, tok = small_model(), tokenizer()

    def act() -> None:
        score_targets(model, tok, [("Ana is in", "Rome"), ("Leo has a", "cat")])
        generate_answers(model, tok, ["Ana is in"], 2)

    return Work("scores and answers", model, act)


def _caches(folder: Path) -> Callable[[], Work]:
    """Statistics, bases and targets are made anew each time; whatever an interrupt leaves of them serves the next run.

    The next run is part of going back, and must edit as the undisturbed one did, or the state after it shows.
    """

    def make() -> Work:
        model, tok, facts = small_model(), tokenizer(), parse_requests(FACTS)
        kept: dict[str, Any] = {}

        def place() -> Path:
            if "folder" not in kept:
                kept["folder"] = tempfile.TemporaryDirectory(dir=folder)
            return Path(kept["folder"].name)

        def act() -> None:
            hp = settings("MoTE", folder, metric="nullspace", stats_dir=str(place()), target_cache_dir=str(place()))
            kept["editor"] = make_editor(hp, progress=False)
            kept["editor"].edit(model, tok, facts)

        def label() -> bool:
            return "editor" in kept and kept["editor"].newest is not None

        def take_back() -> Any:
            patch = kept.pop("editor").newest.patch if label() else None
            if patch is not None:
                patch.revert(model)
            return patch

        def reset() -> None:
            take_back()
            act()
            found = take_back().after
            kept.pop("folder").cleanup()
            if kept.setdefault("after", found) != found:
                raise AssertionError("an edit with what the caches held was another one")

        return Work("caches", model, act, label, reset)

    return make


def run_all(names: Sequence[str] = (), stride: int = 1, offset: int = 0) -> list[Swept]:
    """Sweep the works named, or all."""
    found = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)
        for name, make in works(Path(folder)).items():
            if not names or name in names:
                found.append(sweep(make(), stride, offset))
    return found


def section(names: Sequence[str], stride: int) -> dict[str, Any]:
    """The section of ``docs/robustness.json``: what came of all interrupts, and of those in each work."""
    rows = [swept for name in names for swept in run_all([name], stride)]
    return {
        "as before": sum(row.undone - len(row.bad) for row in rows),
        "complete and recorded": sum(row.kept for row in rows),
        "bad": sum(len(row.bad) for row in rows),
        "works": [{**asdict(row), "bad": row.bad[:20]} for row in rows],
        "made by": f"python -m benchmarks.robustness_interrupts --stride {stride}",
    }


def main(
    work: Annotated[list[str] | None, typer.Option(help="Only these, and no file is written.")] = None,
    stride: Annotated[int, typer.Option(help="Every n-th line only.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON file that gets the counts, beside those of other sections.")] = COUNTS,
) -> None:
    """Interrupt every work at every line, and merge the counts of what came of it into a file."""
    torch.set_num_threads(1)
    found = section(work or NAMES, stride)
    if work:
        sys.stdout.write(json_text(found))
        return
    write_json(out, {**(read_json(out) if out.is_file() else {}), "interrupts": found})


if __name__ == "__main__":
    typer.run(main)
