"""Everything that is to be known of a run on a GPU, in one script: see ``benchmarks/gpu.sh``.

A stand-in of Qwen3-30B-A3B (random weights, bfloat16), its statistics, target vectors and sequential edits by each
solver, the memory plan beside each measured peak, where the CPU waits for the device, and a profile of the slowest
stage. Random weights say nothing of quality. With ``--scale`` it runs on a CPU.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as hf
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.end_to_end import requests
from benchmarks.gpu_model import LAYERS, StandIn
from benchmarks.harness import machine, peak_of
from benchmarks.syncs import counted_syncs
from easyedit_moe import factworld
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.planner import MemoryPlan, plan
from easyedit_moe.editors.stages import Stage
from easyedit_moe.errors import EditingWarning
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe.holding import intact
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.patches.applied_run import AppliedRun
from easyedit_moe.storage.strict_json import write_json
from easyedit_moe.targets.search import TargetVectors, compute_targets

SCHEMA = 1
METHODS = "Global,MoEEdit-BCD,MoTE"
PREPARED = ("statistics", "metric", "basis")


@dataclass(frozen=True)
class Options:
    """As on the command line."""

    device: str
    scale: int
    layers: int
    edits: int
    batch_size: int
    texts: int
    steps: int | None
    methods: tuple[str, ...]


@dataclass
class Bench:
    """The model, what is asked of it, and what was measured so far."""

    options: Options
    stats: str
    tok: Any
    model: hf.PreTrainedModel
    rows: list[dict[str, Any]] = field(default_factory=list)
    again: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Stage -> a short run of it, for the profile."""

    def hparams(self, method: str, **changes: Any) -> Any:
        """The method's settings that ship for the model; at the layers that a smaller stand-in has."""
        options = self.options
        values: dict[str, Any] = {
            "device": options.device, "stats_dir": self.stats, "mom2_dataset": "factworld", "dtype": "bfloat16",
            "mom2_n_samples": options.texts, "batch_size": options.batch_size, "max_length": 512,
        }  # fmt: skip
        if options.steps is not None:
            values["v_num_grad_steps"] = options.steps
        if self.model.config.num_hidden_layers < 10:
            values["layers"] = [1, 2]
        if method == "MoTE" and options.scale > 1:
            values |= {"rank_expert": 0.5, "rank_out": 0.25, "rank_in": 0.33}
        return load_hyperparams(f"{method}/qwen3-30b-a3b", **(values | changes))

    def stage(self, name: str, run: Callable[[], Any], planned: int, short: Callable[[], Any]) -> Any:
        """Measure one stage, and where the CPU waits in a short run of it."""
        seconds, peak, result = peak_of(run)
        self.again[name] = short
        with counted_syncs(self.options.device) as syncs:
            short()
        self.rows.append(
            {
                "stage": name, "seconds": seconds, "peak bytes beyond before": peak, "planned bytes": planned,
                "syncs in a short run": sum(syncs.values()), "syncs by place": dict(syncs.most_common(10)),
            }
        )  # fmt: skip
        return result


def run(options: Options) -> dict[str, Any]:
    """All measurements as JSON."""
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    stand_in = StandIn(options.scale, options.layers, options.device, len(tok))
    with tempfile.TemporaryDirectory() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)  # random weights: thin coverage and missed targets are expected
        seconds, peak, model = peak_of(stand_in.build)
        bench = Bench(options, stats, tok, model)
        facts = requests(options.edits)
        targets = _targets(bench, facts)
        for method in options.methods:
            _prepared(bench, method)
            _edited(bench, method, facts, targets)
        slowest = max(bench.rows, key=lambda row: float(row["seconds"]))["stage"]
        found = _profile(bench.again[slowest], options.device)
    config = model.config
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "options": {**vars(options), "methods": list(options.methods)},
        "model": {
            "weights": "random", "layers": config.num_hidden_layers, "experts": config.num_experts,
            "experts per token": config.num_experts_per_tok, "d": config.hidden_size,
            "h": config.moe_intermediate_size, "bytes": sum(p.nbytes for p in model.parameters()),
            "seconds to build": seconds, "peak bytes to build": peak,
        },
        "stages": bench.rows,
        "profile": {"stage": slowest, "operations": found},
    }  # fmt: skip


def _plan(bench: Bench, hparams: Any, batches: int = 1) -> MemoryPlan:
    size = min(bench.options.batch_size, bench.options.edits)
    shapes = shapes_of(bench.model, hparams.layers)
    return plan(shapes, hparams, edits=size, device=torch.device(bench.options.device).type, batches=batches)


def _peak(stages: Sequence[Stage]) -> int:
    """Bytes at the peak of some stages of a plan, beyond what was there before them."""
    held = peak = 0
    for stage in stages:
        peak, held = max(peak, held + stage.kept + stage.working), held + stage.kept
    return peak


