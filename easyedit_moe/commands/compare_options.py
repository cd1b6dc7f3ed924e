"""Options of ``easyedit-moe compare``."""

from __future__ import annotations

from typing import Annotated

import typer

More = Annotated[
    list[str] | None, typer.Argument(metavar="[METHOD]...", help="More methods, so that --methods A B C works.")
]
Data = Annotated[
    str,
    typer.Option(help="File of records (.json, .jsonl, .csv, .tsv); factworld, factworld-easyedit and neutral ship."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="Methods, ours and EasyEdit's, separated by spaces or commas; all: every one of ours. "
        "Default: that of the YAML file, or five."
    ),
]
Edits = Annotated[int, typer.Option(help="Number of records to edit.")]
Skip = Annotated[int, typer.Option(help="Number of records to leave out at the start.")]
BatchSize = Annotated[int, typer.Option(help="Edits per batch; batches follow each other.")]
HParams = Annotated[
    str | None,
    typer.Option(help="A YAML file of one method, or a folder of <METHOD>/<model>.yaml; default: those that ship."),
]
Out = Annotated[str, typer.Option(help="Folder for results.json, table.md and comparison.png.")]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16; default: that of the hparams.")]
EasyEditMetrics = Annotated[
    bool | None, typer.Option(help="Score by EasyEdit's protocol, too; default: if a method is EasyEdit's.")
]
Seeds = Annotated[
    str,
    typer.Option(help="Seeds, such as 0,1,2: each random method is run by each, and its row is their mean."),
]
Retention = Annotated[
    bool, typer.Option("--retention", help="Score on the way, too: each edit right after its batch, and every batch.")
]
Answers = Annotated[
    bool, typer.Option("--answers", help="Score real answers, too: free generation from the bare prompt, matched.")
]
Judge = Annotated[
    str,
    typer.Option(
        metavar="URL", help="OpenAI-compatible endpoint that judges real answers; its key is read from OPENAI_API_KEY."
    ),
]
JudgeModel = Annotated[str, typer.Option(metavar="NAME", help="Model that judges.")]
Resume = Annotated[
    bool, typer.Option(help="Go on after an interruption: rows of results.json that would come out again are kept.")
]
