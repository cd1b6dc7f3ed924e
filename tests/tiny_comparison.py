"""Hparams and records of a comparison on a tiny model, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import TEXTS, requests
from typer.testing import CliRunner

from easyedit_moe.commands.app import app

METHODS = ("MoTE", "MoEEdit-BCD", "Global+speedup")


def tiny_records(count: int = 4) -> list[dict]:
    neighbour = "Thomas Joannes Stieltjes lives in"
    return [
        {
            "requested_rewrite": {
                "prompt": r["prompt"].replace(r["subject"], "{}"),
                "subject": r["subject"],
                "target_new": {"str": r["target_new"]},
                "target_true": {"str": r["ground_truth"]},
            },
            "paraphrase_prompts": [f"We know that {r['prompt']}"],
            "neighborhood_prompts": [neighbour],
        }
        for r in requests(count)
    ]


def tiny_hparams(folder: Path, method: str, **changes: object) -> dict[str, object]:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    values = {
        "alg_name": method, "model_name": "tiny", "layers": [1, 2], "dtype": "float32", "v_num_grad_steps": 3,
        "mom2_dataset": str(corpus), "stats_dir": str(folder / "stats"),
    }  # fmt: skip
    return values | changes


def run_compare(folder: Path, *args: str) -> Any:
    """The command, on what the fixture ``folder`` holds."""
    command = ["compare", "--model", str(folder / "tiny"), "--data", str(folder / "data.json"), "--edits", "4"]
    command += ["--batch-size", "2", "--hparams", str(folder / "hparams"), "--out", str(folder / "out"), *args]
    return CliRunner().invoke(app, command)
