"""Every method's memory plan beside what its stages allocate, on stand-ins of Qwen3-30B-A3B of three sizes."""

from __future__ import annotations

import random
import string
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from benchmarks.allocations import Allocations, stage, tracked
from benchmarks.end_to_end import requests
from easyedit_moe import factworld
from easyedit_moe.adapters import training as adapter_training
from easyedit_moe.editors import Editor, make_editor, memoe, solving, training, unke
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.errors import EditingWarning
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_prompt
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.measure import peak_memory_bytes, reset_peak_memory
from easyedit_moe.moe.shapes import Lengths
from easyedit_moe.targets.search import KL_PROMPT


@dataclass(frozen=True)
class Size:
    """A stand-in: experts E, K per token, d, h, layers, vocabulary, and the facts of one batch."""

    name: str
    experts: int
    active: int
    d_model: int
    d_hidden: int
    layers: int
    vocabulary: int
    edits: int
    dtype: str

    def model(self, device: str) -> hf.PreTrainedModel:
        """Of random weights."""
        heads = self.d_model // 64
        config = hf.Qwen3MoeConfig(
            vocab_size=self.vocabulary, hidden_size=self.d_model, num_hidden_layers=self.layers,
            num_attention_heads=2 * heads, num_key_value_heads=max(1, heads // 4), head_dim=64,
            moe_intermediate_size=self.d_hidden, num_experts=self.experts, num_experts_per_tok=self.active,
            intermediate_size=3 * self.d_model,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = hf.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        return model.eval()


SIZES = {
    size.name: size
    for size in (
        Size("small", 16, 4, 256, 96, 6, 8192, 10, "bfloat16"),
        Size("middle", 32, 8, 512, 192, 8, 16384, 30, "float32"),
        Size("large", 64, 8, 768, 256, 8, 32768, 50, "float32"),
    )
}
STATISTICS, WHOLE = "statistics", "whole edit"
METHODS = (
    "MoTE,MoEEdit-BCD,Global,Global+speedup,BCD+speedup,MoE-ROME,MoE-MEMIT,MoE-AlphaEdit,MoE-FT,MoE-FT-L,MoE-LoRA,"
    "AdaLoRA,UnKE,MEMoE"
)
STEPS: Mapping[str, Any] = {
    "v_num_grad_steps": 2, "early_stop_loss": 0.0, "num_steps": 2, "steps": 2, "optim_num_step": 2,
    "mom2_n_samples": 65, "coverage_target": None, "fact_token": "subject_last", "max_length": 128,
    "nullspace_rank": 0.25, "nullspace_threshold": None, "rank_expert": 0.5, "rank_out": 0.25, "rank_in": 0.33,
}  # fmt: skip
"""Fewer steps than a real run makes, as each needs what the one before did (see `_fullest_steps` for MEMoE's)."""


@dataclass(frozen=True)
class Options:
    """``texts`` are those of the statistics."""

    sizes: str = ",".join(SIZES)
    methods: str = METHODS
    device: str = "cpu"
    quick: bool = False


def run(options: Options) -> list[dict[str, Any]]:
    """A row per size, method and stage, and one for the whole of each edit."""
    if options.quick:
        options = Options("small", "MoTE,Global,MoE-FT-L", options.device)
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    rows = []
    for name in options.sizes.split(","):
        model = SIZES[name].model(options.device)
        with tempfile.TemporaryDirectory() as stats:
            for method in options.methods.split(","):
                rows += measured(SIZES[name], method, model, tok, Path(stats), options.device)
    return rows


def measured(
    size: Size, method: str, model: hf.PreTrainedModel, tok: Any, stats: Path, device: str
) -> list[dict[str, Any]]:
    """The rows of one method; moments that lie in ``stats`` are read, and their stage is left out then."""
    facts, lengths = _facts(tok, size.edits)
    hparams = _hparams(size, method, stats, device)
    editor = make_editor(hparams, progress=False)
    planned = editor.plan_for(hparams, model, Workload(len(facts), device=device, lengths=lengths))
    for file in stats.rglob("nullspace-*"):
        file.unlink()
    if list(stats.rglob("layer*.safetensors")):
        there = [replace(one, working=0) if one.name == STATISTICS else one for one in planned.stages]
        planned = replace(planned, stages=tuple(there))

    def edit() -> Any:
        editor.prepare(model, tok)
        return editor.edit(model, tok, facts)

    with _marked(editor), _fullest_steps(), warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)  # random weights: thin coverage and missed targets
        reset_peak_memory()
        before = peak_memory_bytes()
        found, result = tracked(edit)
        allocator = peak_memory_bytes() - before if device != "cpu" else None
    result.patch.restore(model)
    return _rows(size, method, planned, found, allocator)


def _hparams(size: Size, method: str, stats: Path, device: str) -> Any:
    """The method's settings that ship for the model, at layers that the stand-in has."""
    given = load_hyperparams(f"{method}/qwen3-30b-a3b")
    corpus = stats / "corpus.txt"
    corpus.write_text("\n".join(corpus_texts(65)), encoding="utf-8")
    values = {
        "layers": [2] if len(given.layers) == 1 else [1, 2, 3], "device": device, "dtype": size.dtype,
        "stats_dir": str(stats), "batch_size": size.edits, **STEPS,
        **dict.fromkeys(("mom2_dataset", "preserve_dataset", "locality_dataset"), str(corpus)),
    }  # fmt: skip
    known = {name: value for name, value in values.items() if hasattr(given, name)}
    return load_hyperparams(f"{method}/qwen3-30b-a3b", **known)


def corpus_texts(count: int) -> list[str]:
    """Texts that are longer than they are cut, so that batches are as large as they get."""
    draw = random.Random(0)
    return [" ".join("".join(draw.choices(string.ascii_lowercase, k=2)) for _ in range(200)) for _ in range(count)]


def _facts(tok: Any, count: int) -> tuple[list[EditRequest], Lengths]:
    """Facts of the same lengths, so that a plan can be told them."""
    alike: dict[tuple[int, ...], list[EditRequest]] = {}
    for fact in requests(1000):
        prompt = encode_prompt(tok, fact.prompt, fact.subject, "subject_last", fact.target_new)
        asked = encode_prompt(tok, KL_PROMPT.format(fact.subject), fact.subject, "subject_last")
        sizes = (len(prompt.ids), prompt.fact, len(prompt.answer), asked.fact)
        alike.setdefault(sizes, []).append(fact)
    lengths, facts = max(alike.items(), key=lambda one: (one[0][2] > 1, len(one[1])))
    return facts[:count], Lengths(*lengths[:3])


def _rows(
    size: Size, method: str, planned: MemoryPlan, found: Allocations, allocator: int | None
) -> list[dict[str, Any]]:
    wanted = {one.name: one.kept + one.working for one in planned.stages if one.working or one.name != STATISTICS}
    wanted[WHOLE] = planned.peak - planned.shapes.parameters
    seen = {**found.peaks, WHOLE: found.peak}
    rows = []
    for name, bytes_ in wanted.items():
        row = {
            "benchmark": "plan", "size": size.name, "method": method, "stage": name,
            "measured bytes": seen.get(name, 0), "planned bytes": bytes_,
            "planned / measured": bytes_ / seen[name] if seen.get(name) else None,
        }  # fmt: skip
        rows.append(row | ({"allocator bytes": allocator} if allocator is not None and name == WHOLE else {}))
    return rows


@contextmanager
def _marked(editor: Editor) -> Iterator[None]:
    """Inside, the parts of an edit are marked as the stages that plans know."""
    own = type(editor)
    places: list[tuple[Any, str, str]] = [
        (solving, "layer_statistics", "statistics"), (solving.SolvingEditor, "_metric", "metric"),
        (own, "basis", "basis"), (solving.BatchSolve, "find_targets", "targets"),
        (solving.BatchSolve, "capture", "capture"), (solving.BatchSolve, "solve", "solve"),
        (solving.BatchSolve, "write", "write"), (solving.PatchWriter, "finish", "write"),
        (solving, "diagnose_solved", "diagnose"),
        (own, "train", "train"), (training.TrainingJob, "answers", "answers"),
        (training.TensorWriter, "keep", "originals"),
        (training.TensorWriter, "write", "write"), (training.TensorWriter, "finish", "write"),
        (unke, "found_targets", "targets"),
        (unke.UnKEEditor, "_problem", "train"), (unke.UnKEEditor, "_fit", "train"),
        (memoe.MoEAdapter, "__init__", "attach"), (memoe, "attach", "attach"), (memoe, "train_adapter", "train"),
    ]  # fmt: skip
    # Not every editor has every part; but what is no longer where it is looked for would not be measured.
    places = [place for place in places if place[0] is not own or hasattr(own, place[1])]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, what in places:
            setattr(owner, name, _in_stage(getattr(owner, name), what))
        yield
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


@contextmanager
def _fullest_steps() -> Iterator[None]:
    """Inside, every step of MEMoE's training computes as many texts as one of a real run's hundred comes to.

    Each draws prompts with another fact's subject, and leaves out those that are prompts of facts themselves.
    """
    draw = adapter_training._Training._swaps

    def fullest(self: Any) -> Any:
        return max((draw(self) for _ in range(200)), key=lambda drawn: len(drawn[0]))

    adapter_training._Training._swaps = fullest  # type: ignore[method-assign]
    try:
        yield
    finally:
        adapter_training._Training._swaps = draw  # type: ignore[method-assign]


def _in_stage(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(call)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with stage(name):
            return call(*args, **kwargs)

    return marked
