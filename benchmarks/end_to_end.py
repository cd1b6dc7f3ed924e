"""Sequential batches of edits, as users run them: on a random model of a real shape (CUDA), or of a scaled one (CPU).

Weights are drawn at random, so no score means anything; time and memory do. With "z ready" the target vectors are
given, as in the papers' tables; statistics are collected beforehand, and timed apart.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedTokenizerBase

from benchmarks.harness import peak_of, timed
from benchmarks.shapes import MODELS
from easyedit_moe import factworld
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.planner import plan
from easyedit_moe.errors import EditingWarning
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.hparams import SolverHyperParams, load_hyperparams
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.shapes import shapes_of
from easyedit_moe.patches.weights import WeightPatch
from easyedit_moe.targets.search import TargetVectors

PUBLISHED = {
    "qwen3-30b-a3b": {"MoEEdit-BCD": 477.0, "BCD+speedup": 104.6, "Global+speedup": 81.6, "MoTE": 76.8},
    "gpt-oss-20b": {"MoEEdit-BCD": 469.2, "BCD+speedup": 123.9, "Global+speedup": 100.8, "MoTE": 88.9},
    "qwen3.6-35b-a3b": {"MoEEdit-BCD": 717.4, "BCD+speedup": 208.0, "Global+speedup": 121.0, "MoTE": 112.5},
}
"""Seconds of 1000 CounterFact edits in batches of 50, z ready, on one H200 (MoTE paper, table 2)."""


@dataclass(frozen=True)
class Options:
    """On a CPU the model is scaled down and ``edits_with_targets`` are as few as one batch."""

    model: str = "qwen3-30b-a3b"
    methods: str = "MoTE,MoEEdit-BCD,Global,Global+speedup,BCD+speedup"
    methods_with_targets: str = "MoTE"
    edits: int = 1000
    edits_with_targets: int = 1000
    batch_size: int = 50
    texts: int = 400
    device: str = "cpu"
    quick: bool = False


def run(options: Options) -> list[dict[str, Any]]:
    """One row per method with z ready, then rows with z included."""
    tok = hf.AutoTokenizer.from_pretrained(str(factworld.model_path()))
    scaled = options.device == "cpu"
    size = 6 if options.quick else options.batch_size
    edits = 2 * size if options.quick else options.edits
    model = random_model(options.model, options.device, scaled, len(tok))
    rows = []
    with tempfile.TemporaryDirectory() as stats:
        for method in options.methods.split(","):
            hparams = _hparams(method, options, scaled, stats)
            rows.append(_edit(model, tok, hparams, requests(edits), size, options, ready=True))
        count = size if options.quick or scaled else options.edits_with_targets
        for method in options.methods_with_targets.split(","):
            hparams = _hparams(method, options, scaled, stats)
            rows.append(_edit(model, tok, hparams, requests(count), size, options, ready=False))
    return rows


def random_model(name: str, device: str, scaled: bool, vocabulary: int) -> hf.PreTrainedModel:
    """A randomly initialised model: of the real shape in bfloat16, or Qwen3-MoE scaled down in float32."""
    if scaled:
        config = hf.Qwen3MoeConfig(
            vocab_size=vocabulary, hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, intermediate_size=256, moe_intermediate_size=96, num_experts=32, num_experts_per_tok=4,
        )  # fmt: skip
    else:
        config = _real_config(name)
    torch.manual_seed(0)
    with torch.device(device):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32 if scaled else torch.bfloat16)
    return model.eval()


def _real_config(name: str) -> hf.PretrainedConfig:
    shape = MODELS[name]
    if name == "gpt-oss-20b":
        return hf.GptOssConfig(num_hidden_layers=24, num_local_experts=shape.experts, num_experts_per_tok=shape.active)
    common = {
        "hidden_size": shape.d_model, "moe_intermediate_size": shape.d_hidden, "num_experts": shape.experts,
        "num_experts_per_tok": shape.active,
    }  # fmt: skip
    if name == "qwen3-30b-a3b":
        return hf.Qwen3MoeConfig(
            **common, vocab_size=151936, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
            head_dim=128, intermediate_size=6144,
        )  # fmt: skip
    return hf.Qwen3_5MoeTextConfig(
        **common, vocab_size=248320, num_hidden_layers=40, num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        shared_expert_intermediate_size=512,
    )  # fmt: skip


def requests(count: int) -> list[EditRequest]:
    """``count`` different facts: the bundled records' prompts and targets, with their subjects' names recombined.

    Raises:
        ValueError: more than the names allow.
    """
    records = json.loads(factworld.data_path("counterfact.json").read_text(encoding="utf-8"))
    facts = parse_requests(records)
    names = [fact.subject.partition(" ") for fact in facts]
    if count > len(facts) * (len(facts) - 1):
        raise ValueError(f"There are names for {len(facts) * (len(facts) - 1)} requests; {count} were asked for.")
    made = []
    for i in range(count):
        fact, turn = facts[i % len(facts)], i // len(facts)
        subject = f"{names[i % len(facts)][0]} {names[(i + turn) % len(facts)][2]}"
        prompt = fact.prompt.replace(fact.subject, subject)
        made.append({"prompt": prompt, "subject": subject, "target_new": fact.target_new})
    return parse_requests(made)


def _hparams(method: str, options: Options, scaled: bool, stats: str) -> SolverHyperParams:
    values: dict[str, Any] = {
        "device": options.device, "stats_dir": stats, "mom2_dataset": "factworld",
        "mom2_n_samples": 40 if options.quick else options.texts, "batch_size": options.batch_size,
    }  # fmt: skip
    if scaled:
        values |= {"layers": [2, 3, 4], "dtype": "float32", "max_length": 128}
        if method == "MoTE":
            values |= {"rank_expert": 0.5, "rank_out": 0.25, "rank_in": 0.33}
    if options.quick:
        values |= {"v_num_grad_steps": 2}
    return load_hyperparams(f"{method}/{options.model}", **values)


def _edit(
    model: hf.PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: SolverHyperParams,
    facts: list[EditRequest],
    size: int,
    options: Options,
    ready: bool,
) -> dict[str, Any]:
    editor = make_editor(hparams)
    seconds = dict.fromkeys(("targets", "solve", "write"), 0.0)
    layout = MoELayerView(model).layers[hparams.layers[-1]].experts.layout

    def edit() -> None:
        patch: WeightPatch | None = None
        memory, draw = None, torch.Generator().manual_seed(0)
        try:
            for start in range(0, len(facts), size):
                batch, targets = facts[start : start + size], None
                if ready:
                    shift = torch.randn(len(batch), layout.d_model, generator=draw) * 0.1
                    nothing = torch.zeros(len(batch))
                    targets = TargetVectors(shift.to(model.device), nothing, nothing, nothing.bool(), nothing.long())
                result = editor.edit(model, tok, batch, memory, targets)
                memory = result.memory
                for stage in seconds:
                    seconds[stage] += result.seconds.get(stage, 0.0)
                # One patch of all batches keeps each expert's first original only.
                patch = result.patch if patch is None else WeightPatch.concat([patch, result.patch])
        finally:
            if patch is not None:
                patch.restore(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditingWarning)  # random weights: thin coverage and missed targets are expected
        prepare, _ = timed(lambda: editor.prepare(model, tok))
        edit()
        told = dict(seconds)
        _, peak, _ = peak_of(edit)  # again, as to note every block takes time
    planned = plan(
        shapes_of(model, hparams.layers), hparams, edits=size, device=options.device, batches=-(-len(facts) // size)
    )
    scaled = options.device == "cpu"
    row = {
        "benchmark": "end to end", "model": "scaled" if scaled else options.model, "device": options.device,
        "method": hparams.alg_name, "z": "ready" if ready else "included", "edits": len(facts), "batch": size,
        "layers": f"{hparams.layers[0]}-{hparams.layers[-1]}", "statistics": prepare, **told,
        "total without statistics": sum(told.values()), "peak bytes beyond before": peak,
        "planned": planned.editing_peak,
    }  # fmt: skip
    if ready and not scaled:  # of the papers' shape: beside a scaled model it would say nothing
        row[f"published for {options.model}, H200"] = PUBLISHED[options.model].get(hparams.alg_name)
    return row
