"""Edit 100 facts in two sequential batches through EasyEdit, then score all of them after both (retention).

EasyEdit's own sequential loop scores each batch right after it was written; what is left of the first batch after the
second shows only in the scores at the end.

Needs EasyEdit: set EASYEDIT_HOME to a clone of https://github.com/zjunlp/EasyEdit.
Run: EASYEDIT_HOME=/path/to/EasyEdit python examples/easyedit_sequential_batches.py
"""

from __future__ import annotations

from statistics import mean

from easyedit_moe import MoTEHyperParams, host
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.facts.records import load_records
from easyedit_moe.host.quality import EasyEditQuality

host.load()

from easyeditor import BaseEditor  # noqa: E402


def main() -> None:
    records = load_records("factworld").records[:100]
    editor = BaseEditor.from_hparams(MoTEHyperParams.from_hparams("hparams/MoTE/factworld.yaml"))
    quality = EasyEditQuality(editor.model, editor.tok, records)
    metrics, model, _ = editor.batch_edit(
        prompts=[record.request.prompt for record in records],
        target_new=[record.request.target_new for record in records],
        ground_truth=[record.request.ground_truth for record in records],
        subject=[record.request.subject for record in records],
        sequential_edit=True,  # the second batch of 50 is written on top of the first
        verbose=False,
    )
    print(f"rewrite_acc right after each batch: {mean(entry['post']['rewrite_acc'][0] for entry in metrics):.3f}")
    print("EasyEdit's protocol after both batches:")
    for name, score in quality.measure("MoTE").items():
        if score.count:
            print(f"  {name}: {score.mean:.1f} ± {score.stderr:.1f} %")
    scores = evaluate(model, editor.tok, records)
    print("The papers' protocol after both batches:")
    for name in ("efficacy", "generalisation", "specificity"):
        score = getattr(scores, name)
        print(f"  {name}: {score.mean:.1f} ± {score.stderr:.1f} %")


if __name__ == "__main__":
    main()