def _targets(bench: Bench, facts: list[EditRequest]) -> list[TargetVectors]:
    """Of every batch, at the unedited weights: "z ready" for the solvers."""
    hparams = bench.hparams("Global", metric="identity")
    editor, view = make_editor(hparams), MoELayerView(bench.model)
    size = bench.options.batch_size

    def find(some: list[EditRequest]) -> TargetVectors:
        return compute_targets(view, bench.tok, some, *editor.target_settings(), False, warn=False)

    batches = [facts[start : start + size] for start in range(0, len(facts), size)]
    stages = {stage.name: stage for stage in _plan(bench, hparams).stages}
    planned = stages["targets"].kept + stages["targets"].working
    found = bench.stage("targets", lambda: [find(batch) for batch in batches], planned, lambda: find(batches[0]))
    return list(found)


def _prepared(bench: Bench, method: str) -> None:
    """Statistics where no earlier method collected them, and what is made of them."""
    hparams = bench.hparams(method)
    planned = _peak([stage for stage in _plan(bench, hparams).stages if stage.name in PREPARED])

    def prepare() -> None:
        make_editor(hparams, progress=False).prepare(bench.model, bench.tok)

    def anew() -> None:
        with tempfile.TemporaryDirectory() as folder:
            few = bench.hparams(method, stats_dir=folder, mom2_n_samples=min(64, bench.options.texts))
            make_editor(few, progress=False).prepare(bench.model, bench.tok)

    bench.stage(f"{method}: prepare", prepare, planned, anew)


def _edited(bench: Bench, method: str, facts: list[EditRequest], targets: list[TargetVectors]) -> None:
    """All edits in batches, each on the ones before, and then put back."""
    hparams, size = bench.hparams(method), bench.options.batch_size
    editor = make_editor(hparams, progress=False)
    editor.prepare(bench.model, bench.tok)
    seconds: dict[str, float] = {}

    def edit(batches: int) -> None:
        memory = None
        with _put_back(bench.model) as run:
            for number, given in enumerate(targets[:batches]):
                batch = facts[number * size : (number + 1) * size]
                result = editor.edit(bench.model, bench.tok, batch, memory, given)
                memory = result.memory
                run.add(result.patch)
                for stage, value in result.seconds.items():
                    seconds[stage] = seconds.get(stage, 0.0) + value

    stages = _plan(bench, hparams, len(targets)).stages
    planned = _peak([stage for stage in stages if stage.name not in (*PREPARED, "targets")])
    name = f"{method}: edits, z ready"
    times: dict[str, float] = {}

    def all_batches() -> None:
        edit(len(targets))
        times.update({f"seconds of {stage}": value for stage, value in seconds.items() if value})

    bench.stage(name, all_batches, planned, lambda: edit(1))
    bench.rows[-1] |= {"edits": len(facts), "batch": size, **times}


@contextmanager
def _put_back(model: hf.PreTrainedModel) -> Iterator[AppliedRun]:
    with intact(model) as hold:
        run = AppliedRun(model, hold)
        yield run
        run.restore()


def _profile(short: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """The ten operations that a short run of a stage spends most time in, on the device and on the CPU."""
    cuda = torch.device(device).type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as found:
        short()
    rows = [
        {
            "operation": event.key, "calls": event.count, "cpu seconds": event.self_cpu_time_total / 1e6,
            "device seconds": event.self_device_time_total / 1e6,
        }
        for event in found.key_averages()
    ]  # fmt: skip
    rows.sort(key=lambda row: -float(row["device seconds" if cuda else "cpu seconds"]))
    return rows[:10]


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda",
    scale: Annotated[int, typer.Option(help="What width, experts and heads are divided by.", min=1)] = 1,
    layers: Annotated[int, typer.Option(help="Decoder layers; fewer where they don't fit.", min=3)] = LAYERS,
    edits: Annotated[int, typer.Option(min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 50,
    texts: Annotated[int, typer.Option(help="Texts of the statistics.", min=1)] = 2000,
    steps: Annotated[int, typer.Option(help="Of the search of targets; 0: as shipped.", min=0)] = 0,
    methods: Annotated[str, typer.Option(help="Solvers, with commas between.")] = METHODS,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("gpu.json"),
) -> None:
    """Measure, and write a JSON file."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("There is no GPU; --device cpu --scale 16 runs everywhere.", param_hint="device")
    options = Options(device, scale, layers, edits, batch_size, texts, steps or None, tuple(methods.split(",")))
    typer.echo(f"Written: {write_json(out, run(options))}")


if __name__ == "__main__":
    typer.run(main)
