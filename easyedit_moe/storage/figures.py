"""Pictures on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from easyedit_moe.storage.files import replacing

_DPI = 110


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure of matplotlib, in full or not at all, and close it; the path.

    Raises:
        WriteError: it can't be written; what was there is as it was.
    """
    import matplotlib.pyplot as plt

    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=_DPI)
    finally:
        plt.close(figure)
    return path
