"""Edit 50 facts in one batch through EasyEdit's BaseEditor.batch_edit.

Needs EasyEdit: set EASYEDIT_HOME to a clone of https://github.com/zjunlp/EasyEdit.
Run: EASYEDIT_HOME=/path/to/EasyEdit python examples/easyedit_batch_edit.py
"""

from __future__ import annotations

from statistics import mean

from easyedit_moe import MoTEHyperParams, host
from easyedit_moe.facts.records import load_records

host.load()

from easyeditor import BaseEditor  # noqa: E402


def main() -> None:
    records = load_records("factworld").records[:50]
    editor = BaseEditor.from_hparams(MoTEHyperParams.from_hparams("hparams/MoTE/factworld.yaml"))
    metrics, _, originals = editor.batch_edit(
        prompts=[record.request.prompt for record in records],
        target_new=[record.request.target_new for record in records],
        ground_truth=[record.request.ground_truth for record in records],
        subject=[record.request.subject for record in records],
        rephrase_prompts=[record.paraphrases[0] for record in records],
        verbose=False,
    )
    for phase in ("pre", "post"):
        rewrite = mean(entry[phase]["rewrite_acc"][0] for entry in metrics)
        rephrase = mean(entry[phase]["rephrase_acc"][0] for entry in metrics)
        print(f"{phase}: rewrite {rewrite:.3f}, rephrase {rephrase:.3f}")
    print("Restored:", ", ".join(originals))


if __name__ == "__main__":
    main()
