"""``easyedit-moe methods``."""

from __future__ import annotations


def methods() -> None:
    """List all methods and the models that hparams ship for."""
    from rich.console import Console

    from easyedit_moe.editors import editor_class, method_names
    from easyedit_moe.host.baseline_hparams import HOST_METHODS
    from easyedit_moe.hparams import hparams_folder

    console = Console()
    for name in method_names():
        models = ", ".join(sorted(p.stem for p in (hparams_folder() / name).glob("*.yaml")))
        summary = (editor_class(name).__doc__ or "").strip().splitlines()[0]
        console.print(f"[bold]{name}[/]: {summary} [dim]({models})[/]", highlight=False)
    for name in HOST_METHODS:
        models = ", ".join(sorted(p.stem for p in (hparams_folder() / name).glob("*.yaml")))
        console.print(f"[bold]{name}[/]: EasyEdit's own, where it is there. [dim]({models})[/]", highlight=False)
