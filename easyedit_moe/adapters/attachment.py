"""Hanging an adapter into a model and taking it out again, bit-exactly, and finding each token's anchor in a forward.

While attached, the adapter is a submodule of the FFN, a hook on the FFN adds its output, and hooks on the model read
the token ids. With a KV cache, the ids that earlier forwards saw are kept with the cache itself: each sequence goes on
with its own anchor, and with the cache's rows they are reordered, selected, repeated and cropped.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.adapters.base_saving import BaseSaving
from easyedit_moe.adapters.moe_adapter import MoEAdapter, base_fingerprint
from easyedit_moe.errors import AdapterError, LayerError
from easyedit_moe.facts.anchors import NO_ANCHOR, SubjectMatcher
from easyedit_moe.facts.tokens import encode_target
from easyedit_moe.interrupts import do_all, uninterrupted
from easyedit_moe.moe.embeddings import input_embeddings
from easyedit_moe.moe.holding import held, intact
from easyedit_moe.moe.layer_outputs import layer_output, replace_layer_output
from easyedit_moe.moe.layers import decoder_of, decoder_stack

SUBMODULE = "memoe_adapter"
FFN_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_HISTORY = "_memoe_history"
_CACHES = ("past_key_values", "cache_params")


def find_ffn(model: nn.Module, layer: int) -> nn.Module:
    """The FFN of a decoder layer: its MLP or its MoE block.

    Raises:
        LayerError: out of range, or a layer without FFN. LayoutError: an unknown architecture.
    """
    layers, name = decoder_stack(model)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(layers):
        raise LayerError(f"layer {layer!r} is out of range: the model has layers 0 to {len(layers) - 1}.")
    children = dict(layers[layer].named_children())
    found = next((children[n] for n in FFN_NAMES if n in children), None)
    mixer = children.get("mixer")  # hybrid models: one module per layer, attention, state space or FFN
    if found is None and mixer is not None and ("MLP" in type(mixer).__name__ or hasattr(mixer, "experts")):
        found = mixer
    if found is None:
        inside = ", ".join(f"{n} ({type(m).__name__})" for n, m in children.items())
        raise LayerError(f"{name}.{layer} has no FFN to put an adapter beside; it consists of {inside}.")
    return found


def find_adapter(model: nn.Module) -> MoEAdapter | None:
    """The adapter that is attached to ``model``, if any."""
    return next((module for module in model.modules() if isinstance(module, MoEAdapter)), None)


def attach(model: nn.Module, tok: PreTrainedTokenizerBase, adapter: MoEAdapter) -> MoEAdapter:
    """Hang ``adapter`` into the layer that its config names, on that layer's device; the base is left as it is.

    ``tok`` is the model's tokenizer, by which subjects are found in token sequences.

    Raises:
        AdapterError: made for another model, or an adapter is attached already. LayerError: no FFN there.
    """
    if find_adapter(model) is not None:
        raise AdapterError("The model has an adapter already; detach it first.")
    found = base_fingerprint(model)
    if found != adapter.config.fingerprint:
        raise AdapterError(
            f"This adapter was made for another model: expected fingerprint {adapter.config.fingerprint[:16]}, found "
            f"{found[:16]}."
        )
    ffn = find_ffn(model, adapter.config.layer)
    device = next(ffn.parameters()).device
    if device.type == "meta":
        raise AdapterError(f"The FFN of layer {adapter.config.layer} is offloaded; load the model with it on a device.")
    # Bound methods are hooked in, so that a deep copy of the model has hooks of its own adapter.
    attachment = _Attachment(adapter)
    with intact(model, kept=lambda: adapter.attachment is attachment) as hold:
        hold.undo.append(partial(_take_out, model, adapter, attachment))
        adapter.to(device)
        adapter.train(ffn.training)
        adapter.matcher = SubjectMatcher(tok, adapter.subjects)
        ffn.add_module(SUBMODULE, adapter)
        handles = attachment.handles
        handles.append(ffn.register_forward_hook(attachment.add, with_kwargs=True))
        for module in _entrances(model):
            handles.append(module.register_forward_pre_hook(attachment.open, with_kwargs=True))
            handles.append(module.register_forward_hook(attachment.close, with_kwargs=True, always_call=True))
        attachment.saving = BaseSaving.put_on(model)
        adapter.attachment = attachment
    return adapter


def detach(model: nn.Module) -> MoEAdapter:
    """Take the adapter out; hooks, modules and outputs are then as before it was attached.

    Raises:
        AdapterError: the model has no adapter.
    """
    adapter = find_adapter(model)
    if adapter is None:
        raise AdapterError("The model has no adapter to detach.")
    with held(model), uninterrupted():
        _take_out(model, adapter, adapter.attachment)
    return adapter


def _take_out(model: nn.Module, adapter: MoEAdapter, attachment: _Attachment) -> None:
    """Whatever of an adapter hangs on a model; nothing the second time."""
    parts = find_ffn(model, adapter.config.layer)._modules
    if attachment.saving is not None:
        attachment.saving.take_off(model)
    do_all(handle.remove for handle in attachment.handles)
    if parts.get(SUBMODULE) is adapter:
        del parts[SUBMODULE]
    adapter.attachment = adapter.matcher = None


def add_subjects(model: nn.Module, tok: PreTrainedTokenizerBase, adapter: MoEAdapter, subjects: list[str]) -> None:
    """Make an attached adapter know new subjects, embedded by the model's token embedding (mean over the tokens)."""
    new = [subject for subject in dict.fromkeys(subjects) if subject not in adapter.subjects]
    if new:
        table = input_embeddings(model)
        device = table.weight.device
        with torch.no_grad():
            ids = [encode_target(tok, subject) for subject in new]
            # One copy to the device for all of them.
            every = torch.tensor([one for own in ids for one in own], device="cpu" if device.type == "meta" else device)
            rows = [own.float().mean(0) for own in table(every).split([len(own) for own in ids])]
        adapter.add_subjects(new, torch.stack(rows))
    adapter.matcher = SubjectMatcher(tok, adapter.subjects)


