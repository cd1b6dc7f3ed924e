"""A life of edits: facts of the bundled world are changed one batch after another, also facts that were changed before.

python examples/lifelong.py --edits 1000 --batch-size 100 --out results/lifelong

Each run starts from the same model and gets the same stream of edits. One that was interrupted goes on when it is
called again: target vectors are kept under --out, so that the edits that were made are made again quickly, and the
points that were measured are not measured again. Runs with other settings, under labels of their own, go into the same
file, and ``--plot`` draws what is in it.

A language model and its facts take the place of the bundled world with ``--model``, ``--records`` and ``--hparams``:

python examples/lifelong.py --model smollm2-moe --records counterfact.json --hparams examples/smollm2-moe --out life
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lifelong_streams import APART, FIRST, Pair, Stream, corpus, record_stream, stream
from rich.console import Console

from easyedit_moe import load_hyperparams
from easyedit_moe.algebra.metric import expert_blocks
from easyedit_moe.algebra.routed_keys import RoutedKeys
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.memory import EditMemory
from easyedit_moe.errors import EditingWarning, PatchError
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.factworld.world import build_world
from easyedit_moe.measure import resident_bytes
from easyedit_moe.moe.fingerprint import weights_fingerprint
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.storage.strict_json import digest, write_json

SCHEMA = 2
UTILITY = ("efficacy, all so far", "retention, first, never superseded", "specificity, never edited")
"""Shares of which the utility of a point is the mean."""
UNSEEN = "specificity, not in the statistics"
ASIDE = {"passes": 1, "names": 0, "strangers": 0, "model": None, "records": None}
"""Settings of a run whose file, an earlier one, does not tell them."""


class Life:
    """One method on one model along the stream."""

    def __init__(
        self, yaml: str, changes: dict[str, Any], edits: Stream, asked: int, folder: Path, label: str, passes: int = 1
    ) -> None:
        # Targets of other runs are not taken, so that seconds are those of a run that finds its own.
        kept = {"target_cache_dir": str(folder / "targets" / digest(label)[:12]), "stats_dir": str(folder / "stats")}
        known = {one.name for one in fields(load_hyperparams(yaml))}
        kept = {name: value for name, value in kept.items() if name in known}
        self.hparams = load_hyperparams(yaml, **(kept | changes))
        self.model, self.tok = load_model(self.hparams.model_name, self.hparams.dtype, self.hparams.device)
        self.stream, self.asked, self.passes = edits, asked, passes
        self.view = MoELayerView(self.model)
        self.edited = getattr(self.hparams, "edited_layers", self.hparams.layers)
        self.norms = self._norms()

    def run(self, batch_size: int, every: int, known: Sequence[dict[str, Any]], save: Any) -> list[dict[str, Any]]:
        """All edits; a point at the beginning, after the first hundred and after every so many. Raises PatchError where
        a run that is taken up leads elsewhere.
        """
        editor, memory, points, seconds, since = make_editor(self.hparams, progress=False), None, [], 0.0, 0
        editor.prepare(self.model, self.tok)
        known = list(known)
        count = len(self.stream.edits)
        for start in [*range(0, count, batch_size), count]:
            if start % every == 0 or start in (FIRST, count):
                weights = weights_fingerprint(self.view)
                if len(points) < len(known):
                    point = known[len(points)]
                    if (point["edits"], point["weights"]) != (start, weights):
                        raise PatchError(f"The run in --out had other weights after {start} edits; take another --out.")
                else:
                    point = {"edits": start, "weights": weights, **self._measured(start, since)}
                    point |= {"capacity": self._capacity(editor, memory)}
                    # After an interruption some of these edits found their targets in the cache.
                    timed = start > 0 and not (known and len(points) == len(known))
                    point |= {"seconds per edit": seconds / (start - since) if timed else None}
                points.append(point)
                save(points)
                seconds, since = 0.0, start
            batch = list(self.stream.edits[start : start + batch_size])
            if batch:
                begun = time.perf_counter()
                for _ in range(self.passes):
                    result = editor.edit(self.model, self.tok, batch, memory)
                    # The patch is let go: nothing is undone here, so nothing has to be held for that.
                    memory, result = result.memory, None
                seconds += time.perf_counter() - begun
        return points

    def _measured(self, made: int, since: int) -> dict[str, Any]:
        """Shares of facts that greedy decoding writes, in percent, and what a model is otherwise."""
        so_far = self.stream.latest(0, made)
        some = random.Random(made).sample(so_far, min(self.asked, len(so_far)))
        found = {
            "efficacy, all so far": self._written(some),
            "efficacy, since the last point": self._written(self.stream.latest(since, made)[-self.asked :]),
            "retention, first, never superseded": self._written(self.stream.retained) if made >= FIRST else None,
            "specificity, never edited": self._written(self.stream.untouched),
            UNSEEN: self._written(self.stream.unseen),
            "perplexity": self._perplexity(),
            "norm growth per layer": {n: size / self.norms[n] for n, size in self._norms().items()},
            "resident bytes": resident_bytes(),
        }
        shares = [found[name] for name in UTILITY if found[name] is not None]
        return {"utility": sum(shares) / len(UTILITY) if len(shares) == len(UTILITY) else None, **found}

    def _capacity(self, editor: Any, memory: Any) -> dict[int, dict[str, float]]:
        """Per layer, means over experts: directions that edits may use, keys of current facts, and how many directions
        these take up, which are those in which they weigh more than the ridge.
        """
        if not isinstance(memory, EditMemory):
            return {}
        found, prepared = {}, (memory.carried.prepared or editor.prepared).layers
        for layer in self.hparams.edited_layers:
            rows = list(memory.rows(layer).values())
            blocks = expert_blocks(RoutedKeys.cat(rows), prepared[layer].metric) if rows else []
            ridge = self.hparams.lambda_reg or 0.0
            taken = [int((torch.linalg.svdvals(block.root) ** 2 > ridge).sum()) for block in blocks]
            free = prepared[layer].null_space or [self.view.layers[layer].experts.layout.d_hidden]
            count = prepared[layer].num_experts
            found[layer] = {
                "directions": sum(free) / len(free),
                "keys": sum(len(block.rows) for block in blocks) / count,
                "taken": sum(taken) / count,
            }
        return found

    def _written(self, pairs: Sequence[Pair]) -> float | None:
        if not pairs:
            return None
        return 100 * sum(score.exact for score in score_targets(self.model, self.tok, pairs)) / len(pairs)

    def _perplexity(self) -> float:
        scores = score_targets(self.model, self.tok, self.stream.texts)
        tokens = [len(score.labels) for score in scores]
        return math.exp(sum(s.nll * n for s, n in zip(scores, tokens, strict=True)) / sum(tokens))

    def _norms(self) -> dict[int, float]:
        """Norm of all experts' down-projections of each edited layer."""
        found = {}
        for layer in self.edited:
            experts = self.view.layers[layer].experts
            sizes = [float(experts.read(j).detach().float().norm()) for j in range(experts.layout.num_experts)]
            found[layer] = math.hypot(*sizes)
        return found


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel per quantity, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    aside = ("edits", "weights", "capacity", UNSEEN)
    kinds = [name for name in next(iter(runs.values()))["points"][0] if name not in aside]
    figure, axes = plt.subplots(3, math.ceil(len(kinds) / 3), figsize=(17, 12), layout="constrained")
    colours = plt.get_cmap("tab20").colors
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for number, run in enumerate(runs.values()):
            points = run["points"]
            values = [max(p[kind].values()) if isinstance(p[kind], dict) else p[kind] for p in points]
            numbers = [math.nan if value is None else value for value in values]
            style = "-" if number < len(colours) else "--"
            axis.plot([p["edits"] for p in points], numbers, style, color=colours[number % len(colours)], marker=".")
        axis.set(title=kind.replace("per layer", "(largest layer)"), xlabel="edits")
        if kind in ("perplexity", "norm growth per layer"):
            axis.set_yscale("log")
    figure.legend(runs, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def yaml_of(args: argparse.Namespace, method: str) -> str:
    """The file of a method's hparams."""
    return str(args.hparams / method / f"{Path(args.model).name}.yaml") if args.model else f"{method}/factworld"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/lifelong"))
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100, help=f"at most {APART}")
    parser.add_argument("--every", type=int, default=100, help="edits between two points")
    parser.add_argument("--asked", type=int, default=300, help="prompts of each kind at a point")
    parser.add_argument("--seed", type=int, default=0, help="of the stream of edits")
    parser.add_argument("--methods", nargs="+", default=["Global"])
    parser.add_argument("--label", help="what a single method is called in the file; default: the method")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyper-parameters, values as JSON")
    parser.add_argument("--passes", type=int, default=1, help="how often a batch is edited, one time after the other")
    parser.add_argument("--names", type=int, default=0, metavar="TIMES", help="statistics are also of names alone")
    parser.add_argument("--strangers", type=int, default=0, help="people whom statistics leave out; asked apart")
    parser.add_argument("--model", help="folder of another model; needs --records and --hparams")
    parser.add_argument("--records", type=Path, help="file of its facts, as `easyedit-moe compare --data` reads")
    parser.add_argument("--hparams", type=Path, help="folder of <method>/<name of the model's folder>.yaml")
    parser.add_argument("--plot", action="store_true", help="draw lifelong.png; needs matplotlib")
    args = parser.parse_args()
    if not 1 <= args.batch_size <= APART or args.every % args.batch_size:
        parser.error(f"--batch-size must be 1 to {APART}, and --every a multiple of it")
    if args.passes < 1 or args.names < 0 or not 0 <= args.strangers < len(build_world().bystanders):
        parser.error("--passes must be at least 1, --names at least 0, and --strangers fewer than are never edited")
    if args.label and len(args.methods) > 1:
        parser.error("--label is for a single method")
    others = (args.model, args.records, args.hparams)
    if any(others) and (not all(others) or args.names or args.strangers):
        parser.error("--model, --records and --hparams go together, and without --names and --strangers")
    changes = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.set)}
    path = args.out / "lifelong.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"schema": SCHEMA, "runs": {}}
    names = ("edits", "batch_size", "every", "asked", "seed", *ASIDE)
    runs: dict[str, dict[str, Any]] = content["runs"]
    read: dict[str, Any] = {}
    if args.model:
        read = {"model_name": args.model}
        model, tok = load_model(args.model, load_hyperparams(yaml_of(args, args.methods[0])).dtype)
        edits = record_stream(args.records, model, tok, args.edits, args.asked, args.seed)
        del model
    else:
        edits = stream(args.edits, args.asked, args.seed, args.strangers)
    if args.names or args.strangers:
        read |= corpus(args.names, edits.strangers, args.out / f"names-{args.names}-{args.strangers}.jsonl")
    for method in args.methods:
        label = args.label or method
        told = {name: getattr(args, name) for name in names}
        told |= {name: told[name] and Path(told[name]).name for name in ("model", "records")}
        settings = {"method": method, **told, "set": changes}
        run = runs.setdefault(label, {"settings": settings, "points": []})
        if ASIDE | run["settings"] != settings:
            parser.error(f"{label} in {path} is of other settings: {run['settings']}. Give this run a --label.")
        known = run["points"]
        if known and known[-1]["edits"] == args.edits:
            continue

        def save(points: list[dict[str, Any]], run: dict[str, Any] = run, label: str = label) -> None:
            if len(points) >= len(run["points"]):
                run["points"] = points
                write_json(path, content)
                Console().print(f"{label}: {points[-1]}", highlight=False)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditingWarning)  # what is not reached shows in the points
            life = Life(yaml_of(args, method), read | changes, edits, args.asked, args.out, label, args.passes)
            life.run(args.batch_size, args.every, known, save)
    if args.plot:
        plot(runs, args.out / "lifelong.png")


if __name__ == "__main__":
    main()
