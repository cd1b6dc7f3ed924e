"""How much MoTE's Tucker manifold restricts: ranks by retained energy, what they leave out, and what an edit is worth.

python examples/tucker_ranks.py --out results/tucker
python examples/tucker_ranks.py --model Qwen/Qwen3-30B-A3B --layers 3 4 5 6 7 --ranks-only --out results/tucker-qwen
python examples/tucker_ranks.py --model smollm2-moe --hparams examples/smollm2-moe/MoTE/smollm2-moe.yaml \\
    --data counterfact.json --edits 40 --ranks 8,256,96 8,448,112 4,384,112 --out results/tucker-smollm2
"""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table
from variants import compared

from easyedit_moe import load_hyperparams, load_model, make_editor
from easyedit_moe.algebra.tucker import tucker_basis
from easyedit_moe.comparison import report
from easyedit_moe.comparison.task import Task
from easyedit_moe.hparams import MoTEHyperParams
from easyedit_moe.moe.fingerprint import model_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.storage.strict_json import write_json

ENERGIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
BY_ENERGY: dict[str, object] = {"rank_expert": None, "rank_out": None, "rank_in": None}


def _at(*shares: float) -> dict[str, object]:
    return {**BY_ENERGY, "tucker_energy": list(shares)}


VARIANTS: list[tuple[str, dict[str, object]]] = [
    ("all ranks full", {"rank_expert": 1.0, "rank_out": 1.0, "rank_in": 1.0}),
    ("as given", {}),
    *((f"energy {share:g} in each mode", _at(share, share, share)) for share in reversed(ENERGIES)),
    ("energy 0.8 in the expert mode", _at(0.8, 1.0, 1.0)),
    ("energy 0.8 in the output mode", _at(1.0, 0.8, 1.0)),
    ("energy 0.8 in the input mode", _at(1.0, 1.0, 0.8)),
    ("energy 0.9 in each mode, whitening in", {**_at(0.9, 0.9, 0.9), "whitening": "in"}),
]


def ranks_by_energy(view: MoELayerView, layers: list[int]) -> list[dict[str, Any]]:
    """Per layer and share, the ranks ``(re, ro, ri)`` of the unwhitened weights and the error of all three together."""
    found = []
    for layer in layers:
        layout = view.layers[layer].experts.layout
        for share in ENERGIES:
            basis = tucker_basis(view.layers[layer].experts.matrices(), 1, 1, 1, energy=(share,) * 3)
            found.append(
                {
                    "layer": layer,
                    "energy": share,
                    "sizes": [layout.num_experts, layout.d_model, layout.d_hidden],
                    "ranks": [basis.u_expert.shape[1], basis.u_out.shape[1], basis.u_in.shape[1]],
                    "relative_error": basis.relative_error,
                }
            )
    return found


def bases_of(task: Task, hparams: MoTEHyperParams) -> dict[str, Any]:
    """Ranks and relative error of each layer's basis under these settings."""
    layers = make_editor(hparams, progress=False).prepare(task.model, task.tok).layers
    bases = {layer: prepared.tucker_basis() for layer, prepared in layers.items()}
    return {
        str(layer): {
            "ranks": [basis.u_expert.shape[1], basis.u_out.shape[1], basis.u_in.shape[1]],
            "relative_error": basis.relative_error,
        }
        for layer, basis in bases.items()
    }


def ranks_of(text: str) -> dict[str, object]:
    """Ranks from "re,ro,ri"."""
    re, ro, ri = map(int, text.split(","))
    return {"rank_expert": re, "rank_out": ro, "rank_in": ri}


def setting_of(text: str) -> tuple[str, str]:
    """Name and value from "NAME=VALUE"."""
    name, _, value = text.partition("=")
    return name, value


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("layer", "energy", "re", "ro", "ri", "relative error", title="Ranks by retained energy")
    for row in rows:
        out.add_row(str(row["layer"]), f"{row['energy']:g}", *map(str, row["ranks"]), f"{row['relative_error']:.3f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="results/tucker")
    parser.add_argument("--model", default="factworld")
    parser.add_argument("--hparams", default="MoTE/factworld", help="settings of MoTE that the rows have besides")
    parser.add_argument("--data", default="factworld", help="records to edit")
    parser.add_argument("--ranks", type=ranks_of, nargs="*", default=[], help="further rows: re,ro,ri")
    parser.add_argument("--set", type=setting_of, nargs="*", default=[], help="NAME=VALUE of every row")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3], help="with --ranks-only")
    parser.add_argument("--ranks-only", action="store_true", help="edit nothing; for any model")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0)
    args = parser.parse_args()
    folder, console = report.check_folder(args.out), Console()
    if args.ranks_only:
        view = MoELayerView(load_model(args.model)[0])
        rows = ranks_by_energy(view, args.layers)
        about = {"model": args.model, "fingerprint": model_fingerprint(view)}
        write_json(folder / "ranks.json", {"schema": 1, "ranks": rows, "provenance": about})
        console.print(table(rows))
        return
    rows = [
        *VARIANTS,
        *((f"ranks {ranks['rank_expert']}, {ranks['rank_out']}, {ranks['rank_in']}", ranks) for ranks in args.ranks),
    ]
    common = {"model_name": args.model, **dict(args.set)}
    settings = {name: load_hyperparams(args.hparams, **{**common, **changes}) for name, changes in rows}
    task, result = compared(settings, console, args.edits, args.skip, args.edits, args.model, args.data)
    content = result.to_dict()
    layers = list(settings["as given"].layers)
    content["ranks"] = ranks_by_energy(MoELayerView(task.model), layers)
    content["bases"] = {name: bases_of(task, hp) for name, hp in settings.items()}
    report.write_results(result, folder)
    write_json(folder / "results.json", content)
    console.print(report.tables(result)[0], table(content["ranks"]))


if __name__ == "__main__":
    main()
