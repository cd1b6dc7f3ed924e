"""Which families of transformers this package edits: each is built tiny and tried. Written to docs/families.md.

``python -m benchmarks.families [FAMILY ...]`` prints the verdicts; without names it tries all and writes
``docs/families.json`` and ``docs/families.md``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.family_models import families, model_class, tiny_model
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.editors import GlobalEditor, make_editor
from easyedit_moe.editors.prepared import PreparedLayer
from easyedit_moe.errors import LayerError, LayoutError
from easyedit_moe.facts.requests import parse_requests
from easyedit_moe.hparams import hyperparams_class
from easyedit_moe.hparams.sites import EXPERTS, SITES
from easyedit_moe.moe.capture import capture_facts
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.probe import check_keys, measured_tail
from easyedit_moe.moe.tails import FactPlaces, LocalTail, Tail, pulled_back
from easyedit_moe.patches.weights import writing

DOCS = Path(__file__).parents[1] / "docs"
FACTS = [
    {"prompt": "Anna lives in", "subject": "Anna", "target_new": "Rome", "ground_truth": "Paris"},
    {"prompt": "Bob speaks", "subject": "Bob", "target_new": "Dutch", "ground_truth": "Greek"},
]
TRAINED = ("MoE-FT", "MoE-LoRA", "MEMoE")
"""Methods that need no more of a family than parameters that take part in its forward."""


@dataclass
class Verdict:
    """What became of one family.

    Attributes:
        family: the folder under ``transformers/models``.
        model: the class that was built.
        status: "edited" or "refused".
        layers: MoE layers of the tiny model.
        experts: the class that reads its experts.
        tail: what lies behind the experts.
        why: of a refusal.
        methods: what works all the same, of those that train (`TRAINED`).
        sites: what is edited exactly beside the routed experts, with the layers of the tiny model that have it.
        sum_error: largest relative distance between the sum over experts and the module's own.
        within_reach: share of a random change of the last MoE layer's output that its experts can bring about.
        planned_error: relative distance between the planned and the measured change of a layer's output; as
            ``sum_error``, the largest over all sites.
    """

    family: str
    model: str = ""
    status: str = "edited"
    layers: list[int] = field(default_factory=list)
    experts: str = ""
    tail: str = ""
    why: str = ""
    methods: list[str] = field(default_factory=list)
    sites: dict[str, list[int]] = field(default_factory=dict)
    sum_error: float = 0.0
    within_reach: float = 0.0
    planned_error: float = 0.0


def judge(family: str, tok: Any, methods: bool = True) -> Verdict:
    """Build a family's tiny model and edit it; ``methods`` also tries what trains, where the edit is refused.

    Raises:
        AssertionError: an edit that is not exact, or whose revert leaves a trace.
    """
    verdict, cls = Verdict(family), model_class(family)
    if cls is None:
        verdict.status, verdict.why = "refused", "It has no language model's head: it does not predict the next token."
        return verdict
    verdict.model = cls.__name__
    model = tiny_model(family)
    try:
        view, tails = judge_site(verdict, model, tok, EXPERTS)
        verdict.layers = sorted(view.layers)
        verdict.experts = type(view.layers[verdict.layers[0]].experts).__name__
        verdict.tail = ", ".join(sorted({named(tail) for tail in tails.values()}))
        edit_and_revert(model, tok, "Global", verdict.layers[-2:])
        edit_and_revert(model, tok, "MoTE", verdict.layers[-1:])
        for site in SITES:
            if site != EXPERTS and MoELayerView(model, site=site).layers:
                other, _ = judge_site(verdict, model, tok, site)
                verdict.sites[site] = sorted(other.layers)
                edit_and_revert(model, tok, "MoTE", verdict.sites[site][-1:], site=site)
    except LayoutError as error:
        verdict.status, verdict.why = "refused", str(error)
        verdict.methods = [m for m in TRAINED if works(tiny_model(family), tok, m)] if methods else []
    return verdict


def judge_site(verdict: Verdict, model: nn.Module, tok: Any, site: str) -> tuple[MoELayerView, dict[int, Tail]]:
    """Measure one site of a model, and note its errors; the view and what lies behind the site in each layer."""
    ids = tok("The quick brown fox jumps over the lazy dog.")["input_ids"][:24]
    view = MoELayerView(model, site=site)
    error = max(check_keys(view, layer, ids, 0) for layer in view.layers)
    tails = {layer: measured_tail(view, layer, ids, 0) for layer in view.layers}
    last = max(view.layers)
    reached, planned = planned_error(view, last, tails[last], tok)
    verdict.sum_error = max(verdict.sum_error, error)
    verdict.planned_error = max(verdict.planned_error, planned)
    if site == EXPERTS:
        verdict.within_reach = reached
    return view, tails


def named(tail: Tail) -> str:
    """A tail in words."""
    return f"{tail.kind}, convolution over {tail.reach + 1} tokens" if tail.reach else tail.kind


def planned_error(view: MoELayerView, layer: int, tail: Tail, tok: Any) -> tuple[float, float]:
    """Of an exact solve: the share of a random change that is planned, and how far off the measured one is."""
    texts = ("Anna lives in Paris", "Bob speaks Greek", "The dog is in Rome now")
    sequences = [tok(text)["input_ids"] for text in texts]
    places = FactPlaces(view, sequences, [len(s) - 1 for s in sequences], 0)
    before = capture_facts(view, sequences, places.positions, [layer], [layer], 0)
    wanted = torch.randn(before.outputs[layer].shape, generator=torch.Generator().manual_seed(0))
    wanted *= 0.05 * before.outputs[layer].norm(dim=1, keepdim=True) / wanted.norm(dim=1, keepdim=True)
    planned = pulled_back(layer, wanted, places).reached if isinstance(tail, LocalTail) else wanted
    residual = tail.pull_back(layer, wanted, 1.0, places)
    keys = [before.keys[layer]]
    for back in range(1, tail.reach + 1):
        rows = [i for i, at in enumerate(places.positions) if at >= back]
        earlier = capture_facts(
            view, [sequences[i] for i in rows], [places.positions[i] - back for i in rows], [layer], [], 0
        )
        keys.append(earlier.keys[layer])
    every = type(keys[0]).cat(keys)
    residual = torch.cat([residual, residual.new_zeros(every.num_tokens - len(residual), residual.shape[1])])
    editor = GlobalEditor(hparams("Global", [layer], lambda_reg=1e-10))
    prepared = PreparedLayer(view.layers[layer].experts.layout.num_experts, tail, IdentityMetric())
    update, _ = editor.solve(every, residual, prepared, editor.hparams.lambda_reg)
    state = weights(view.model)
    with writing(view) as writer:
        writer.write(layer, update)
        patch = writer.finish({}, model_fingerprint(view))
    after = capture_facts(view, sequences, places.positions, [], [layer], 0)
    patch.revert(view.model)
    check_same(state, view.model)
    moved = after.outputs[layer] - before.outputs[layer]
    share = (planned * wanted).sum() / wanted.square().sum()
    return round(float(share), 2), float((moved - planned).norm() / planned.norm())


def hparams(method: str, layers: Sequence[int], **more: Any) -> Any:
    """Settings that need no statistics and little time."""
    values: dict[str, Any] = {"alg_name": method, "model_name": "tiny", "layers": list(layers), "dtype": "float32"}
    if method in ("Global", "MoTE"):
        values |= {"metric": "identity", "mom2_dataset": "none.txt", "v_num_grad_steps": 1, "lambda_reg": 1e-3}
    if method == "MoTE":
        values |= {"rank_expert": 4, "rank_out": 8, "rank_in": 8, "whitening": "none"}
    return hyperparams_class(method).from_dict(values | more)


def edit_and_revert(model: nn.Module, tok: Any, method: str, layers: Sequence[int], **more: Any) -> None:
    """Edit two facts and take them back; AssertionError where nothing changed, or something is left."""
    state = weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = make_editor(hparams(method, layers, **more), progress=False).edit(model, tok, parse_requests(FACTS))
    if method != "MEMoE" and all(torch.equal(value, state[name]) for name, value in model.named_parameters()):
        raise AssertionError(f"{method} changed nothing.")
    result.patch.revert(model)
    check_same(state, model)


def works(model: nn.Module, tok: Any, method: str) -> bool:
    """Whether a method that trains edits this model; a method that is not installed does not."""
    if method == "MoE-LoRA" and find_spec("peft") is None:
        return False
    try:
        layers = sorted(MoELayerView(model).layers)[-1:]
    except LayoutError:
        layers = [1]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("The quick brown fox jumps over the lazy dog.\n" * 4, encoding="utf-8")
        few: dict[str, Any] = {"num_steps": 2}
        if method == "MEMoE":
            few = {"steps": 2, "locality_n_samples": 2, "locality_dataset": str(corpus)}
        try:
            edit_and_revert(model, tok, method, layers, **few)
        except (LayoutError, LayerError):
            return False
    return True


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_same(state: dict[str, Tensor], model: nn.Module) -> None:
    """AssertionError unless every parameter is bit-equal to ``state``."""
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, state[name])]
    if changed:
        raise AssertionError(f"After the revert, {changed} differ.")


def table(verdicts: Sequence[Verdict]) -> str:
    """The page of the site."""
    edited = [v for v in verdicts if v.status == "edited"]
    lines = [
        "# Model families",
        "",
        f"Of the {len(verdicts)} model folders of transformers {transformers.__version__} that hold experts, "
        f"{len(edited)} are edited exactly",
        "and the others are refused with a reason. The page is written by `python -m benchmarks.families`, which",
        "builds a tiny model of each family from its configuration class, and checked by",
        "`tests/moe/test_families.py`: the gated sum over experts is the module's own output, the planned change of a",
        "layer's output is the measured one (both to 1e-3 in float32), Global and MoTE edit it,",
        "and a revert is bit-equal.",
        "",
        "What lies behind the experts decides how a wanted change reaches them: *identity* is a plain residual sum,",
        "*scale* a residual multiplier, and the *local Jacobian* is taken of anything else, at each fact token.",
        "*Within reach* is how much of a random change of the last MoE layer's output its experts can bring about:",
        "what a norm removes, or a residual stream that the layer hardly writes, is out of reach. Where experts",
        "write fewer numbers than the layer's output has, target vectors are searched among what they can bring about.",
        "",
        "*Other sites* can be edited as exactly instead of the routed experts, with `site: shared_expert` or",
        "`site: dense` ([where to edit](add-a-model-family.md#where-to-edit)): "
        f"{sum('shared_expert' in v.sites for v in edited)} families have a shared expert, "
        f"{sum('dense' in v.sites for v in edited)} a dense FFN.",
        "",
        "## Edited",
        "",
        "| family | experts read by | behind the experts | within reach | other sites |",
        "|---|---|---|---|---|",
        *(
            f"| {v.family} | {v.experts} | {v.tail} | {v.within_reach:.0%} | {', '.join(v.sites) or 'none'} |"
            for v in edited
        ),
        "",
        "## Refused",
        "",
        "| family | why | methods that work there |",
        "|---|---|---|",
    ]
    for v in verdicts:
        if v.status == "refused":
            lines.append(f"| {v.family} | {v.why} | {', '.join(v.methods) or 'none'} |")
    return "\n".join(lines) + "\n"


def tokenizer() -> Any:
    """One token per byte, which every tiny vocabulary holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(["<eos>", "<bos>", *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )


def main(names: Sequence[str]) -> None:
    """Try the families named, or all of them and write the page."""
    tok = tokenizer()
    verdicts = []
    for name in names or families():
        verdicts.append(judge(name, tok))
        sys.stdout.write(json.dumps(asdict(verdicts[-1])) + "\n")
    if not names:
        content = {"transformers": transformers.__version__, "families": [asdict(v) for v in verdicts]}
        (DOCS / "families.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (DOCS / "families.md").write_text(table(verdicts), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
