"""Edit one fact of the bundled model, look at what changed, and undo it.

python examples/edit_a_fact.py
"""

from __future__ import annotations

import json
import warnings

from easyedit_moe import MoEEditor
from easyedit_moe.factworld import data_path


def answer(editor: MoEEditor, prompt: str) -> str:
    inputs = editor.tok(prompt, return_tensors="pt")
    written = editor.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return editor.tok.decode(written[0, inputs["input_ids"].shape[1] :]).split(".")[0].strip()


def main() -> None:
    warnings.simplefilter("ignore")
    record = json.loads(data_path("counterfact.json").read_text(encoding="utf-8"))[0]
    rewrite = record["requested_rewrite"]
    prompt, target = rewrite["prompt"].format(rewrite["subject"]), rewrite["target_new"]["str"]
    asked = {
        "the edited prompt": prompt,
        "a paraphrase": record["paraphrase_prompts"][0],
        "a neighbour": record["neighborhood_prompts"][0],
    }
    editor = MoEEditor.from_hparams("MoTE/factworld")
    before = {name: answer(editor, text) for name, text in asked.items()}
    metrics, _, _ = editor.edit(prompt, target, subject=rewrite["subject"], sequential_edit=True)
    for name, text in asked.items():
        print(f"{name:18} {text!r}: {before[name]!r} -> {answer(editor, text)!r}")
    before_after = [metrics[0][phase]["rewrite_acc"] for phase in ("pre", "post")]
    print("token accuracy of the new target, before and after:", *before_after)
    editor.undo()
    print("after undo:", {name: answer(editor, text) for name, text in asked.items()} == before)


if __name__ == "__main__":
    main()
