"""Statistics of dense sites on our corpus, in the file formats that EasyEdit's ROME, MEMIT and AlphaEdit read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import EditingWarning, LayerError, NumericalError, not_finite
from easyedit_moe.facts.tokens import collate, encode_text, pad_id
from easyedit_moe.moe.capture import hooks, inference_mode_of, run
from easyedit_moe.storage.files import is_file, replacing
from easyedit_moe.storage.tensors import write_torch


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The submodule ``name``.

    Raises:
        LayerError: there is none; the message lists what the layer has instead.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        parent = name.rpartition(".")[0]
        while parent:
            try:
                found = [f"{parent}.{child}" for child, _ in model.get_submodule(parent).named_children()]
                break
            except AttributeError:
                parent = parent.rpartition(".")[0]
        else:
            found = [child for child, _ in model.named_children()]
        raise LayerError(f"The model has no module {name}; there is {', '.join(found) or 'nothing'}.") from error


def input_moments(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    names: Sequence[str],
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 16,
) -> dict[str, tuple[Tensor, int]]:
    """Sum of ``x x^T`` ``[d_in, d_in]`` (float64) over the inputs of each named linear module, and the tokens counted.

    Padding is left out. All modules are read in one pass.

    Raises:
        LayerError: a module that is not there. NumericalError: an input that is not finite.
    """
    modules = {name: module_of(model, name) for name in names}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)
    real: list[Tensor] = []

    def receive(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            rows = rows[real[-1].to(rows.device)].double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] += len(rows)

        return add

    sequences = sorted((encode_text(tok, text)[:max_length] for text in texts), key=len)
    with inference_mode_of(model), hooks() as handles:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(receive(name)))
        for start in range(0, len(sequences), batch_size):
            batch = collate(sequences[start : start + batch_size], pad_id(tok))
            real.append(torch.nonzero(batch.mask.reshape(-1)).squeeze(1))
            run(model, batch)
    for name in names:
        if not torch.isfinite(sums[name]).all():
            raise not_finite(f"The inputs of {name} are not finite")
    return {name: (sums[name].cpu(), counts[name]) for name in names}


def write_layer_statistics(path: Path, moment: Tensor, count: int, sample_size: int) -> None:
    """Write the ``.npz`` that EasyEdit's ``layer_stats`` reads: the sum of ``k k^T``, the tokens, the texts."""
    with replacing(path) as partial, partial.open("wb") as file:
        arrays: dict[str, Any] = {
            "mom2.count": np.array(count),
            "mom2.mom2": moment.float().numpy(),
            "sample_size": np.array(sample_size),
        }
        np.savez(file, **arrays)


def holds_statistics(path: Path) -> bool:
    """Whether a file holds what `write_layer_statistics` writes; read without running anything.

    Warns `EditingWarning` where it is damaged; it is to be made anew then.
    """

    def fits() -> bool:
        with np.load(path, allow_pickle=False) as found:
            moment, count = found["mom2.mom2"], found["mom2.count"]
            square = moment.ndim == 2 and moment.shape[0] == moment.shape[1] and moment.dtype == np.float32
            return bool(square and np.isfinite(moment).all() and count.shape == () and count > 0)

    return _holds(path, fits)


def holds_projectors(path: Path, layers: int) -> bool:
    """As `holds_statistics`, for what `write_projectors` writes of this many layers."""

    def fits() -> bool:
        found = torch.load(path, map_location="cpu", weights_only=True)
        square = isinstance(found, Tensor) and found.dim() == 3 and found.shape[1] == found.shape[2]
        return bool(square and found.dtype == torch.float32 and len(found) == layers and torch.isfinite(found).all())

    return _holds(path, fits)


def _holds(path: Path, fits: Callable[[], bool]) -> bool:
    if not is_file(path):
        return False
    try:
        if fits():
            return True
        reason = "other values than statistics"
    except Exception as error:  # of the formats' readers, which raise many types
        reason = f"{type(error).__name__}"
    warnings.warn(f"{path} is damaged ({reason}). It is made anew now.", EditingWarning, stacklevel=4)
    return False


def write_projectors(path: Path, moments: Sequence[tuple[Tensor, int]], threshold: float) -> list[int]:
    """Write AlphaEdit's ``P_loc`` file: ``[layers, d_in, d_in]`` float32, each the projector on a null space.

    The null space of a layer is spanned by the eigenvectors of ``C = sum k k^T / count`` with eigenvalues below
    ``threshold``, as in EasyEdit; here by ``eigh`` in float64.

    Returns:
        The dimension of each layer's null space.

    Raises:
        NumericalError: one of them is empty, so that AlphaEdit could not change anything.
    """
    projectors, dimensions = [], []
    for moment, count in moments:
        values, vectors = torch.linalg.eigh(moment / count)
        null = vectors[:, values < threshold]
        if not null.shape[1]:
            raise NumericalError(
                f"No eigenvalue lies below nullspace_threshold {threshold} (the smallest is {float(values[0]):.3g}), "
                "so AlphaEdit could change nothing. Raise the threshold."
            )
        projectors.append((null @ null.T).float())
        dimensions.append(null.shape[1])
    write_torch(path, torch.stack(projectors))  # EasyEdit reads it with torch.load
    return dimensions
