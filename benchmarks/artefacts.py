"""Every artefact that the package writes and reads again, made by its own code on a small model, and its use."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from easyedit_moe.adapters.attachment import add_subjects, attach, detach
from easyedit_moe.adapters.moe_adapter import AdapterConfig, MoEAdapter, base_fingerprint
from easyedit_moe.algebra.core import FactoredCore
from easyedit_moe.algebra.core_update import CoreUpdate, TuckerFactors
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.checkpoints.history import EDITS, Edit, read_history, write_history
from easyedit_moe.comparison.compare import Comparison
from easyedit_moe.comparison.rows import Row
from easyedit_moe.comparison.saved import RESULTS, earlier_rows, save_rows
from easyedit_moe.comparison.tuned import TUNING, check_held_out
from easyedit_moe.evaluation.metrics import EvaluationResult
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import GlobalHyperParams, MoTEHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_tokenizer
from easyedit_moe.patches.files import load_patch
from easyedit_moe.patches.inspection import describe
from easyedit_moe.patches.tensors import writing_tensors
from easyedit_moe.patches.weights import WeightPatch, writing
from easyedit_moe.statistics.bases import layer_basis
from easyedit_moe.statistics.cache import StatisticsKey
from easyedit_moe.statistics.checkpoint import MomentsCheckpoint
from easyedit_moe.statistics.gather import layer_statistics
from easyedit_moe.statistics.generated import GeneratedTexts, GenerationKey
from easyedit_moe.statistics.moments import LayerMoments, Sums
from easyedit_moe.statistics.null_spaces import layer_null_space
from easyedit_moe.statistics.token_cache import TokenisedTexts, TokenKey
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.strict_json import digest, write_checked_json
from easyedit_moe.targets.cache import cached_targets
from easyedit_moe.targets.search import TargetSearch, TargetSettings
from easyedit_moe.workflow.locate_saved import Measured

CACHE, PATCH, RESULT = "cache", "patch or adapter", "result"
FACT = EditRequest("The capital of France is", subject="France", target_new="Rome")


@dataclass(frozen=True)
class Artefact:
    """A file, and what becomes of it.

    Attributes:
        name: what people call it.
        kind: a cache, which is made anew where it is damaged, or a patch, an adapter or a result, which is refused.
        path: of the file.
        use: reads the file as the package does, and gives a digest of what was made of it.
        model: on which it is put; None where there is none.
        nullable: entries of its metadata that may be null.
    """

    name: str
    kind: str
    path: Path
    use: Callable[[], str]
    model: nn.Module | None = None
    nullable: frozenset[str] = field(default_factory=frozenset)


def small_model() -> nn.Module:
    """A Qwen3-MoE of three layers whose sizes are all different."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(TOK), hidden_size=32, moe_intermediate_size=24, intermediate_size=40, num_experts=6,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=3,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


TOK = load_tokenizer("factworld")


def artefacts(folder: Path) -> Iterator[Artefact]:
    """All of them, written under ``folder``."""
    model = small_model()
    yield from _caches(model, folder)
    yield from _patches(model, folder)
    yield from _results(folder)


def state(model: nn.Module) -> str:
    """Of every weight."""
    return digest({name: checksum(value.detach()) for name, value in model.named_parameters()})


def _of(tensors: Any) -> str:
    shown = [f"{t.dtype}{tuple(t.shape)}{hashlib.sha256(t.numpy().tobytes()).hexdigest()}" for t in tensors]
    return digest(shown)


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


