"""What ``locate`` found as tables, a picture, and a sentence that names the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import Any

from easyedit_moe.comparison.rows import PRE_EDIT
from easyedit_moe.storage.figures import save_figure
from easyedit_moe.storage.files import write_text
from easyedit_moe.workflow.locate import Location
from easyedit_moe.workflow.locate_cost import Cost
from easyedit_moe.workflow.locate_saved import Row, layer_rows

LAYER_COLUMNS = (
    "layer", "NLL now", "NLL shifted", "reached %", "shift / state", "paraphrase NLL now", "shifted", "carried %",
    "MoE restored", "best expert", "alike: phrasings", "neighbours", "other facts",
)  # fmt: skip
TRIAL_COLUMNS = ("layers", "efficacy", "generalisation", "specificity", "utility", "targets reached")
EXPERT_COLUMNS = ("layer", "expert", "effect over all facts", "effect where routed", "facts routed")
SHOWN_EXPERTS = 10
_SCORES = ("efficacy", "generalisation", "specificity", "utility")


def layer_cells(found: Location) -> list[list[str]]:
    """A line per layer; "-" where nothing was measured."""
    rows = found.measured.rows
    reach, trace, routing, experts = (
        layer_rows(rows[stage], found.layers) for stage in ("reachability", "tracing", "routing", "experts")
    )
    lines = []
    for layer in found.layers:
        r, t, s = reach.get(layer, {}), trace.get(layer, {}), routing.get(layer, {})
        best = next(iter(experts.get(layer, {}).get("experts", [])), None)
        reached = (
            _mean(r.get("initial_nll"), 2), _mean(r.get("final_nll"), 2), _mean(r.get("reached"), 0),
            _mean(r.get("relative_norm"), 2), _mean(r.get("paraphrase_before"), 2), _mean(r.get("paraphrase_nll"), 2),
            _mean(r.get("carried"), 0),
        )  # fmt: skip
        alike = (_mean(s.get(name), 0) for name in ("phrasings", "neighbours", "others"))
        lines.append([
            str(layer), *reached, _mean(t.get("effect"), 1, signed=True, error=True),
            "-" if best is None else f"{best['expert']}: {best['total']:+.1f}", *alike,
        ])  # fmt: skip
    return lines


def trial_cells(found: Location) -> list[list[str]]:
    """The unedited model, then a line per window that was tried, the best first."""
    rows = found.measured.rows["trial"]
    lines = [_trial_line("unedited", rows[PRE_EDIT], "-")] if PRE_EDIT in rows else []
    for row in tried(rows):
        reached = row.get("targets_reached")
        lines.append(_trial_line(row["name"], row, "-" if reached is None else str(reached)))
    return lines


def expert_cells(found: Location) -> list[list[str]]:
    """The experts whose restored contribution helps most, over all layers."""
    every = [one for row in found.measured.rows["experts"].values() for one in row["experts"]]
    every.sort(key=lambda one: -one["total"])
    return [
        [
            str(one["layer"]), str(one["expert"]), f"{one['total']:+.1f}",
            _mean(one["effect"], 1, signed=True, error=True), str(one["facts"]),
        ]
        for one in every[:SHOWN_EXPERTS]
    ]  # fmt: skip


def tried(rows: Mapping[str, Row]) -> list[Row]:
    """Rows of windows by utility, the best first; of equals the one with fewer layers, then the earlier one."""
    windows = [row for name, row in rows.items() if name != PRE_EDIT]
    return sorted(windows, key=lambda row: (-row["utility"]["mean"], len(row["layers"]), row["layers"]))


def verdict(found: Location) -> list[str]:
    """Which layers, in sentences: by the trial where there was one, else by what a shift reaches and carries over."""
    ranked, reach = tried(found.measured.rows["trial"]), found.measured.rows["reachability"]
    if ranked:
        lines = [_best_trial(found, ranked)]
    elif reach:
        by = sorted(reach.values(), key=lambda row: (_left(row), row["layer"]))
        lines = [
            f"Best layer by reachability: {by[0]['layer']} (NLL {_left(by[0]):.2f} with a shift). No window was tried."
        ]
    else:
        lines = ["No window was tried and reachability was not measured, so no layer is named."]
    left = found.measured.to_dict()["left"]
    if left:
        todo = ", ".join(f"{count} of {stage}" for stage, count in left.items())
        lines.append(f"Not measured yet: {todo}.")
    return lines


def _best_trial(found: Location, ranked: Sequence[Row]) -> str:
    best, *others = ranked
    about, score = found.measured.provenance, best["utility"]
    edits = f"{score['count']} edit" + ("" if score["count"] == 1 else "s")
    text = f"Best window: layers {best['name']}, utility {score['mean']:.1f} ± {score['stderr']:.1f} after {edits} by "
    text += f"{about['hparams']['alg_name']}."
    close = [row["name"] for row in others if _alike(score, row["utility"])]
    return text + (f" As good (their difference is within its standard error): {', '.join(close)}." if close else "")


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two means differ by no more than the standard error of their difference, as if they were independent."""
    return abs(one["mean"] - other["mean"]) <= hypot(one["stderr"], other["stderr"])


def _left(row: Row) -> float:
    """NLL that a shift leaves: after other phrasings where there are any."""
    other, own = row["paraphrase_nll"]["mean"], row["final_nll"]["mean"]
    return float(own if other is None else other)


