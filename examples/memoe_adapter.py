"""MEMoE on the bundled model: what anchors, the null embedding and replay do; then an adapter that is saved and loaded.

python examples/memoe_adapter.py --variants all --save results/adapter
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from easyedit_moe import MoEAdapter, attach, detach, load_hyperparams, load_model, make_editor
from easyedit_moe.adapters.attachment import find_adapter
from easyedit_moe.adapters.moe_adapter import recorded_routing
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.facts.anchors import SubjectMatcher
from easyedit_moe.facts.records import load_records
from easyedit_moe.facts.tokens import encode_text

VARIANTS: dict[str, dict[str, object]] = {
    "as shipped": {},
    "null embedding without a match": {"without_anchor": "null"},
    "no anchors": {"use_anchors": False, "without_anchor": "null"},
    "routed by the anchor alone": {"token_weight": 0.0},
    "no replay": {"replay": False},
    "no locality term": {"locality_weight": 0.0},
}


def routed_alike(model, tok, records) -> float:
    """Percent of facts of which all phrasings end in tokens that go to the same experts."""
    alike = 0
    for record in records:
        experts = set()
        for prompt in (record.request.prompt, *record.paraphrases):
            with recorded_routing(find_adapter(model)) as seen, torch.no_grad():
                model(input_ids=torch.tensor([encode_text(tok, prompt)]))
            experts.add(tuple((seen[0].gates[-1] > 0).tolist()))
        alike += len(experts) == 1
    return 100 * alike / len(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default="as shipped", help="names separated by commas, or all")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--save", help="folder for the adapter of the first variant")
    args = parser.parse_args()
    names = list(VARIANTS) if args.variants == "all" else [name.strip() for name in args.variants.split(",")]
    records = load_records("factworld").records[args.skip : args.skip + args.edits]
    model, tok = load_model("factworld", "float32")
    console = Console(width=120)
    table = Table("variant", "efficacy", "generalisation", "specificity", "unrecognised", "routed alike", "seconds")
    for number, name in enumerate(names):
        editor = make_editor(load_hyperparams("MEMoE/factworld", **VARIANTS[name]))
        start = time.perf_counter()
        for at in range(0, len(records), args.batch_size):
            editor.edit(model, tok, [record.request for record in records[at : at + args.batch_size]])
        seconds = time.perf_counter() - start
        scores = evaluate(model, tok, records)
        alike = routed_alike(model, tok, records)
        if args.save and number == 0:
            find_adapter(model).save(args.save)
        adapter = find_adapter(model)
        # What is left of the edits where no subject is recognised, as with a misspelt name.
        adapter.matcher = SubjectMatcher(tok, ())
        unrecognised = evaluate(model, tok, records).efficacy
        detach(model)
        row = [f"{s.mean:.1f} ± {s.stderr:.1f}" for s in (scores.efficacy, scores.generalisation, scores.specificity)]
        table.add_row(name, *row, f"{unrecognised.mean:.1f}", f"{alike:.0f} %", f"{seconds:.0f}")
        console.print("done:", name, *row, f"{unrecognised.mean:.1f}", f"{alike:.0f} %", highlight=False)
    console.print(table)
    if args.save:
        attach(model, tok, MoEAdapter.load(args.save))
        request = records[0].request
        inputs = tok(request.prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        print(f"{tok.decode(out[0], skip_special_tokens=True)!r} (edited to {request.target_new!r})")


if __name__ == "__main__":
    main()
