"""``easyedit-moe inspect``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from easyedit_moe.commands import options
from easyedit_moe.commands.printing import say, say_json, show_rows


def inspect(
    patch: Annotated[str, typer.Argument(metavar="PATCH", help="File that edit wrote, or MEMoE's adapter.")],
    as_json: options.AsJson = False,
) -> None:
    """Show what a patch is: method, facts, base, parents, what it touches and how much, settings, size."""
    from easyedit_moe.workflow.inspect import inspect as run

    found = run(patch)
    if as_json:
        say_json(found)
        return
    _show(found)


def _show(found: Mapping[str, Any]) -> None:
    texts = {
        "kind": found["kind"],
        "site": found.get("site") or "-",
        "id": found["id"],
        "method": ", ".join(found["methods"]) or "unknown",
        "made on": ", ".join(found.get("models", [])) or "-",
        "base": str(found["fingerprint"])[:16] + ("" if not found.get("base") else f", weights {found['base'][:16]}"),
        "parent": found.get("parent") or "none",
        "merged of": (", ".join(found.get("merged", [])) or "-") + (" (folded)" if found.get("folded") else ""),
        "originals": "held" if found.get("originals") else "not held",
        "rounding loss": _share(found.get("rounding_loss")),
        "size on disk": f"{(found['bytes'] or 0) / 1e6:.3f} MB",
    }
    if "layer" in found:
        texts |= {"layer": str(found["layer"]), "parameters": f"{found['parameters']:,} {found['dtype']}"}
        texts = {name: text for name, text in texts.items() if name not in ("originals", "rounding loss", "merged of")}
    show_rows(("", "value"), [[name, str(text)] for name, text in texts.items()])
    facts = [[fact["prompt"], fact.get("subject") or "-", fact.get("target_new") or fact.get("target") or "-"]
             for fact in found["facts"]]  # fmt: skip
    show_rows(("fact", "subject", "new target"), facts)
    touched = found.get("touched", [])
    if touched and "experts" in touched[0]:
        show_rows(("layer", "experts", "relative size: largest", "median", "expert by expert"), _layers(touched))
    elif touched:
        show_rows(("tensor", "shape", "dtype", "relative size"), [
            [one["name"], "x".join(map(str, one["shape"])), one["dtype"], _share(one["relative_size"])]
            for one in touched
        ])  # fmt: skip
    for number, settings in enumerate(found["settings"]):
        name = "settings" if len(found["settings"]) == 1 else f"settings of part {number + 1}"
        say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    for text in found.get("warnings", []):
        say(f"warning: {text}")


def _layers(touched: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for one in touched:
        sizes = [expert["relative_size"] for expert in one["experts"] if expert["relative_size"] is not None]
        ordered = sorted(sizes, reverse=True)
        each = " ".join(f"{expert['expert']}:{_share(expert['relative_size'])}" for expert in one["experts"])
        median = ordered[len(ordered) // 2] if ordered else None
        rows.append([str(one["layer"]), str(len(one["experts"])), _share(ordered[0] if ordered else None),
                     _share(median), each])  # fmt: skip
    return rows


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
