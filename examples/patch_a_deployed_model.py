"""Make a patch on one machine, apply it on another, and take it back: 50 facts in one file.

python examples/patch_a_deployed_model.py --out patch.safetensors
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from easyedit_moe import WeightPatch, load_hyperparams, load_model, make_editor
from easyedit_moe.evaluation.metrics import evaluate
from easyedit_moe.facts.records import load_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="patch.safetensors")
    out = Path(parser.parse_args().out)
    warnings.simplefilter("ignore")
    records = load_records("factworld").records[:50]

    hparams = load_hyperparams("Global/factworld")
    model, tok = load_model("factworld", hparams.dtype)
    result = make_editor(hparams).edit(model, tok, [record.request for record in records])
    result.patch.save(out)
    print(f"wrote {out}, {out.stat().st_size / 2**20:.1f} MiB, layers {result.patch.layers}")

    deployed, _ = load_model("factworld", hparams.dtype)
    untouched = {name: p.clone() for name, p in deployed.named_parameters()}
    patch = WeightPatch.load(out)
    for report in patch.apply(deployed):
        print(f"layer {report.layer}: {report.experts} experts, rounding lost {report.rounding_loss:.1e} of the update")
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), deployed.parameters(), strict=True))
    print("bit-equal to the model it was made on:", same)
    print("efficacy:", f"{evaluate(deployed, tok, records).efficacy.mean:.0f} %")
    patch.revert(deployed)
    print("reverted bit-exactly:", all(torch.equal(untouched[n], p) for n, p in deployed.named_parameters()))


if __name__ == "__main__":
    main()
