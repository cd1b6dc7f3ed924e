"""What the loaders of servers read, written down from their source code; no server is run here.

An adapter of routed experts must come in the one form that a server reads for a class of models, or it is refused, or
worse: loaded and not used. The versions that were read are part of the description.
"""

from __future__ import annotations

from dataclasses import dataclass

from easyedit_moe.errors import PatchError

PACKED = "packed"
PER_EXPERT = "per-expert"


@dataclass(frozen=True)
class Server:
    """One server's way with the experts' adapters.

    Attributes:
        name, version: what was read.
        packed_classes: classes of models (``architectures`` of config.json) whose experts are read packed; those of all
            others are read one by one.
        ranks: the ranks for which it reserves memory; empty: any.
        every_layer: dense layers take a slot's memory, too.
        needs_gates: it reads no experts without gate projections.
        mxfp4: an adapter can lie on experts that stay quantised in MXFP4.
    """

    name: str
    version: str
    packed_classes: frozenset[str] = frozenset()
    ranks: tuple[int, ...] = ()
    every_layer: bool = False
    needs_gates: bool = False
    mxfp4: bool = True

    def form_of(self, architecture: str) -> str:
        """The form that is read for a class of models: "packed" or "per-expert"."""
        return PACKED if architecture in self.packed_classes else PER_EXPERT

    def reserved_rank(self, rank: int) -> int:
        """The rank for which the server must reserve memory.

        Raises:
            PatchError: it serves no adapter of so high a rank.
        """
        if not self.ranks:
            return rank
        fitting = [allowed for allowed in self.ranks if allowed >= rank]
        if not fitting:
            raise PatchError(
                f"{self.name} {self.version} serves adapters up to rank {self.ranks[-1]}; this one has rank {rank}. "
                f"Give --rank {self.ranks[-1]} or less, or write a merged checkpoint with easyedit-moe apply."
            )
        return fitting[0]

    def slot_bytes(self, form: str, layers: int, experts: int, d_model: int, d_hidden: int, rank: int) -> int:
        """Bytes of GPU memory that one adapter's slot takes in bfloat16 on one GPU, without padding.

        All layers count, whatever the adapter changes: memory is reserved for gate, up and down of every expert.

        Args:
            form: "packed" or "per-expert".
            layers: MoE layers, or all where ``every_layer``.
            experts: E.
            d_model: d.
            d_hidden: h.
            rank: as `reserved_rank` says.
        """
        width = 2 * d_model + 3 * d_hidden if form == PACKED else 3 * (d_model + d_hidden)
        return 2 * layers * experts * rank * width

    def command(self, model: str, adapter: str, rank: int) -> str:
        """The line that serves a model with an adapter called ``edit``."""
        if self is SGLANG:
            return (
                f"python -m sglang.launch_server --model-path {model} --enable-lora --lora-paths edit={adapter} "
                f"--max-lora-rank {rank} --max-loras-per-batch 2"
            )
        return f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules edit={adapter}"


VLLM = Server(
    "vLLM",
    "0.33.0",
    packed_classes=frozenset(
        {
            "GptOssForCausalLM",
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3OmniMoeForConditionalGeneration",
            "InternS1ProForConditionalGeneration",
            "InternS2PreviewForConditionalGeneration",
        }
    ),
    ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
)
SGLANG = Server("SGLang", "0.5.23", every_layer=True, needs_gates=True, mxfp4=False)
SERVERS = {"vllm": VLLM, "sglang": SGLANG}
