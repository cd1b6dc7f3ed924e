"""The bypass adapter of MEMoE (arXiv 2405.19086): a mixture of small experts beside one FFN of a frozen model.

``h_i = FFN(x_i) + lambda * sum_e G_e E_e(x_i)`` with the gate ``G = top_k(softmax(W_g R(x_i) + eps))`` and
knowledge-anchor routing ``R(x_i) = concat(x_i, embed(anchor))``. Here is the arithmetic, and saving and loading;
`easyedit_moe.adapters.attachment` hangs it into a model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easyedit_moe.errors import AdapterError
from easyedit_moe.facts.anchors import SubjectMatcher
from easyedit_moe.hparams.memoe import WITHOUT_ANCHOR
from easyedit_moe.storage.files import write_text
from easyedit_moe.storage.schema import Expected, check_tensors, content_of, read_record
from easyedit_moe.storage.strict_json import digest, read_json
from easyedit_moe.storage.tensors import read_metadata, read_safetensors, write_safetensors

SCHEMA = 1
WEIGHTS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter.json"
SUFFIX = ".safetensors"
ADAPTER_FILE = "memoe_adapter.safetensors"
"""The adapter's file beside a checkpoint."""
KIND = "memoe-adapter"
ADVICE = "save the adapter anew"


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and behaviour of an adapter.

    Attributes:
        layer: index of the decoder layer beside whose FFN it sits.
        d_model: d, width of the FFN's input and output.
        num_experts: E, experts of one hidden layer each.
        expert_width: width of that layer.
        top_k: experts that each token uses.
        scale: lambda.
        noise: standard deviation of eps, which is added to the gate's logits in training mode only.
        token_weight: weight of x_i in R(x_i); 1 is the paper's, 0 routes by the anchor alone.
        use_anchors: subjects are looked for in texts; otherwise no token has an anchor.
        without_anchor: "null" gives tokens without an anchor a learned null embedding; "skip" leaves them to the FFN.
        fingerprint: of the model that it was made for.
    """

    layer: int
    d_model: int
    num_experts: int
    expert_width: int
    top_k: int
    scale: float
    noise: float
    token_weight: float
    use_anchors: bool
    without_anchor: str
    fingerprint: str

    def __post_init__(self) -> None:
        if self.layer < 0 or min(self.d_model, self.num_experts, self.expert_width) < 1:
            raise AdapterError(
                f"layer must be >= 0, and d_model, num_experts and expert_width >= 1; found {self.layer}, "
                f"{self.d_model}, {self.num_experts} and {self.expert_width}."
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise AdapterError(f"top_k must lie in 1..{self.num_experts}, the experts; found {self.top_k}.")
        if self.without_anchor not in WITHOUT_ANCHOR:
            raise AdapterError(f"without_anchor must be skip or null; found {self.without_anchor!r}.")

    def tensors(self, anchors: int) -> dict[str, Expected]:
        """What an adapter of this shape with this many anchors holds; all in one dtype."""
        count, width, d = self.num_experts, self.expert_width, self.d_model
        shapes: dict[str, tuple[int, ...]] = {
            "gate_weight": (count, 2 * d),
            "first": (count, width, d),
            "first_bias": (count, width),
            "second": (count, d, width),
            "null_anchor": (d,),
            "anchors": (anchors, d),
        }
        return {name: Expected(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Fact:
    """What an adapter was trained on, kept for replay."""

    prompt: str
    subject: str
    target_new: str


@dataclass(frozen=True)
class _Saved:
    """What a file says of an adapter beside its tensors."""

    schema: int
    kind: str
    config: AdapterConfig
    edits: int
    subjects: list[str]
    facts: list[Fact]


@dataclass(frozen=True)
class AdapterRouting:
    """Routing of N tokens: gates ``G [N, E]`` (zero outside the top k), softmax ``[N, E]``, anchor index ``[N]``."""

    gates: Tensor
    probability: Tensor
    anchor: Tensor


def gate(inputs: Tensor, weight: Tensor, top_k: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``top_k(softmax(W_g R + eps))``: gates ``[N, E]``, zero outside the top k and not renormalised, and the softmax.

    ``inputs`` are R ``[N, m]``, ``weight`` is W_g ``[E, m]``, ``noise`` is eps ``[N, E]``.
    """
    logits = inputs @ weight.T
    probability = torch.softmax(logits if noise is None else logits + noise, dim=-1)
    value, index = probability.topk(top_k, dim=-1)
    return torch.zeros_like(probability).scatter(-1, index, value), probability


