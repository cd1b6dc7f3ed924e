"""Edit one fact through EasyEdit's BaseEditor, by each of our methods in turn.

Needs EasyEdit: set EASYEDIT_HOME to a clone of https://github.com/zjunlp/EasyEdit.
Run: EASYEDIT_HOME=/path/to/EasyEdit python examples/easyedit_single_edit.py
"""

from __future__ import annotations

from easyedit_moe import host, load_hyperparams
from easyedit_moe.facts.records import load_records

host.load()  # absent packages that text editing never uses do not matter

from easyeditor import BaseEditor  # noqa: E402


def main() -> None:
    record = load_records("factworld").records[0]
    prompt, answer = record.neighbours[0]
    for method in ("MoTE", "MoEEdit-BCD", "Global"):
        editor = BaseEditor.from_hparams(load_hyperparams(f"hparams/{method}/factworld.yaml"))
        metrics, _, _ = editor.edit(
            prompts=[record.request.prompt],
            target_new=[record.request.target_new],
            ground_truth=[record.request.ground_truth],
            subject=[record.request.subject],
            rephrase_prompts=[record.paraphrases[0]],
            locality_inputs={"neighborhood": {"prompt": [prompt], "ground_truth": [answer]}},
            sequential_edit=False,  # the weights are back, bit for bit, once the edit is scored
            verbose=False,
        )
        before, after = metrics[0]["pre"], metrics[0]["post"]
        print(
            f"{method}: {record.request.prompt} -> {record.request.target_new}: rewrite {before['rewrite_acc'][0]:.2f} "
            f"-> {after['rewrite_acc'][0]:.2f}, rephrase {before['rephrase_acc'][0]:.2f} -> "
            f"{after['rephrase_acc'][0]:.2f}, locality {after['locality']['neighborhood_acc'][0]:.2f}"
        )


if __name__ == "__main__":
    main()
