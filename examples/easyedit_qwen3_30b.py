"""MoTE on Qwen3-30B-A3B in bfloat16 on one GPU (80 GB) through EasyEdit: 50 CounterFact edits in one batch.

Needs EasyEdit (set EASYEDIT_HOME), the checkpoint, a CounterFact file and a text corpus for the statistics.
Run: python examples/easyedit_qwen3_30b.py /models/Qwen3-30B-A3B counterfact.json corpus.txt
"""

from __future__ import annotations

import sys
from dataclasses import replace

from easyedit_moe import MoTEHyperParams, host
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.facts.records import load_records
from easyedit_moe.host.quality import EasyEditQuality

host.load()

from easyeditor import BaseEditor  # noqa: E402


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    checkpoint, data, corpus = sys.argv[1:]
    hparams = MoTEHyperParams.from_hparams("hparams/MoTE/qwen3-30b-a3b.yaml")
    hparams = replace(hparams, model_name=checkpoint, mom2_dataset=corpus, device="cuda")
    records = load_records(data).records[:50]
    editor = BaseEditor.from_hparams(hparams)
    quality = EasyEditQuality(editor.model, editor.tok, records)
    editor.batch_edit(
        prompts=[record.request.prompt for record in records],
        target_new=[record.request.target_new for record in records],
        ground_truth=[record.request.ground_truth for record in records],
        subject=[record.request.subject for record in records],
        sequential_edit=True,
        verbose=False,
    )
    for name, score in quality.measure("MoTE").items():
        print(f"{name}: {score.mean:.1f} ± {score.stderr:.1f} % (EasyEdit's protocol)")
    scores = evaluate(editor.model, editor.tok, records)
    for name in ("efficacy", "generalisation", "specificity"):
        score = getattr(scores, name)
        print(f"{name}: {score.mean:.1f} ± {score.stderr:.1f} % (the papers' protocol)")


if __name__ == "__main__":
    main()
