"""What `benchmarks.versions` times, with whichever ``easyedit_moe`` is on the path: a row of figures, as JSON.

A random Qwen3-MoE of an eighth of Qwen3-30B-A3B's widths with all 128 experts and 8 of its 48 layers, five of them
edited. Only what both versions have is used of the package, and nothing else of this one.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import random
import resource
import string
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from easyedit_moe import factworld, load_hyperparams
from easyedit_moe.editors import make_editor
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.targets.search import TargetVectors

CONFIG: dict[str, Any] = {
    "hidden_size": 256, "moe_intermediate_size": 96, "intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "norm_topk_prob": True, "num_hidden_layers": 8, "max_position_embeddings": 4096,
}  # fmt: skip
RANKS = {"rank_expert": 64, "rank_out": 64, "rank_in": 32}
TEXTS, WORDS = 60, 200


def words(draw: random.Random, count: int) -> str:
    """Of two to five letters."""
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 5))) for _ in range(count))


def facts(count: int) -> list[EditRequest]:
    """Different subjects, ten prompts, twenty targets."""
    draw = random.Random(0)
    prompts, targets = [words(draw, 3) for _ in range(10)], [words(draw, 1) for _ in range(20)]
    subjects = [f"{words(draw, 1)}{n} {words(draw, 1)}" for n in range(count)]
    rows = [
        {"prompt": f"The {draw.choice(prompts)} of {one} is", "subject": one, "target_new": draw.choice(targets)}
        for one in subjects
    ]
    return parse_requests(rows)


def shifts(count: int, width: int, draw: torch.Generator) -> TargetVectors:
    """Target vectors that need no search."""
    nothing = torch.zeros(count)
    return TargetVectors(torch.randn(count, width, generator=draw) * 0.1, nothing, nothing, nothing > 0, nothing.long())


def resident() -> int:
    """Bytes that this process holds now."""
    fields = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(fields[1]) * resource.getpagesize()


def seconds_of(work: Any) -> tuple[float, Any]:
    """How long it took, and what it gave."""
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def keeper(model: Any, stack: ExitStack) -> Callable[[Any], None]:
    """Keeps patches as a version's editor does: one way back for all of them, or each with its own."""
    kept: list[Any] = []
    if importlib.util.find_spec("easyedit_moe.patches.applied_run") is None:
        return kept.append
    holding = importlib.import_module("easyedit_moe.moe.holding")
    applied = importlib.import_module("easyedit_moe.patches.applied_run")
    add: Callable[[Any], None] = applied.AppliedRun(model, stack.enter_context(holding.intact(model))).add
    return add


def row(method: str, remember: bool, edits: int, batch: int, single: int, folder: Path) -> dict[str, Any]:
    """Seconds of each stage, and resident memory after the first and the last edit; the patches of all are kept."""
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(**CONFIG, vocab_size=len(tok))
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    corpus, draw = folder / "corpus.txt", random.Random(1)
    corpus.write_text("\n".join(words(draw, WORDS) for _ in range(TEXTS)), encoding="utf-8")
    values = {
        "device": "cpu", "dtype": "bfloat16", "layers": [2, 3, 4, 5, 6], "stats_dir": str(folder / "stats"),
        "mom2_dataset": str(corpus), "mom2_n_samples": TEXTS, "coverage_target": None, "nullspace_relative": True,
        "nullspace_threshold": 0.1, "context_prefixes": [], "remember_edits": remember, "v_num_grad_steps": 10,
        "early_stop_loss": 0.0, **(RANKS if method == "MoTE" else {}),
    }  # fmt: skip
    hparams = load_hyperparams(f"{method}/qwen3-30b-a3b", **values)
    asked, given = facts(edits + single), torch.Generator().manual_seed(0)
    cold, _ = seconds_of(lambda: make_editor(hparams, progress=False).prepare(model, tok))
    editor = make_editor(hparams, progress=False)
    warm, _ = seconds_of(lambda: editor.prepare(model, tok))
    search, tried = seconds_of(lambda: editor.edit(model, tok, asked[:batch]))
    tried.patch.revert(model)
    del tried
    memory, took, held = None, [], []
    starts = [(n, batch) for n in range(0, edits, batch)] + [(edits + n, 1) for n in range(single)]
    with ExitStack() as stack:
        keep = keeper(model, stack)
        for start, size in starts:
            targets = shifts(size, CONFIG["hidden_size"], given)
            taken, result = seconds_of(
                lambda s=start, z=targets, m=memory, n=size: editor.edit(model, tok, asked[s : s + n], m, z)
            )
            keep(result.patch)
            memory = result.memory
            took.append(taken)
            gc.collect()
            held.append(resident())
    made = edits // batch
    return {
        "prepare": cold, "prepare, cached": warm, "a batch with its search of targets": search,
        "batches, z ready": sum(took[:made]), "first batch": took[0], "last batch": took[made - 1],
        "single edits, z ready": sum(took[made:]), "resident after the first": held[0],
        "resident after the last": held[-1],
    }  # fmt: skip


def main() -> None:
    """Print the row of the method that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--remember", action="store_true")
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--single", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # random weights: thin coverage and missed targets
    found = row(args.method, args.remember, args.edits, args.batch, args.single, args.folder)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