def _entrances(model: nn.Module) -> list[nn.Module]:
    """Where token ids come in: the model, and its decoder, which some callers use directly."""
    decoder = decoder_of(model)
    return [model] if decoder is None or decoder is model else [model, decoder]


class _Attachment:
    """The hooks of one attached adapter, and the anchors of the forward that is under way."""

    def __init__(self, adapter: MoEAdapter) -> None:
        self.adapter = adapter
        self.handles: list[Any] = []
        self.anchors: Tensor | None = None
        self.opener: nn.Module | None = None
        self.ids: Any = None
        self.history: _History | None = None
        self.saving: BaseSaving | None = None

    def open(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Find the anchor of every token that comes in."""
        names = inspect.signature(module.forward).parameters
        values = dict(zip(names, args, strict=False)) | kwargs
        ids = values.get("input_ids")
        if self._within(module, ids):
            return  # the decoder, called by the model that has seen the ids
        self.anchors = self.history = None
        self.opener, self.ids = module, ids
        if not self.adapter.enabled:
            return
        if ids is None:
            raise AdapterError(
                "The attached adapter finds anchors in token ids, but the model was called without input_ids (with "
                "inputs_embeds?). Pass input_ids, or detach the adapter."
            )
        cache = next((values[name] for name in _CACHES if values.get(name) is not None), None)
        earlier = _earlier(cache, len(ids))
        self.history = _History.continued(earlier, ids, values.get("attention_mask"))
        if cache is not None:
            self.history.keep_with(cache)
        full = torch.full(self.history.ids.shape, NO_ANCHOR)
        if self.adapter.config.use_anchors:
            matcher = cast(SubjectMatcher, self.adapter.matcher)  # an attached adapter has one
            for i, row in enumerate(self.history.rows()):
                full[i].masked_scatter_(self.history.mask[i], torch.tensor(matcher.anchors(row), dtype=torch.long))
        self.anchors = full[:, full.shape[1] - ids.shape[1] :]

    def _within(self, module: nn.Module, ids: Any) -> bool:
        """Whether a forward is under way that this one is part of; one that was interrupted may never have closed."""
        if self.opener is None or self.opener is module:
            return False
        same = isinstance(ids, Tensor) and isinstance(self.ids, Tensor) and ids.shape == self.ids.shape
        return ids is None or ids is self.ids or (same and torch.equal(ids.to(self.ids.device), self.ids))

    def close(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forget the forward; a cache that it made keeps the ids."""
        if module is not self.opener:
            return
        if self.history is not None and output is not None:
            made = next((c for c in (getattr(output, name, None) for name in _CACHES) if c is not None), None)
            if made is None and isinstance(output, tuple):
                made = next((item for item in output if hasattr(item, "get_seq_length")), None)
            if made is not None:
                self.history.keep_with(made)
        self.anchors = self.opener = self.ids = self.history = None

    def add(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The FFN's output plus the adapter's; rows without an anchor are bit-equal under ``skip``."""
        adapter = self.adapter
        if not adapter.enabled:
            return None
        if self.anchors is None:
            raise AdapterError(
                "A layer with an adapter was called outside of its model's forward, so its tokens' anchors are "
                "unknown. Call the model, or detach the adapter."
            )
        x, hidden = args[0] if args else next(iter(kwargs.values())), layer_output(output)
        x, flat = x.reshape(-1, x.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        anchor = self.anchors.reshape(-1).to(x.device)
        if len(x) != len(anchor):
            raise AdapterError(f"The FFN was called with {len(x)} tokens, but the model with {len(anchor)}.")
        skip = adapter.config.without_anchor == "skip"
        rows = torch.nonzero(anchor != NO_ANCHOR).squeeze(1) if skip else torch.arange(len(x), device=x.device)
        if not len(rows):
            return None
        changed = (flat[rows] + adapter(x[rows], anchor[rows])).to(flat.dtype)
        return replace_layer_output(output, flat.index_copy(0, rows, changed).reshape(hidden.shape))


class _History:
    """The ids ``[B, S]`` that a KV cache stands for, and which of them are no padding; on the CPU."""

    def __init__(self, ids: Tensor, mask: Tensor) -> None:
        self.ids, self.mask = ids, mask

    @staticmethod
    def continued(earlier: _History | None, ids: Tensor, mask: Any) -> _History:
        """``earlier`` and the ids of this forward; ``mask`` may cover all of them or only the new ones."""
        ids = ids.detach().cpu()
        before = earlier.ids if earlier is not None else ids[:, :0]
        known = earlier.mask if earlier is not None else torch.ones(before.shape, dtype=torch.bool)
        whole = torch.cat([before, ids], dim=1)
        mask = mask.detach().cpu().bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if mask is None or mask.shape[1] not in (whole.shape[1], ids.shape[1]):
            mask = torch.ones(ids.shape, dtype=torch.bool)
        if mask.shape[1] != whole.shape[1]:
            mask = torch.cat([known, mask], dim=1)
        return _History(whole, mask)

    def rows(self) -> list[list[int]]:
        """Ids of each sequence without padding."""
        pairs = zip(self.ids.tolist(), self.mask.tolist(), strict=True)
        return [list(itertools.compress(ids, mask)) for ids, mask in pairs]

    def take(self, rows: Tensor) -> None:
        """Keep these sequences, in this order."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def keep_with(self, cache: Any) -> None:
        """Hang this history on the cache, and follow what is done to the cache's rows."""
        kept = getattr(cache, _HISTORY, None)
        if kept is not None:
            kept.ids, kept.mask = self.ids, self.mask
            return
        setattr(cache, _HISTORY, self)
        for name, choose in _ROW_OPERATIONS.items():
            if hasattr(cache, name):
                setattr(cache, name, _Followed(self, getattr(cache, name), choose))


def _reordered(history: _History, rows: Any) -> Tensor:
    return torch.arange(len(history.ids))[torch.as_tensor(rows).cpu()]


def _repeated(history: _History, repeats: int) -> Tensor:
    return torch.arange(len(history.ids)).repeat_interleave(repeats)


_ROW_OPERATIONS: dict[str, Callable[[_History, Any], Tensor]] = {
    "reorder_cache": _reordered,
    "batch_select_indices": _reordered,
    "batch_repeat_interleave": _repeated,
}


class _Followed:
    """A cache's method that also moves the rows of its history."""

    def __init__(self, history: _History, method: Callable[..., Any], choose: Callable[..., Tensor]) -> None:
        self.history, self.method, self.choose = history, method, choose

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        self.history.take(self.choose(self.history, *args, **kwargs))
        return result


def _earlier(cache: Any, batch: int) -> _History | None:
    """The history of a cache, cut to the cache's length; None where the cache is new or empty."""
    try:
        length = int(cache.get_seq_length()) if cache is not None else 0
    except (AttributeError, ValueError):  # a cache of another kind, or of layers without a length
        length = None
    history = getattr(cache, _HISTORY, None)
    if history is None or length == 0:
        if length:
            raise AdapterError(
                f"The KV cache holds {length} tokens from before the adapter was attached, so their subjects are "
                "unknown. Start with the whole text and an empty cache."
            )
        return None
    if len(history.ids) != batch or (length is not None and length > history.ids.shape[1]):
        raise AdapterError(
            f"The KV cache does not fit the ids seen so far: {batch} sequences after {length} tokens, but seen were "
            f"{tuple(history.ids.shape)}. Start with the whole text and an empty cache."
        )
    return history if length is None else _History(history.ids[:, :length], history.mask[:, :length])