def balance_loss(gates: Tensor, probability: Tensor) -> Tensor:
    """Load balancing as in Switch Transformers (arXiv 2101.03961, eq. 4): ``E sum_e f_e P_e``, which is 1 when even.

    f_e is the share of the routed (token, expert) pairs that expert e gets, P_e its mean probability; both ``[N, E]``.
    """
    used = (gates > 0).to(probability.dtype)
    share = used.sum(0) / used.sum()
    return probability.shape[1] * (share * probability.mean(0)).sum()


class MoEAdapter(nn.Module):
    """The adapter; new, it changes nothing, because the experts' second projections start at zero.

    ``anchors [A, d]`` are the subjects' embeddings in the order of ``subjects``: the mean of the model's own token
    embeddings, scaled to a root mean square of 1 as the FFN's inputs are (the scaling is ours).

    Inside a model it is a submodule, so it moves with ``.to()`` and is copied with the model, but it stays out of the
    model's ``state_dict()``: a model with an adapter is saved and loaded as the base alone. ``save`` writes the
    adapter.
    """

    is_adapter = True
    """Its parameters are not the model's own; see `easyedit_moe.moe.wrappers`."""
    anchors: Tensor

    def __init__(self, config: AdapterConfig, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        count, width, d = config.num_experts, config.expert_width, config.d_model

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator) / d**0.5

        self.config = config
        # Only the anchor's half starts random: until training decides otherwise, one anchor means one routing.
        self.gate_weight = nn.Parameter(torch.cat([torch.zeros(count, d), draw(count, d)], dim=1))
        self.first = nn.Parameter(draw(count, width, d))
        self.first_bias = nn.Parameter(torch.zeros(count, width))
        self.second = nn.Parameter(torch.zeros(count, d, width))
        self.null_anchor = nn.Parameter(draw(d) * d**0.5)
        self.register_buffer("anchors", torch.zeros(0, d))
        self.subjects: tuple[str, ...] = ()
        self.facts: tuple[Fact, ...] = ()
        self.edits = 0
        self.enabled = True
        self.routed: list[AdapterRouting] | None = None
        self.generator: torch.Generator | None = None
        self.matcher: SubjectMatcher | None = None
        self.attachment: Any = None

    # ------------------------------------------------------------ arithmetic

    def forward(self, x: Tensor, anchor: Tensor) -> Tensor:
        """``lambda * sum_e G_e E_e(x) [N, d]`` for FFN inputs ``x [N, d]`` and anchor indices ``[N]`` (-1: none)."""
        config, dtype = self.config, self.first.dtype
        x = x.to(dtype)
        table = torch.cat([self.null_anchor[None], self.anchors])
        inputs = torch.cat([config.token_weight * x, table[anchor + 1]], dim=1).float()
        gates, probability = gate(inputs, self.gate_weight.float(), config.top_k, self._noise(x))
        if self.routed is not None:
            self.routed.append(AdapterRouting(gates, probability, anchor))
        gates = gates.to(dtype)
        out = torch.zeros_like(x)
        for e in range(config.num_experts):
            rows = torch.nonzero(gates[:, e]).squeeze(1)
            if len(rows):
                hidden = nn.functional.silu(x[rows] @ self.first[e].T + self.first_bias[e])
                out = out.index_add(0, rows, gates[rows, e, None] * (hidden @ self.second[e].T))
        return config.scale * out

    def _noise(self, x: Tensor) -> Tensor | None:
        if not self.training or not self.config.noise:
            return None
        shape = (len(x), self.config.num_experts)
        # Drawn on the CPU, so that a seed means the same on every device.
        return self.config.noise * torch.randn(shape, generator=self.generator).to(x.device)

    # ------------------------------------------------------------ subjects

    def add_subjects(self, subjects: Sequence[str], embeddings: Tensor) -> None:
        """New subjects and the mean embeddings ``[n, d]`` of their tokens."""
        scaled = embeddings.float() / embeddings.float().pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        self.anchors = torch.cat([self.anchors, scaled.to(self.anchors)])
        self.subjects += tuple(subjects)

    def release(self, facts: Collection[Fact]) -> None:
        """Forget facts, and with them the subjects, and their anchors, that no other fact is about."""
        gone = set(facts)
        self.facts = tuple(fact for fact in self.facts if fact not in gone)
        left = {fact.subject for fact in gone} - {fact.subject for fact in self.facts}
        places = [place for place, subject in enumerate(self.subjects) if subject not in left]
        self.anchors = self.anchors[torch.tensor(places, dtype=torch.int64, device=self.anchors.device)]
        self.subjects = tuple(self.subjects[place] for place in places)

    def state(self) -> dict[str, Any]:
        """A copy of everything that an edit changes, for `put_back`."""
        tensors = {name: t.detach().clone() for name, t in [*self.named_parameters(), *self.named_buffers()]}
        return {"tensors": tensors, "subjects": self.subjects, "facts": self.facts, "edits": self.edits}

    def put_back(self, state: dict[str, Any]) -> None:
        """Return to a `state`, bit for bit, on the device and in the dtype that the adapter has now."""
        for name, parameter in self.named_parameters():
            parameter.data = state["tensors"][name].to(parameter)
        self.anchors = state["tensors"]["anchors"].to(self.anchors)
        self.subjects, self.facts, self.edits = state["subjects"], state["facts"], state["edits"]

    # ------------------------------------------------------------ out of the model's state dict

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """The adapter's tensors; nothing when a model that holds the adapter asks."""
        if destination is not None:
            return destination
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if not prefix:
            super()._load_from_state_dict(state_dict, prefix, *args)

    # ------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write the adapter: one file where ``path`` ends in .safetensors, otherwise a folder.

        The file holds the tensors, and in its metadata shape, subjects and facts; the folder has them as
        ``adapter.safetensors`` and ``adapter.json``.

        Raises:
            AdapterError: an adapter of another model is there; nothing is written then. WriteError: the place can't be
                written to.
        """
        path = Path(path)
        self.check_place(path)
        tensors, content = dict([*self.named_parameters(), *self.named_buffers()]), self._content()
        if path.suffix == SUFFIX:
            write_safetensors(path, tensors, content)
            return
        # Of two files, the second may be missing after a crash: the tensors name the configuration they belong to.
        write_safetensors(path / WEIGHTS_FILE, tensors, {"kind": KIND, "belongs_to": digest(content)})
        write_text(path / CONFIG_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def check_place(self, path: Path) -> None:
        """Refuse a place that can't take this adapter; see `save`.

        Raises:
            AdapterError: an adapter of another model is there, or a file where a folder should be.
        """
        one_file = path.suffix == SUFFIX
        if os.path.exists(path) and os.path.isdir(path) == one_file:
            raise AdapterError(
                f"{path} is a {'folder' if one_file else 'file'}; an adapter is saved as a folder, or as a file that "
                f"ends in {SUFFIX}."
            )
        if not os.path.exists(path if one_file else path / CONFIG_FILE):
            return
        found = (_content_of_file(path) if one_file else _content_of_folder(path)).config.fingerprint
        if found != self.config.fingerprint:
            raise AdapterError(
                f"{path} holds an adapter of another model (fingerprint {found[:16]}, this one's is "
                f"{self.config.fingerprint[:16]}). Save to another place."
            )

    @staticmethod
    def load(path: str | Path) -> MoEAdapter:
        """Read a saved adapter, of one file, a folder, or beside a checkpoint; it is not attached yet.

        Raises:
            AdapterError: missing, truncated or corrupt files, or two that do not belong together.
        """
        path = Path(path)
        if os.path.isfile(path / ADAPTER_FILE) and not os.path.isfile(path / CONFIG_FILE):
            path = path / ADAPTER_FILE
        if path.suffix == SUFFIX and not os.path.isdir(path):
            content = _content_of_file(path)
            tensors, _ = read_safetensors(path, AdapterError, ADVICE)
        else:
            content = _content_of_folder(path)
            tensors, metadata = read_safetensors(path / WEIGHTS_FILE, AdapterError, ADVICE)
            if metadata != {"kind": KIND, "belongs_to": digest(read_json(path / CONFIG_FILE, AdapterError))}:
                raise AdapterError(f"{WEIGHTS_FILE} and {CONFIG_FILE} in {path} do not belong together; save anew.")
        with content_of(path, AdapterError, ADVICE):
            check_tensors(tensors, content.config.tensors(len(content.subjects)))
        adapter = MoEAdapter(content.config)
        adapter.to(tensors["first"].dtype)
        adapter.anchors = torch.zeros_like(tensors["anchors"])
        adapter.load_state_dict(tensors)
        adapter.subjects = tuple(content.subjects)
        adapter.facts, adapter.edits = tuple(content.facts), content.edits
        return adapter.requires_grad_(False).eval()

    @property
    def id(self) -> str:
        """16 hexadecimal digits of shape, base, subjects and facts, and of how many batches were learnt."""
        return digest(self._content())[:16]

    def describe(self, path: str | Path | None = None) -> dict[str, Any]:
        """Shape, facts and base of the adapter, as JSON; and the bytes of the file or folder ``path`` that holds it."""
        names = (WEIGHTS_FILE, CONFIG_FILE, ADAPTER_FILE)
        where = None if path is None else Path(path)
        files = [] if where is None else [where] if os.path.isfile(where) else [where / name for name in names]
        settings = {key: value for key, value in asdict(self.config).items() if key != "fingerprint"}
        return {
            "kind": "adapter beside one FFN",
            "id": self.id,
            "methods": ["MEMoE"],
            "facts": [asdict(fact) for fact in self.facts],
            "fingerprint": self.config.fingerprint,
            "layer": self.config.layer,
            "subjects": list(self.subjects),
            "batches": self.edits,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "dtype": str(self.first.dtype).removeprefix("torch."),
            "settings": [settings],
            "bytes": sum(file.stat().st_size for file in files if os.path.isfile(file)) if files else None,
        }

    def _content(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON."""
        return asdict(_Saved(SCHEMA, KIND, self.config, self.edits, list(self.subjects), list(self.facts)))


