"""EasyEdit's WISE on one dense site: whether it can work there, and what it leaves on the model, row by row.

WISE puts a module of its own in the site's place. Which of its weights answer depends on a mean over all tokens of a
batch, padding included, so that an answer would depend on what is asked beside it; here each row is asked alone.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import HyperParamsError, LayerError
from easyedit_moe.facts.tokens import decode, encode_text
from easyedit_moe.host.baseline_hparams import BaselineHyperParams
from easyedit_moe.host.dense_statistics import module_of
from easyedit_moe.moe.config import text_config
from easyedit_moe.moe.layers import decoder_stack

UNRELATED = (
    "The quick brown fox jumps over the lazy dog.",
    "Water boils at a lower temperature in the mountains.",
    "She closed the window, since it had begun to rain.",
    "The train to the coast leaves at a quarter past nine.",
)
"""What WISE is told that no fact is about; EasyEdit's users give such texts as ``loc_prompts``. Ours."""


class State(Protocol):
    """What can be put back on a model."""

    def put_back(self, model: nn.Module) -> None:
        """Everything as it was."""


def site_of(hparams: BaselineHyperParams) -> str:
    """Dotted name of the module that WISE replaces; its files write ``layers[2]`` for ``layers.2``.

    Raises:
        HyperParamsError: not exactly one site.
    """
    names = hparams.values.get("inner_params")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise HyperParamsError(f"inner_params must be a list of one parameter's name; found {names!r}.")
    return re.sub(r"\[(\d+)\]", r".\1", names[0]).removesuffix(".weight")


def check_site(model: nn.Module, hparams: BaselineHyperParams) -> nn.Linear:
    """The module that WISE is to replace, as it is before.

    Raises:
        LayerError: the model lacks it, or has in its place what WISE can't replace. HyperParamsError: WISE-Merge, or
            not exactly one site.
    """
    if hparams.values.get("retrieve") is not True:
        raise HyperParamsError(
            "retrieve must be true: WISE-Merge merges when EasyEdit's own wrapper is called; here the model is asked."
        )
    name = site_of(hparams)
    module = module_of(model, name)
    site = original_of(module)
    if site.__class__ is not nn.Linear:
        raise LayerError(
            f"{name} is no linear module but {type(site).__name__}; EasyEdit's WISE can't edit it. Choose the "
            "attention's o_proj."
        )
    if site.bias is not None:
        raise LayerError(
            f"{name} has a bias, which EasyEdit's WISE leaves out of its own weights, so that no answer of theirs is "
            "right. Choose a linear module without one."
        )
    return site


def original_of(module: nn.Module) -> Any:
    """What WISE's module replaced; a module that is not WISE's itself."""
    return module.layer if hasattr(module, "memory_weight") else module


def unrelated_text(tok: PreTrainedTokenizerBase, number: int, prompt: str, target: str) -> str:
    """A text that is not about the fact, and no longer than it: EasyEdit counts the prompt's tokens in the longest."""
    others = [text for text in UNRELATED if text not in prompt] or [UNRELATED[0][:-1]]
    text = others[number % len(others)]
    count = len(encode_text(tok, f"{prompt} {target}"))
    return decode(tok, encode_text(tok, text)[:count], skip_special_tokens=True)


@dataclass
class WiseState:
    """What was in the site's place before an edit; beside it what ``inner`` knows of the rest of the model.

    Attributes:
        inner: of the rest.
        site: name of the module.
        module: that was there.
        content: a copy of it, where it was WISE's, which an edit changes in place.
    """

    inner: State
    site: str
    module: nn.Module
    content: nn.Module | None = None

    @staticmethod
    def of(model: nn.Module, hparams: BaselineHyperParams, inner: State) -> WiseState:
        """Taken before an edit."""
        name = site_of(hparams)
        module = module_of(model, name)
        return WiseState(inner, name, module, _copy(module) if hasattr(module, "memory_weight") else None)

    def put_back(self, model: nn.Module) -> None:
        """The module in its place, and all else as ``inner`` has it."""
        self.inner.put_back(model)
        parent, _, name = self.site.rpartition(".")
        setattr(model.get_submodule(parent), name, self.module)
        if self.content is not None:
            _fill(self.module, self.content)


def begin(model: nn.Module, hparams: BaselineHyperParams, settings: Any) -> None:
    """Before an edit: WISE goes on with the module that it left, and knows the activation of a multimodal model."""
    settings.sequential_edit = True
    settings.hidden_act = getattr(text_config(model), "hidden_act", None)
    module: Any = module_of(model, site_of(hparams))
    if hasattr(module, "memory_weight"):
        module.__class__ = type(module).__mro__[1]


def finish(model: nn.Module, hparams: BaselineHyperParams) -> None:
    """After an edit: WISE's module asks each row alone, and keeps nothing of the training."""
    module: Any = module_of(model, site_of(hparams))
    for name in ("new_weight_layer_output", "original_layer_output"):
        vars(module).pop(name, None)
    module.new_weight.requires_grad_(False)
    module.memory_weight = [weight.detach() for weight in module.memory_weight]
    if "masks" not in vars(module):
        module.masks = _Masks()
        decoder_stack(model)  # refuses what is no decoder before a hook is left on it
        model.register_forward_pre_hook(module.masks, with_kwargs=True)
    module.__class__ = _row_by_row(type(module))


def _copy(module: Any) -> nn.Module:
    copied = copy.deepcopy(module)
    copied.masks = module.masks  # the hook on the model fills these
    found: nn.Module = copied
    return found


def _fill(module: nn.Module, content: nn.Module) -> None:
    """Give a module the content of its copy; the objects stay, since others that put the model back refer to them."""
    module.__class__ = type(content)
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in content.named_parameters():
            own[name].copy_(value)
    for name, item in vars(content).items():
        there = vars(module).get(name)
        if isinstance(there, list) and isinstance(item, list):
            there[:] = copy.copy(item)
        elif not isinstance(item, dict):
            vars(module)[name] = item


class _Masks:
    """A forward's attention mask, for what is deep inside of it."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.mask = kwargs.get("attention_mask")


def _row_by_row(cls: Any) -> type:
    """WISE's module, asked for one row of a batch at a time, without its padding."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        mask = self.masks.mask
        out = torch.zeros(*hidden.shape[:-1], self.value_shape, dtype=hidden.dtype, device=hidden.device)
        for row in range(len(hidden)):
            fits = mask is not None and mask.shape == hidden.shape[:2]  # not in generation with a cache
            kept = mask[row].bool().to(hidden.device) if fits else slice(None)
            out[row, kept] = cls.forward(self, hidden[row : row + 1, kept])[0]
        return out

    return type("RowByRow", (cls,), {"forward": forward})