def _caches(model: nn.Module, folder: Path) -> Iterator[Artefact]:
    view = MoELayerView(model)
    print_of = model_fingerprint(view)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"The {word} fox of Oslo sees {word} dogs." for word in ("quick", "red", "old")))
    values = {"model_name": "small", "layers": [1], "mom2_dataset": str(corpus), "max_length": 8}
    settings = GlobalHyperParams.from_dict({**values, "alg_name": "Global", "stats_dir": str(folder / "moments")})

    def moments() -> str:
        found = layer_statistics(view, TOK, settings, [1], print_of, progress=False)[1]
        return _of([found.keys, found.counts, found.output, torch.tensor(found.num_tokens)])

    moments()
    yield Artefact("moments of a layer", CACHE, _only(folder / "moments", "layer1*"), moments)
    own = {"rank_expert": 3, "rank_out": 4, "rank_in": 5, "whitening": "none", "stats_dir": str(folder / "bases")}
    mote = MoTEHyperParams.from_dict({**values, **own, "alg_name": "MoTE"})

    def basis() -> str:
        found = layer_basis(view.layers[1], mote, None, print_of)
        return _of([found.u_expert, found.u_out, found.u_in, torch.tensor(found.relative_error)])

    basis()
    yield Artefact("Tucker basis", CACHE, _only(folder / "bases", "basis*"), basis)
    yield _null_spaces(settings, folder / "null-spaces")
    yield _tokens(corpus.read_text().splitlines(), folder / "tokens")
    settings_of = TargetSettings(1, 0.1, 0.0625, 0.1, 4.0, 0.05, 256, "subject_last")
    search = TargetSearch(view, TOK, 1, (), settings_of, progress=False, warn=False)

    def targets() -> str:
        found = cached_targets(folder / "targets", "small", print_of, search, [FACT])
        # Files of earlier versions do not say in whose company a target was found.
        return _of([value for name, value in vars(found).items() if name != "batch"])

    targets()
    yield Artefact("target vector", CACHE, _only(folder / "targets", "target*"), targets)
    yield _sums(view, folder / "sums", print_of)
    key = GenerationKey(print_of, ((5,), (6, 7)), 6, 0, 4)
    made = GeneratedTexts(model, TOK, key, 4, folder / "generated")

    def generated() -> str:
        return digest(made.part(0))

    generated()
    yield Artefact("generated texts", CACHE, _only(folder / "generated", "part*"), generated)


