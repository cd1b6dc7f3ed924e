"""Target vectors: one request at a time, as ROME and MEMIT describe it, against the batched optimisation."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.random_model import random_model
from easyedit_moe import factworld
from easyedit_moe.editors import make_editor
from easyedit_moe.errors import EditingWarning
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.facts.tokens import collate, encode_prompt, pad_id
from easyedit_moe.hparams import load_hyperparams
from easyedit_moe.moe.capture import hooks, layer_output, replace_layer_output
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.moe.loading import load_model
from easyedit_moe.targets.search import KL_PROMPT, TargetSettings, compute_targets, fact_contexts


@dataclass(frozen=True)
class Options:
    """Requests to find targets for in a batch, and how many of them to run one at a time (their time is scaled).

    ``shape`` is "factworld" (the bundled model) or one of ``random_model.SHAPES``, then with ``decoder_layers``;
    ``plain_prompts`` leaves out the context prefixes of ``hparams``, as the papers do. On CUDA a model of
    Qwen3-30B-A3B's shape is measured besides.
    """

    requests: int = 100
    one_at_a_time: int = 16
    shape: str = "factworld"
    decoder_layers: int = 48
    hparams: str = "MoTE/factworld"
    plain_prompts: bool = False
    dtype: str = "float32"
    device: str = "cpu"


def run(options: Options) -> list[dict[str, Any]]:
    """One row per way to find the same targets."""
    cases = [options]
    if options.shape == "factworld":
        cases.append(replace(options, plain_prompts=True))
        if options.device != "cpu":
            cases.append(
                replace(
                    options, shape="qwen3-30b-a3b", hparams="MoTE/qwen3-30b-a3b", dtype="bfloat16",
                    one_at_a_time=min(4, options.one_at_a_time),
                )
            )  # fmt: skip
    return [row for case in cases for row in _measure(case)]


def _measure(options: Options) -> list[dict[str, Any]]:
    hparams = load_hyperparams(options.hparams, **({"context_prefixes": []} if options.plain_prompts else {}))
    model, tok = load_model("factworld", options.dtype, options.device)
    if options.shape != "factworld":
        model = random_model(options.shape, options.decoder_layers, len(tok), options.dtype, options.device)
    records = json.loads(factworld.data_path("counterfact.json").read_text(encoding="utf-8"))
    facts = parse_requests(records[: options.requests])
    layer, prefixes, settings = make_editor(hparams).target_settings()
    view, few = MoELayerView(model), facts[: options.one_at_a_time]

    def whole_model() -> Tensor:
        return torch.stack([whole_model_target(view, tok, fact, layer, prefixes, settings) for fact in few])

    def ours_alone() -> Tensor:
        found = [compute_targets(view, tok, [fact], layer, prefixes, settings, progress=False) for fact in few]
        return torch.cat([one.delta for one in found])

    def batched() -> Tensor:
        return compute_targets(view, tok, facts, layer, prefixes, settings, progress=False).delta

    rows, shifts = [], {}
    for name, find, count in (
        ("one at a time, whole model", whole_model, len(few)),
        ("one at a time, ours", ours_alone, len(few)),
        ("batched", batched, len(facts)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EditingWarning)
            start = time.perf_counter()
            shifts[name] = find()  # on the CPU, so a GPU is done
            seconds = time.perf_counter() - start
        difference = (shifts[name][: len(few)] - shifts["one at a time, whole model"]).norm(dim=1)
        rows.append(
            {
                "benchmark": "targets",
                "way": name,
                "shape": options.shape,
                "contexts": len(prefixes) + 1,
                "steps": settings.steps,
                "requests": len(facts),
                "measured": count,
                "seconds": seconds * len(facts) / count,
                "relative_difference_median": float(
                    (difference / shifts["one at a time, whole model"].norm(dim=1).clamp_min(1e-12)).median()
                ),
            }
        )
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"]
    return rows


def whole_model_target(
    view: MoELayerView,
    tok: PreTrainedTokenizerBase,
    fact: EditRequest,
    layer: int,
    prefixes: Sequence[str],
    settings: TargetSettings,
) -> Tensor:
    """The shift ``[d]`` of one request: every step is a forward of the whole model over all of its sequences.

    This is how ROME (arXiv 2202.05262) and MEMIT (2210.07229) describe the search, written from the papers; the
    objective and its settings are those of :func:`easyedit_moe.targets.search.compute_targets`.
    """
    model, contexts = view.model, fact_contexts(tok, fact, prefixes, settings.fact_token)
    answer = contexts[0].answer
    kl = encode_prompt(tok, KL_PROMPT.format(fact.subject), fact.subject, settings.fact_token)
    batch = collate([[*c.ids, *answer[:-1]] for c in contexts] + [kl.ids], pad_id(tok), str(model.device))
    at = torch.tensor([c.fact for c in contexts] + [kl.fact], device=model.device)
    rows = torch.arange(len(at), device=model.device)
    ends = torch.tensor([len(c.ids) - 1 for c in contexts], device=model.device)
    where = ends[:, None] + torch.arange(len(answer), device=model.device)
    labels = torch.tensor(answer, device=model.device).expand(len(contexts), -1)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    width = model.config.get_text_config().hidden_size
    delta = torch.zeros(width, device=model.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.lr)
    state: list[Tensor] = []
    reference: Tensor | None = None

    def shift(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = layer_output(output)
        if not state:
            state.append(hidden[0, at[0]].detach().float())
        return replace_layer_output(output, hidden.index_put((rows, at), delta.to(hidden.dtype), accumulate=True))

    with hooks() as handles:
        handles.append(view.decoder_layers[layer].register_forward_hook(shift))
        for step in range(settings.steps + 1):
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
            logp = logits.log_softmax(-1)
            asked = logp[: len(contexts)].gather(1, where[:, :, None].expand(-1, -1, logp.shape[-1]))
            nll = -asked.gather(2, labels[:, :, None]).mean()
            kept = logp[-1, kl.fact]
            reference = kept.detach() if reference is None else reference
            norm = state[0].norm()
            loss = nll + settings.kl_factor * (kept.exp() * (kept - reference)).sum()
            loss = loss + settings.weight_decay * delta.norm() / norm**2
            if step == settings.steps or loss < settings.early_stop_loss:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                delta *= (settings.clamp_norm_factor * norm / delta.norm().clamp_min(1e-30)).clamp_max(1)
    for p, flag in flags:
        p.requires_grad_(flag)
    return delta.detach().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in asdict(Options()).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(value), default=value)
    for row in run(Options(**vars(parser.parse_args()))):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
