"""What an export wrote, and the notes that lie beside the adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easyedit_moe.patches.inspection import describe
from easyedit_moe.patches.weights import WeightPatch


@dataclass(frozen=True)
class ExportedLayer:
    """What of one layer's update the adapter holds.

    Attributes:
        layer: its index.
        experts: how many have an update.
        exact_rank: the largest rank of an expert's update.
        rank: the largest in the adapter.
        loss: ``||update - adapter|| / ||update||``.
    """

    layer: int
    experts: int
    exact_rank: int
    rank: int
    loss: float


@dataclass(frozen=True)
class ExportedFact:
    """Probability of a fact's target (the product over its tokens) and whether greedy decoding would write it.

    Each is a triple: without the edit, with the patch, and with the adapter's factors added to the weights.
    """

    prompt: str
    target: str
    probability: tuple[float, float, float]
    first_choice: tuple[bool, bool, bool]


@dataclass(frozen=True)
class Exported:
    """An adapter that was written.

    Attributes:
        folder: where it is.
        target: "peft", "vllm" or "sglang".
        checked: name and version whose loader the layout follows.
        form: "packed" or "per-expert".
        rank: of every pair of the adapter.
        dtype: of its tensors.
        layers: what it holds of the patch.
        facts: their scores; empty where nothing was scored.
        slot_bytes: GPU memory that a server's slot takes; None for PEFT.
        merged_bytes: size of the edited matrices, which is what a merged checkpoint differs in.
        command: a line that loads it.
        remarks: what the user should know.
    """

    folder: Path
    target: str
    checked: str
    form: str
    rank: int
    dtype: str
    layers: tuple[ExportedLayer, ...]
    facts: tuple[ExportedFact, ...]
    slot_bytes: int | None
    merged_bytes: int
    command: str
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"folder": str(self.folder)}


def advice(exported: Exported) -> list[str]:
    """What the memory of a server's slot means, where there is a server."""
    if exported.slot_bytes is None:
        return []
    slot, merged = exported.slot_bytes / 1e9, exported.merged_bytes / 1e9
    found = [
        f"A slot of {exported.checked} takes {slot:.3g} GB of GPU memory at this rank (bfloat16, one GPU): it is "
        "reserved for every expert of every layer."
    ]
    if exported.slot_bytes > exported.merged_bytes:
        found.append(
            f"The edited matrices are {merged:.3g} GB, so a merged checkpoint (easyedit-moe apply), which takes no "
            "slot, is cheaper unless the same server must answer without the edit, too."
        )
    return found


def notes_of(exported: Exported, patch: WeightPatch) -> str:
    """README.md of the adapter's folder."""
    about = describe(patch)
    lines = [
        f"# Adapter for {exported.checked}",
        "",
        f"Made by easyedit-moe of the patch {patch.id} ({', '.join(about['methods']) or 'unknown method'}, "
        f"{len(about['facts'])} facts) as a LoRA of the experts' down-projections, {exported.form}, rank "
        f"{exported.rank}, {exported.dtype}. The layout follows the loader of {exported.checked}; other versions may "
        "read another one.",
        "",
        f"    {exported.command}",
        "",
        "| layer | experts | exact rank | rank | relative loss |",
        "|---|---|---|---|---|",
        *(
            f"| {one.layer} | {one.experts} | {one.exact_rank} | {one.rank} | {one.loss:.2e} |"
            for one in exported.layers
        ),
        "",
        *(f"- {text}" for text in (*advice(exported), *exported.remarks)),
    ]
    return "\n".join(lines).rstrip() + "\n"