def cost_line(costs: Sequence[Cost], budget: float | None) -> str:
    """What is expected, before it is measured."""
    if not costs:
        return "Nothing is left to measure."
    parts = ", ".join(f"{one.stage} {duration(one.seconds)} ({one.units})" for one in costs)
    limit = "" if budget is None else f" Budget: {budget:g} min."
    return f"Expected: about {duration(sum(one.seconds for one in costs))}: {parts}; steps in brackets.{limit}"


def duration(seconds: float) -> str:
    """In a unit that fits."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def markdown(found: Location) -> str:
    """All tables and the verdict."""
    about = found.measured.provenance
    title = f"# Where {about['model']} holds facts\n\n{about['edits']} facts of {about['data']}, from number "
    title += f"{about['skip']} on."
    parts = [title, *verdict(found)]
    for columns, cells in (
        (LAYER_COLUMNS, layer_cells(found)),
        (TRIAL_COLUMNS, trial_cells(found)),
        (EXPERT_COLUMNS, expert_cells(found)),
    ):
        if cells:
            parts.append(_markdown(columns, cells))
    return "\n\n".join(parts) + "\n"


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def write_location(found: Location, folder: str | Path) -> list[Path]:
    """Write ``results.json``, ``table.md`` and ``locate.png``; each in full or not at all."""
    folder = Path(folder)
    saved = found.measured.save()
    write_text(folder / "table.md", markdown(found))
    chart(found, folder / "locate.png")
    return [*([] if saved is None else [saved]), folder / "table.md", folder / "locate.png"]


def chart(found: Location, path: Path) -> None:
    """Four panels: NLL by layer, effects of restoring by layer, routing by layer, and windows with their scores."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _draw_reachability(axes[0][0], found)
    _draw_tracing(axes[0][1], found)
    _draw_routing(axes[1][0], found)
    _draw_trial(axes[1][1], found)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _draw_reachability(axis: Any, found: Location) -> None:
    rows = layer_rows(found.measured.rows["reachability"], found.layers)
    _line(axis, rows, "initial_nll", "now", "#999999")
    _line(axis, rows, "final_nll", "shifted", "#1b6ca8")
    _line(axis, rows, "paraphrase_nll", "shifted, other phrasings", "#e08e45")
    axis.set(title="Reachability", xlabel="layer", ylabel="NLL of the new target, nats per token")
    _legend(axis, rows)


def _draw_tracing(axis: Any, found: Location) -> None:
    rows = layer_rows(found.measured.rows["tracing"], found.layers)
    experts = layer_rows(found.measured.rows["experts"], found.layers)
    effects = [row["effect"] for row in rows.values()]
    axis.bar(
        [layer - 0.2 for layer in rows], [e["mean"] for e in effects], 0.38, yerr=[e["stderr"] for e in effects],
        color="#1b6ca8", label="whole MoE output",
    )  # fmt: skip
    best = {layer: row["experts"][0]["total"] for layer, row in experts.items() if row["experts"]}
    axis.bar([layer + 0.2 for layer in best], list(best.values()), 0.38, color="#e08e45", label="best single expert")
    axis.set(title="Causal tracing: restored at the fact token", xlabel="layer", ylabel="points of probability")
    _legend(axis, rows or best)


def _draw_routing(axis: Any, found: Location) -> None:
    rows = layer_rows(found.measured.rows["routing"], found.layers)
    _line(axis, rows, "phrasings", "phrasings of one fact", "#1b6ca8")
    _line(axis, rows, "neighbours", "fact and neighbours", "#e08e45")
    _line(axis, rows, "others", "different facts", "#999999")
    axis.set(title="Routed experts of the fact token", xlabel="layer", ylabel="Jaccard similarity, %", ylim=(0, 104))
    _legend(axis, rows)


def _draw_trial(axis: Any, found: Location) -> None:
    rows = tried(found.measured.rows["trial"])[:12]
    for k, (name, colour) in enumerate(
        (("efficacy", "#1b6ca8"), ("generalisation", "#e08e45"), ("specificity", "#4a9d5b"))
    ):
        values = [row[name] for row in rows]
        axis.barh(
            [i + (k - 1) * 0.26 for i in range(len(rows))], [v["mean"] or 0 for v in values], 0.24,
            xerr=[v["stderr"] or 0 for v in values], color=colour, label=name,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set(title="Trial: the best windows", xlabel="percent", ylabel="layers", xlim=(0, 145))
    axis.set_xticks(range(0, 101, 20))
    _legend(axis, rows)


def _line(axis: Any, rows: Mapping[int, Row], name: str, label: str, colour: str) -> None:
    there = {layer: row[name] for layer, row in rows.items() if row[name]["mean"] is not None}
    if there:
        values = list(there.values())
        axis.errorbar(
            list(there), [v["mean"] for v in values], [v["stderr"] for v in values], marker="o", label=label,
            color=colour, capsize=2,
        )  # fmt: skip


def _legend(axis: Any, rows: Any) -> None:
    if rows:
        axis.legend(frameon=False)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def _trial_line(name: str, row: Row, reached: str) -> list[str]:
    return [name, *(_mean(row[score], 1, error=True) for score in _SCORES), reached]


def _mean(value: Mapping[str, Any] | None, digits: int, signed: bool = False, error: bool = False) -> str:
    """A mean as text; "-" where there is none."""
    if value is None or not value["count"] or value["mean"] is None:
        return "-"
    text = f"{value['mean']:{'+' if signed else ''}.{digits}f}"
    return f"{text} ± {value['stderr']:.{digits}f}" if error else text
