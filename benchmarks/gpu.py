"""Everything that is to be known of a run on a GPU, in one script: see ``benchmarks/gpu.sh``.

A stand-in of Qwen3-30B-A3B (random weights, bfloat16), its statistics, target vectors and sequential edits by each
solver, the memory plan beside each measured peak, where the CPU waits for the device, and a profile of the slowest
stage. Random weights say nothing of quality. With ``--scale`` it runs on a CPU. The JSON is written after each stage
and says which are complete; after ``--minutes`` no stage is begun, and those that were left out are named.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers as hf
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.end_to_end import requests
from benchmarks.gpu_model import LAYERS, StandIn
from benchmarks.harness import machine, measured, source
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

SCHEMA = 2
METHODS = "Global,MoEEdit-BCD,MoTE"
PREPARED = ("statistics", "metric", "basis")
FILES = {"statistics": "layer*.safetensors", "metric": "nullspace-*.safetensors"}
"""Stage -> the files that methods share."""
PEAK = "peak of {} edits against the model's bytes"
ROOM = 0.1
"""Share of the model's bytes that 1000 edits may take beyond them."""


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
    minutes: float


@dataclass
class Report:
    """What is known so far, in a file that is whole whenever the script is killed.

    Attributes:
        path: the file.
        content: all of it but for how far the script is.
        end: `time.monotonic` after which no stage is begun.
        complete, left_out: names of stages.
    """

    path: Path
    content: dict[str, Any]
    end: float
    complete: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def write(self, under_way: str | None = None) -> Path:
        """Replace the file."""
        state = {"complete": self.complete, "under way": under_way, "left out": self.left_out}
        return write_json(self.path, {**self.content, **state})

    def stage(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a stage and write what it found; None, and its name among those left out, where time is up."""
        if time.monotonic() >= self.end:
            self.left_out.append(name)
            self.write()
            return None
        self.write(name)
        result = run()
        self.complete.append(name)
        self.write()
        return result


@dataclass
class Bench:
    """The model, what is asked of it, and what was measured so far."""

    options: Options
    stats: str
    tok: Any
    model: hf.PreTrainedModel
    report: Report
    again: dict[str, Callable[[], Any]] = field(default_factory=dict)
    """Stage -> a short run of it, for the profile."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the stages that were measured."""
        rows: list[dict[str, Any]] = self.report.content["stages"]
        return rows

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

    def stage(
        self,
        name: str,
        run: Callable[[], Any],
        planned: int,
        short: Callable[[], Any],
        note: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> None:
        """Measure one stage, and where the CPU waits in a short run of it.

        The row is in the file, with what ``note`` puts into it, before the short run begins.
        """
        found = measured(run)
        row: dict[str, Any] = {
            "stage": name, "seconds": found.seconds, "peak bytes beyond before": found.peak, "planned bytes": planned,
        }  # fmt: skip
        self.rows.append(row)
        note(row)
        self.again[name] = short
        self.report.write(name)
        with counted_syncs(self.options.device) as syncs:
            short()
        row |= {"syncs in a short run": sum(syncs.values()), "syncs by place": dict(syncs.most_common(10))}


def run(options: Options, out: Path) -> Path:
    """Measure stage by stage, and write after each; the file."""
    begun = time.monotonic()
    content: dict[str, Any] = {
        "schema": SCHEMA, "source": source(), "machine": machine(),
        "options": {**vars(options), "methods": list(options.methods)},
        "model": None, "stages": [], "peaks": [], "profile": None,
    }  # fmt: skip
    report = Report(out, content, begun + 60 * options.minutes)
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    stand_in = StandIn(options.scale, options.layers, options.device, len(tok))
    with tempfile.TemporaryDirectory() as stats, warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)  # random weights: thin coverage and missed targets are expected
        model = report.stage("model", lambda: _built(stand_in, content))
        if model is None:
            report.left_out = _names(options)
        else:
            _stages(Bench(options, stats, tok, model, report))
    return report.write()


def _names(options: Options) -> list[str]:
    """All stages, in the order in which they run."""
    each = [f"{method}: {what}" for method in options.methods for what in ("prepare", "edits, z ready")]
    return ["model", "targets", *each, "profile"]


def _built(stand_in: StandIn, content: dict[str, Any]) -> hf.PreTrainedModel:
    found = measured(stand_in.build)
    config = found.result.config
    content["model"] = {
        "weights": "random", "layers": config.num_hidden_layers, "experts": config.num_experts,
        "experts per token": config.num_experts_per_tok, "d": config.hidden_size, "h": config.moe_intermediate_size,
        "bytes": sum(p.nbytes for p in found.result.parameters()), "seconds to build": found.seconds,
        "peak bytes to build": found.peak,
    }  # fmt: skip
    return found.result


def _stages(bench: Bench) -> None:
    """Every stage after the model, as long as there is time."""
    report, facts = bench.report, requests(bench.options.edits)
    targets = report.stage("targets", lambda: _targets(bench, facts))
    for method in bench.options.methods:
        report.stage(f"{method}: prepare", partial(_prepared, bench, method))
        report.stage(f"{method}: edits, z ready", partial(_edited, bench, method, facts, targets))
    report.stage("profile", partial(_profiled, bench))


def _profiled(bench: Bench) -> None:
    slowest = max(bench.rows, key=lambda row: float(row["seconds"]))["stage"]
    found = _profile(bench.again[slowest], bench.options.device)
    bench.report.content["profile"] = {"stage": slowest, "operations": found}


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
    found: list[TargetVectors] = []
    bench.stage("targets", lambda: found.extend(map(find, batches)), planned, lambda: find(batches[0]))
    return found


def _prepared(bench: Bench, method: str) -> None:
    """Statistics where no earlier method collected them, and what is made of them."""
    hparams = bench.hparams(method)
    stages = [stage for stage in _plan(bench, hparams).stages if stage.name in PREPARED]
    there = _cached(Path(bench.stats))
    planned = _peak([replace(stage, working=0) if stage.name in there else stage for stage in stages])

    def prepare() -> None:
        make_editor(hparams, progress=False).prepare(bench.model, bench.tok)

    def anew() -> None:
        with tempfile.TemporaryDirectory() as folder:
            few = bench.hparams(method, stats_dir=folder, mom2_n_samples=min(64, bench.options.texts))
            make_editor(few, progress=False).prepare(bench.model, bench.tok)

    bench.stage(f"{method}: prepare", prepare, planned, anew, lambda row: row.update({"read from files": there}))


def _cached(folder: Path) -> list[str]:
    """Stages of which earlier methods left files: they are read then, and nothing is computed beside what is kept."""
    return [stage for stage, files in FILES.items() if any(folder.rglob(files))]


def _edited(bench: Bench, method: str, facts: list[EditRequest], targets: list[TargetVectors]) -> None:
    """All edits in batches, each on the ones before, and then put back."""
    hparams, size = bench.hparams(method), bench.options.batch_size
    editor = make_editor(hparams, progress=False)
    prepared = measured(lambda: editor.prepare(bench.model, bench.tok)).left
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

    def note(row: dict[str, Any]) -> None:
        times = {f"seconds of {stage}": value for stage, value in seconds.items() if value}
        row |= {"edits": len(facts), "batch": size, **times}
        bench.report.content["peaks"].append(_peak_row(bench, method, len(facts), prepared, row))

    bench.stage(name, lambda: edit(len(targets)), planned, lambda: edit(1), note)


def _peak_row(bench: Bench, method: str, edits: int, prepared: int, row: dict[str, Any]) -> dict[str, Any]:
    """The measured peak of all edits, with the model and what was prepared for them, over the model's bytes."""
    model = bench.report.content["model"]["bytes"]
    peak = model + prepared + row["peak bytes beyond before"]
    before = [one for one in bench.rows if one["stage"] in ("targets", f"{method}: prepare")]
    whole = max([peak, *(model + one["peak bytes beyond before"] for one in before)])
    return {
        "what": PEAK.format(edits), "method": method, "model bytes": model, "prepared bytes": prepared,
        "peak bytes": peak, "peak / model": peak / model, "with targets and preparation / model": whole / model,
        "within": whole <= (1 + ROOM) * model,
    }  # fmt: skip


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
    minutes: Annotated[float, typer.Option(help="After these no stage is begun.", min=0)] = 8.0,
    out: Annotated[Path, typer.Option(help="The JSON file.")] = Path("gpu.json"),
) -> None:
    """Measure, and write a JSON file after each stage."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("There is no GPU; --device cpu --scale 16 runs everywhere.", param_hint="device")
    chosen = tuple(methods.split(","))
    options = Options(device, scale, layers, edits, batch_size, texts, steps or None, chosen, minutes)
    typer.echo(f"Written: {run(options, out)}")


if __name__ == "__main__":
    typer.run(main)