def _null_spaces(settings: GlobalHyperParams, folder: Path) -> Artefact:
    own, width = replace(settings, stats_dir=str(folder)), 6
    x = torch.randn(4, width, 2 * width, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(0, -3, width)[:, None]
    moments = LayerMoments(x @ x.mT, torch.full((4,), 9), torch.eye(3), 36)

    def null_spaces() -> str:
        parts = layer_null_space(1, moments, own, "f" * 64).projectors
        return _of([part.basis for part in parts] + [torch.tensor([part.complement for part in parts])])

    null_spaces()
    return Artefact("null spaces", CACHE, _only(folder, "nullspace*"), null_spaces)


def _tokens(texts: list[str], folder: Path) -> Artefact:
    key = TokenKey("corpus", "tokenizer", 8)

    def tokens() -> str:
        found = TokenisedTexts(TOK, texts, key, key.file(folder))
        ids = [found.part(number) for number in range(len(found))]
        found.keep()
        return digest(ids)

    tokens()
    return Artefact("tokens of a corpus", CACHE, _only(folder, "*.safetensors"), tokens)


def _sums(view: MoELayerView, folder: Path, print_of: str) -> Artefact:
    checkpoint = MomentsCheckpoint(folder, {1: StatisticsKey(print_of, 1, "c", "t", 1, 8, "float32", None)}, 0.0)
    kept = Sums(view.layers[1], torch.float32)
    torch.nn.init.normal_(kept.keys)
    checkpoint.keep({1: kept}, 3, [])

    def resumed() -> str:
        sums = Sums(view.layers[1], torch.float32)
        number, done = checkpoint.resume({1: sums})
        # From the beginning, where the file is damaged: what then comes of it is that of an uninterrupted run.
        return "from the beginning" if not number else digest([number, done, _of(sums.tensors().values())])

    return Artefact("sums of a run", CACHE, _only(folder, "partial*"), resumed)


def _patches(model: nn.Module, folder: Path) -> Iterator[Artefact]:
    view, edited, cored = MoELayerView(model), copy.deepcopy(model), copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.02 * torch.randn(*shape, generator=draw)

    with writing(MoELayerView(edited)) as writer:
        columns = (torch.tensor([0]), torch.tensor([1, 2]))
        writer.write(1, FactoredUpdate(random(32, 3), (0, 4), columns, (random(24, 1), random(24, 2))))
        factored = writer.finish({"note": "robustness"}, model_fingerprint(view))
    name = "model.layers.1.mlp.gate.weight"
    whole = copy.deepcopy(model)
    with writing_tensors(whole) as tensors:
        tensors.write(name, whole.get_parameter(name).detach() + random(6, 32))
        trained = tensors.finish({"note": "robustness"})
    cores = _cores(cored, draw)
    for patch, called in ((factored, "factored update"), (cores, "Tucker cores"), (trained, "whole tensors")):
        for originals in (False, True):
            path = folder / f"{called}{originals}.safetensors"
            patch.save(path, originals)
            label = f"patch of {called}" + (" with originals" if originals else "")
            nullable = frozenset({"parent", "weight_norm"})
            yield Artefact(label, PATCH, path, partial(_applied, model, path), model, nullable)
    yield _adapter(model, folder)


def _cores(model: nn.Module, draw: torch.Generator) -> WeightPatch:
    """Two layers that share a core, and a dense one; with null spaces, and small enough to be written as cores."""
    view = MoELayerView(model)

    def factors() -> TuckerFactors:
        u_expert, u_in, u_out = (torch.randn(n, 2, generator=draw) for n in (6, 24, 32))
        vectors = [torch.linalg.qr(torch.randn(24, 1, generator=draw)).Q for _ in range(6)]
        sides = tuple(ExpertProjector(vector, number % 2 == 0) for number, vector in enumerate(vectors))
        return TuckerFactors(u_expert, u_in, u_out, NullSpace(sides))

    lower, upper = factors(), factors()
    tokens = torch.tensor([[0, 3], [4, 1], [2, 5]])
    inner = 0.02 * torch.randn(3, 2, 2, generator=draw)
    core = FactoredCore(torch.randn(2, 3, generator=draw), tokens, inner, upper.expert)
    with writing(view) as writer:
        writer.write(1, CoreUpdate(core, lower).scale(0.5))
        writer.write(2, CoreUpdate(core, upper))
        writer.write(2, CoreUpdate(0.02 * torch.randn(2, 2, 2, generator=draw), upper))
        return writer.finish({"note": "robustness"}, model_fingerprint(view))


def _applied(model: nn.Module, path: Path) -> str:
    """Puts a patch on and takes it off; where it holds originals, as another process would."""
    patch = load_patch(path)
    patch.apply(model)
    found = state(model)
    try:
        describe(patch)
        if patch.flips:
            load_patch(path).revert(model)
        else:
            patch.revert(model)
    finally:
        patch.restore(model)
    return digest([found, patch.id, patch.base, patch.parent, patch.warnings])


def _adapter(model: nn.Module, folder: Path) -> Artefact:
    path = folder / "adapter.safetensors"
    config = AdapterConfig(1, 32, 4, 16, 2, 0.5, 0.1, 1.0, True, "skip", base_fingerprint(model))
    adapter = attach(model, TOK, MoEAdapter(config))
    add_subjects(model, TOK, adapter, ["France", "Oslo"])
    detach(model).save(path)

    def attached() -> str:
        loaded = attach(model, TOK, MoEAdapter.load(path))
        try:
            return digest([_of(loaded.state_dict().values()), loaded.id])
        finally:
            detach(model)

    return Artefact("MEMoE adapter", PATCH, path, attached, model)


def _results(folder: Path) -> Iterator[Artefact]:
    score = Score(90.5, 1.25, 4)
    routing = {"preservation": {"mean": 99.5, "per_layer": {1: 99.5}}}
    row = Row("MoTE", "experts", "ours", EvaluationResult("counterfact", *[score] * 5), routing, {"solve": 0.5}, 2**20,
              2, 0.125, {"layers": [1]}, None, ("a warning",))  # fmt: skip
    about = {"protocol": "counterfact", "edits": 4}
    save_rows(Comparison((row,), about), folder / "compare")

    def rows() -> str:
        return digest([asdict(one) for one in earlier_rows(folder / "compare", about, ["MoTE"])])

    nullable = frozenset({"targets_reached", "rounding_loss", "easyedit", "mean", "stderr", "1"})
    yield Artefact("rows of compare", RESULT, folder / "compare" / RESULTS, rows, nullable=nullable)
    measured = Measured(about, folder / "locate")
    measured.left = {"trial": 1}
    measured.folder.mkdir()
    measured.add("reachability", "1", {"layer": 1, "final_nll": {"mean": 0.5}})

    def located() -> str:
        return digest(json.loads(json.dumps(Measured.resumed(folder / "locate", about).to_dict())))

    yield Artefact("rows of locate", RESULT, folder / "locate" / RESULTS, located)
    write_history(folder, [Edit("a" * 16, None, "MoTE", {"m": (1, 2)})])

    def history() -> str:
        return digest([asdict(edit) for edit in read_history(folder)])

    yield Artefact("edits of a checkpoint", RESULT, folder / EDITS, history, nullable=frozenset({"parent"}))
    write_checked_json(folder / TUNING, {"records": ["b" * 16]})

    def tuned() -> str:
        check_held_out(folder, [])
        return ""

    yield Artefact("records of tune", RESULT, folder / TUNING, tuned)
