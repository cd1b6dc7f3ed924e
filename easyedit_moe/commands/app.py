"""The command ``easyedit-moe``: its subcommands, put together. Heavy packages are imported when a command runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from easyedit_moe import __version__
from easyedit_moe.commands.apply import apply
from easyedit_moe.commands.ask import ask
from easyedit_moe.commands.compare import compare
from easyedit_moe.commands.edit import edit
from easyedit_moe.commands.evaluate import evaluate
from easyedit_moe.commands.export import export
from easyedit_moe.commands.init import init
from easyedit_moe.commands.inspect import inspect
from easyedit_moe.commands.locate import locate
from easyedit_moe.commands.merge import merge
from easyedit_moe.commands.methods import methods
from easyedit_moe.commands.plan import plan
from easyedit_moe.commands.reporting import Commands
from easyedit_moe.commands.revert import revert
from easyedit_moe.commands.statistics import statistics
from easyedit_moe.commands.tables import tables
from easyedit_moe.commands.tune import tune

app = typer.Typer(
    name="easyedit-moe",
    cls=Commands,
    help="Knowledge editing for Mixture-of-Experts language models.",
    epilog="Example: easyedit-moe edit facts.csv --model factworld --out edited",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXAMPLES: dict[Callable[..., None], str] = {
    edit: "Example: easyedit-moe edit facts.csv --model factworld --out edited --save patch,checkpoint",
    init: "Example: easyedit-moe init --model /models/OLMoE-1B-7B --method MoTE -o my.yaml",
    ask: 'Example: easyedit-moe ask "The capital of France is" --patch edited/patch.safetensors',
    inspect: "Example: easyedit-moe inspect edited/patch.safetensors",
    apply: "Example: easyedit-moe apply edited/patch.safetensors --model /models/Qwen3-30B-A3B --out /models/edited",
    revert: "Example: easyedit-moe revert edited/patch.safetensors --model /models/edited --out /models/reverted",
    merge: "Example: easyedit-moe merge monday/patch.safetensors tuesday/patch.safetensors --out both.safetensors",
    export: "Example: easyedit-moe export edited/patch.safetensors --to vllm --model /models/Qwen3-30B-A3B --rank 64",
    statistics: "Example: easyedit-moe statistics --model /models/Qwen3-30B-A3B --method MoTE --stats-dir /data/stats",
    locate: "Example: easyedit-moe locate facts.csv --model /models/Qwen3-30B-A3B --budget 30 --out located",
    compare: "Example: easyedit-moe compare --methods MoTE,Global --edits 20 --out results",
    tables: "Example: easyedit-moe tables 2 5 6 --model factworld --edits 20 --out results/tables",
    tune: "Example: easyedit-moe tune held_out.json --model /models/OLMoE-1B-7B --method MoTE --out tuned --budget 60",
    plan: "Example: easyedit-moe plan --model /models/Qwen3-30B-A3B --method MoTE --edits 1000 --budget 80",
    methods: "Example: easyedit-moe methods --show MoTE/qwen3-30b-a3b",
    evaluate: "Example: easyedit-moe evaluate --model factworld --patch edited/patch.safetensors --data factworld",
}
"""Every command, with the line that its help shows as an example."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"easyedit-moe {__version__}")
        raise typer.Exit


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens; tracebacks of errors.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if verbose and quiet:
        raise typer.BadParameter("-v and -q contradict each other; give one of them.")


for command, example in EXAMPLES.items():
    app.command(epilog=example)(command)


def main() -> None:
    """Entry point of the console script, and of ``python -m easyedit_moe``."""
    app(prog_name="easyedit-moe")