@contextmanager
def recorded_routing(adapter: MoEAdapter) -> Iterator[list[AdapterRouting]]:
    """A list that gets the routing of every call of the adapter inside."""
    before, adapter.routed = adapter.routed, []
    try:
        yield adapter.routed
    finally:
        adapter.routed = before


@contextmanager
def switched_off(adapter: MoEAdapter) -> Iterator[None]:
    """The adapter stays attached, but the model computes as if it were not."""
    before, adapter.enabled = adapter.enabled, False
    try:
        yield
    finally:
        adapter.enabled = before


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over class, names, shapes and a strided sample of the model's parameters, without an adapter's.

    The same in float32 and in bfloat16. Down-projections, which other methods edit, are left out.
    """
    own = {id(p) for module in model.modules() if isinstance(module, MoEAdapter) for p in module.parameters()}
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        if id(parameter) in own or parameter.is_meta or "down_proj" in name:
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16)
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _content_of_folder(folder: Path) -> _Saved:
    path = folder / CONFIG_FILE
    if not os.path.isfile(path):
        raise AdapterError(f"{folder} holds no adapter: {CONFIG_FILE} does not exist.")
    return _checked(path, read_json(path, AdapterError))


def _content_of_file(path: Path) -> _Saved:
    return _checked(path, read_metadata(path, AdapterError, ADVICE))


def _checked(path: Path, content: Any) -> _Saved:
    """What an adapter's file says of it; AdapterError where that is something else."""
    known = isinstance(content, dict) and content.get("kind") == KIND
    if not known or type(content.get("schema")) is not int or content["schema"] != SCHEMA:
        raise AdapterError(f"{path} is no adapter of schema {SCHEMA}; {ADVICE}.")
    with content_of(path, AdapterError, ADVICE):
        found = read_record(content, _Saved)
        if found.edits < 0:
            raise ValueError(f"edits is {found.edits}")
        return found
