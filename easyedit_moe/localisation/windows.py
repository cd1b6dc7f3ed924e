"""Runs of layers that an edit could write to; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from easyedit_moe.errors import LayerError

Window = tuple[int, ...]


def candidate_windows(layers: Sequence[int], widths: Sequence[int], most: int | None = None) -> list[Window]:
    """All runs of neighbouring entries of ``layers`` (the MoE layers, in order) with one of these widths.

    Where there are more than ``most``, as many are kept, evenly spread, the first and the last among them.

    Raises:
        LayerError: no width, one that is not positive or larger than the number of layers, or ``most`` < 1.
    """
    if not widths or any(not 1 <= width <= len(layers) for width in widths) or (most is not None and most < 1):
        raise LayerError(
            f"A window has 1 to {len(layers)} layers, the number of MoE layers that are measured, and at least one "
            f"window is tried; found widths {list(widths)} and at most {most} windows."
        )
    found = [
        tuple(layers[start : start + width])
        for width in dict.fromkeys(widths)
        for start in range(len(layers) - width + 1)
    ]
    if most is None or len(found) <= most:
        return found
    if most == 1:
        return found[:1]
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def by_promise(windows: Sequence[Window], nll: Mapping[int, float]) -> list[Window]:
    """The windows, most promising first: by the NLL that a shift at their last layer, where targets sit, leaves.

    Those whose last layer was not measured come last; else the order stays.
    """
    return sorted(windows, key=lambda window: nll.get(window[-1], float("inf")))


def near(windows: Sequence[Window], own: Sequence[int]) -> list[Window]:
    """The window ``own`` first, then those whose last layer, where targets sit, is near its last; else the order stays.

    Windows with the same last layer, which share their targets, follow each other.
    """
    last = own[-1]
    return sorted(windows, key=lambda window: (window != tuple(own), abs(window[-1] - last), window[-1]))


def window_name(window: Window) -> str:
    """``3-7``, ``3`` for one layer, or, where layers between are no MoE layers, all of them: ``1,3,5``."""
    if len(window) == 1:
        return str(window[0])
    if list(window) == list(range(window[0], window[-1] + 1)):
        return f"{window[0]}-{window[-1]}"
    return ",".join(map(str, window))
