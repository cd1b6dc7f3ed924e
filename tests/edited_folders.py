"""Checkpoint folders, patches on them, and how they are compared."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers as hf
from tiny import CONFIGS, TEXTS, OldStyleBlock, randomise, tiny_model, tiny_multimodal, tiny_omni, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.patches.weights import WeightPatch, writing

EXPERTS = (1, 4, 5)


class OldStyleConfig(hf.Qwen3MoeConfig):
    model_type = "old_style_moe"


class OldStyleModel(hf.Qwen3MoeForCausalLM):
    """A model with one module per expert, as models were before packed experts."""

    config_class = OldStyleConfig

    def __init__(self, config: OldStyleConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OldStyleBlock(layer.mlp, shared=True)


hf.AutoConfig.register("old_style_moe", OldStyleConfig)
hf.AutoModelForCausalLM.register(OldStyleConfig, OldStyleModel)


def model_of(family: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A tiny model of any family, multimodal ones and "old_style" included."""
    if family == "old_style":
        model = OldStyleModel(OldStyleConfig(**CONFIGS["qwen3_moe"]().to_dict() | {"model_type": "old_style_moe"}))
        randomise(model)
        return model.to(dtype).eval()
    if family == "omni":
        return tiny_omni().to(dtype)
    if family.startswith("multimodal "):
        return tiny_multimodal(family.removeprefix("multimodal ")).to(dtype)
    return tiny_model(family, dtype=dtype)


def saved(folder: Path, model: nn.Module, shard: str = "1GB") -> Path:
    """The model, a tokenizer, a licence and a subfolder."""
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("as it was")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def edited(
    model: nn.Module,
    layers: Sequence[int] = (1, 2),
    seed: int = 0,
    scale: float = 0.02,
    parent: str | None = None,
    site: str = "experts",
) -> WeightPatch:
    """Write random updates of several experts, or of the one of another site, into a model; their patch."""
    view, draw = MoELayerView(model, site=site), torch.Generator().manual_seed(seed)
    experts = EXPERTS if site == "experts" else (0,)
    with writing(view) as writer:
        for layer in layers:
            layout = view.layers[layer].experts.layout
            left = torch.randn(layout.d_model, 6, generator=draw) * scale
            columns = tuple(torch.randperm(6, generator=draw)[: i + 1] for i in range(len(experts)))
            right = tuple(torch.randn(layout.d_hidden, len(c), generator=draw) for c in columns)
            writer.write(layer, FactoredUpdate(left, experts, columns, right))
        patch = writer.finish({"method": "test"}, model_fingerprint(view))
    patch.parent = parent
    return patch


def logits(model: nn.Module) -> Tensor:
    """Of one text."""
    ids = tiny_tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits


def files_of(folder: Path) -> dict[str, bytes]:
    """Content by path of everything in a folder, subfolders included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_folder(folder: Path, other: Path) -> None:
    """Byte by byte."""
    found = filecmp.dircmp(folder, other)
    assert not found.left_only
    assert not found.right_only
    assert files_of(folder) == files_of(other)
