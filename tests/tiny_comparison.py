"""Hparams and records of a comparison on a tiny model, for tests."""

from __future__ import annotations

from pathlib import Path

from tiny import TEXTS, requests


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
