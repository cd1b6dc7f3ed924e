from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONFIGS, FAMILIES, assert_same_state, requests, state_of, tiny_model, tiny_tokenizer, token_ids
from torch import Tensor, nn

from easyedit_moe.adapters.attachment import add_subjects, attach, detach, find_adapter, find_ffn
from easyedit_moe.adapters.moe_adapter import (
    AdapterConfig,
    Fact,
    MoEAdapter,
    balance_loss,
    base_fingerprint,
    gate,
    recorded_routing,
    switched_off,
)
from easyedit_moe.errors import AdapterError, LayerError
from easyedit_moe.evaluation.routing import routing_snapshot
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.anchors import NO_ANCHOR, SubjectMatcher
from easyedit_moe.facts.tokens import encode_text

TOK = tiny_tokenizer()
SUBJECTS = [r["subject"] for r in requests(6)]
UNTOUCHED = "The quick brown fox jumps over the lazy dog."
EVERY_FAMILY = [*FAMILIES, "dense", "llama4", "jetmoe", "gemma4", "laguna", "nemotron_h"]


def config(model: nn.Module, **changes: Any) -> AdapterConfig:
    values: dict[str, Any] = {
        "layer": 1, "d_model": 32, "num_experts": 4, "expert_width": 16, "top_k": 2, "scale": 0.5, "noise": 0.1,
        "token_weight": 1.0, "use_anchors": True, "without_anchor": "skip", "fingerprint": base_fingerprint(model),
    }  # fmt: skip
    return AdapterConfig(**(values | changes))


def attached(model: nn.Module, trained: bool = True, **changes: Any) -> MoEAdapter:
    """An adapter on the model; ``trained`` fills what starts at zero, so that it changes outputs."""
    adapter = attach(model, TOK, MoEAdapter(config(model, **changes)).requires_grad_(False).eval())
    add_subjects(model, TOK, adapter, SUBJECTS)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for parameter in (adapter.second, adapter.gate_weight, adapter.first_bias):
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5
    return adapter


@torch.no_grad()
def logits(model: nn.Module, text: str | list[int]) -> Tensor:
    ids = encode_text(TOK, text) if isinstance(text, str) else text
    return model(input_ids=torch.tensor([ids])).logits


# ---------------------------------------------------------------- arithmetic


def reference_gate(inputs: Tensor, weight: Tensor, top_k: int, noise: Tensor) -> Tensor:
    out = torch.zeros(len(inputs), len(weight), dtype=torch.float64)
    for n, row in enumerate(inputs):
        scores = [float((w * row).sum() + noise[n, e]) for e, w in enumerate(weight)]
        total = sum(torch.tensor(s).double().exp() for s in scores)
        for e in sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]:
            out[n, e] = torch.tensor(scores[e]).double().exp() / total
    return out


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (5, 2), (3, 3), (1, 1)])
def test_gate_is_its_formula(experts: int, top_k: int) -> None:
    inputs, weight, noise = torch.randn(7, 6).double(), torch.randn(experts, 6).double(), torch.randn(7, experts)
    gates, probability = gate(inputs, weight, top_k, noise)
    torch.testing.assert_close(gates, reference_gate(inputs, weight, top_k, noise), rtol=1e-6, atol=1e-9)
    assert ((gates > 0).sum(1) == top_k).all()
    torch.testing.assert_close(probability.sum(1), torch.ones(7).double())
    assert torch.equal(gates[gates > 0], probability[gates > 0])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients_of_the_gate(top_k: int) -> None:
    inputs = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda i, w: gate(i, w, top_k, noise)[0], (inputs, weight))
    assert torch.autograd.gradcheck(lambda i, w: balance_loss(*gate(i, w, top_k, noise)), (inputs, weight))


def test_gate_and_experts_receive_gradients() -> None:
    model = tiny_model()
    adapter = attached(model)
    adapter.requires_grad_(True)
    out = model(input_ids=torch.tensor([encode_text(TOK, requests(1)[0]["prompt"])])).logits
    out.logsumexp(-1).sum().backward()
    for name, parameter in adapter.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) != (name == "null_anchor"), name


def test_balance_is_one_when_even_and_e_when_not() -> None:
    even = torch.eye(4).repeat(3, 1)
    assert balance_loss(even, torch.full((12, 4), 0.25)) == pytest.approx(1)
    lonely = torch.zeros(6, 4)
    lonely[:, 2] = 1
    assert balance_loss(lonely, lonely) == pytest.approx(4)


@pytest.mark.parametrize("without_anchor", ["skip", "null"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_layer_is_its_formula(without_anchor: str, top_k: int) -> None:
    model = tiny_model().double()
    ids = encode_text(TOK, "We know that " + requests(1)[0]["prompt"])
    ffn, seen = find_ffn(model, 1), {}
    ffn.register_forward_hook(lambda m, args, out: seen.update(x=args[0][0], plain=out[0]))
    adapter = attached(model, top_k=top_k, without_anchor=without_anchor, token_weight=0.7).double()
    ffn.register_forward_hook(lambda m, args, out: seen.update(out=out[0]))
    logits(model, ids)
    anchors = adapter.matcher.anchors(ids)
    assert NO_ANCHOR in anchors
    assert 0 in anchors
    embeddings = model.get_input_embeddings().weight[encode_text(TOK, " " + SUBJECTS[0])].mean(0)
    embeddings = embeddings / embeddings.pow(2).mean().sqrt()
    for i, anchor in enumerate(anchors):
        x, wanted = seen["x"][i], seen["plain"][i].clone()
        if anchor != NO_ANCHOR or without_anchor == "null":
            known = embeddings if anchor == 0 else adapter.null_anchor
            score = torch.softmax(adapter.gate_weight @ torch.cat([0.7 * x, known]), 0)
            for e in score.argsort(descending=True)[:top_k].tolist():
                hidden = nn.functional.silu(adapter.first[e] @ x + adapter.first_bias[e])
                wanted += 0.5 * score[e] * (adapter.second[e] @ hidden)
        torch.testing.assert_close(seen["out"][i], wanted, rtol=1e-5, atol=1e-6)


def test_noise_only_in_training_mode() -> None:
    model = tiny_model()
    adapter = attached(model, noise=3.0)
    prompt = requests(1)[0]["prompt"]
    assert torch.equal(logits(model, prompt), logits(model, prompt))
    adapter.train()
    adapter.generator = torch.Generator().manual_seed(5)
    one, two = logits(model, prompt), logits(model, prompt)
    adapter.generator.manual_seed(5)
    assert not torch.equal(one, two)
    assert torch.equal(one, logits(model, prompt))


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"top_k": 0}, {"without_anchor": "maybe"}])
def test_impossible_shapes(changes: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=next(iter(changes))):
        MoEAdapter(config(tiny_model(), **changes))


# ---------------------------------------------------------------- attaching and detaching


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_untrained_adapter_changes_nothing_and_detaching_leaves_nothing(family: str) -> None:
    model = tiny_model(family).train()
    model.lm_head.weight.requires_grad_(False)
    before, keys = state_of(model), set(model.state_dict())
    model.eval()
    texts = [r["prompt"] for r in requests(4)] + [UNTOUCHED]
    plain = [logits(model, text) for text in texts]
    model.train()
    attached(model, trained=False, without_anchor="null")
    after = state_of(model)
    for part in ("parameters", "requires_grad", "training"):
        for name, value in before[part].items():
            same = torch.equal(value, after[part][name]) if part == "parameters" else value == after[part][name]
            assert same, (part, name)
    assert set(model.state_dict()) == keys
    model.eval()
    for text, expected in zip(texts, plain, strict=True):
        assert torch.equal(logits(model, text), expected)
    model.train()
    detach(model)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_texts_without_a_subject_are_bit_equal_and_others_change(family: str) -> None:
    model = tiny_model(family)
    prompt = requests(1)[0]["prompt"]
    plain = [logits(model, text) for text in (UNTOUCHED, prompt)]
    adapter = attached(model)
    assert torch.equal(logits(model, UNTOUCHED), plain[0])
    changed = logits(model, prompt)
    first = adapter.matcher.anchors(encode_text(TOK, prompt)).index(0)
    torch.testing.assert_close(changed[:, :first], plain[1][:, :first], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed[:, first:], plain[1][:, first:], atol=1e-3)
    with switched_off(adapter):
        assert torch.equal(logits(model, prompt), plain[1])
    detach(model)
    assert torch.equal(logits(model, prompt), plain[1])


def test_our_own_forwards_see_the_adapter() -> None:
    model, prompts = tiny_model(), [r["prompt"] for r in requests(3)]
    pairs = [(p, "Rome") for p in [*prompts, UNTOUCHED]]
    scores, routing = score_targets(model, TOK, pairs), routing_snapshot(model, TOK, prompts)
    attached(model)
    after, moved = score_targets(model, TOK, pairs), routing_snapshot(model, TOK, prompts)
    assert all(abs(a.nll - b.nll) > 1e-3 for a, b in zip(scores[:3], after[:3], strict=True))
    assert after[3].nll == pytest.approx(scores[3].nll, abs=1e-6)
    assert torch.equal(routing.picked[1], moved.picked[1])
    assert not torch.equal(routing.picked[2], moved.picked[2])


def test_early_exits_and_errors_leave_no_anchors_behind() -> None:
    model, prompt = tiny_model(), requests(1)[0]["prompt"]
    adapter = attached(model)
    expected = logits(model, prompt)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        logits(model, UNTOUCHED)
    handle.remove()
    assert (adapter.attachment.anchors, adapter.attachment.opener) == (None, None)
    assert torch.equal(logits(model, prompt), expected)


def test_the_decoder_alone_finds_anchors_too() -> None:
    model, ids = tiny_model(), torch.tensor([encode_text(TOK, requests(1)[0]["prompt"])])
    attached(model)
    with torch.no_grad():
        assert torch.equal(model.lm_head(model.model(input_ids=ids).last_hidden_state), model(ids).logits)


def test_calls_without_token_ids_are_refused() -> None:
    model, prompt = tiny_model(), requests(1)[0]["prompt"]
    embedded = model.get_input_embeddings()(torch.tensor([encode_text(TOK, prompt)]))
    attached(model)
    expected = logits(model, prompt)
    with pytest.raises(AdapterError, match="without input_ids"):
        model(inputs_embeds=embedded)
    with pytest.raises(AdapterError, match="outside of its model's forward"):
        find_ffn(model, 1)(embedded)
    assert torch.equal(logits(model, prompt), expected)


def test_one_adapter_at_a_time() -> None:
    model = tiny_model()
    with pytest.raises(AdapterError, match="no adapter to detach"):
        detach(model)
    adapter = attached(model)
    before = state_of(model)
    with pytest.raises(AdapterError, match="has an adapter already"):
        attach(model, TOK, MoEAdapter(adapter.config))
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("layer", [4, -1, True])
def test_layers_out_of_range(layer: int) -> None:
    with pytest.raises(LayerError, match="out of range: the model has layers 0 to 3"):
        find_ffn(tiny_model(), layer)


def test_a_layer_without_ffn() -> None:
    model = tiny_model("nemotron_h")
    before = state_of(model)
    with pytest.raises(LayerError, match=r"model\.layers\.0 has no FFN.*mixer \(NemotronHAttention\)"):
        attached(model, layer=0)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dense"])
def test_moves_with_the_model(family: str) -> None:
    model = tiny_model(family)
    adapter = attached(model)
    expected = logits(model, requests(1)[0]["prompt"])
    model.to(torch.bfloat16)
    assert {t.dtype for t in [*adapter.parameters(), *adapter.buffers()]} == {torch.bfloat16}
    moved = logits(model, requests(1)[0]["prompt"])
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), expected, atol=0.3, rtol=0.1)
    adapter.float()  # a float32 adapter beside a bfloat16 model, as training leaves it
    assert logits(model, requests(1)[0]["prompt"]).dtype == torch.bfloat16
    assert detach(model) is adapter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_to_a_gpu() -> None:
    model = tiny_model()
    attached(model)
    prompt = torch.tensor([encode_text(TOK, requests(1)[0]["prompt"])])
    with torch.no_grad():
        expected = model(prompt).logits
        torch.testing.assert_close(model.cuda()(prompt.cuda()).logits.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_a_deep_copy_has_an_adapter_of_its_own() -> None:
    model, prompt = tiny_model(), requests(1)[0]["prompt"]
    plain = logits(model, prompt)
    adapter = attached(model)
    expected = logits(model, prompt)
    other = copy.deepcopy(model)
    adapter.second.data.zero_()
    assert torch.equal(logits(other, prompt), expected)
    assert torch.equal(logits(model, prompt), plain)
    detach(model)
    assert torch.equal(logits(other, prompt), expected)
    detach(other)
    assert torch.equal(logits(other, prompt), plain)


def test_saving_the_model_saves_the_base(tmp_path: Path) -> None:
    model = tiny_model()
    keys, base = set(model.state_dict()), {n: t.clone() for n, t in model.state_dict().items()}
    adapter = attached(model)
    second = adapter.second.clone()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert set(again.state_dict()) == keys
    assert all(torch.equal(t, base[n]) for n, t in again.state_dict().items())
    assert model.load_state_dict(base).missing_keys == []
    assert torch.equal(adapter.second, second)
    assert set(adapter.state_dict()) == {"anchors", "first", "first_bias", "gate_weight", "null_anchor", "second"}


# ---------------------------------------------------------------- anchors

NAMES = ["Ana", "Ana Lyon", "Zoë Łukasz", "東京", "May", "may", "Thomas Joannes Stieltjes"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Ana lives", ["Ana"]), ("I met Ana.", ["Ana"]), ("(Ana)", ["Ana"]), ("Ana's house", ["Ana"]),
        ("Angola met Anabel and Susana", []), ("ANA sings", ["Ana"]), ("Ana Lyon sings", ["Ana Lyon"]),
        ("ana  lyon sings", ["Ana Lyon"]), ("Ana\nLyon sings", ["Ana Lyon"]), ("ZOË łukasz is", ["Zoë Łukasz"]),
        ("私は東京が好き", ["東京"]), ("In May we may", ["May", "may"]), ("MAY", ["May"]),
        ("Thomas Joannes Stieltjes met Ana", ["Thomas Joannes Stieltjes", "Ana"]), ("", []), ("Thomas Joannes", []),
    ],
)  # fmt: skip
def test_subjects_in_texts(text: str, found: list[str]) -> None:
    matcher = SubjectMatcher(TOK, NAMES)
    assert [NAMES[o.subject] for o in matcher.find(text)] == found


@pytest.mark.parametrize("specials", ["", "bos", "bos eos"])
@pytest.mark.parametrize("text", ["We met Zoë Łukasz in Rome", "Zoë  łukasz speaks", "東京 met Ana Lyon, then Ana."])
def test_anchor_starts_at_the_token_that_completes_the_subject(text: str, specials: str) -> None:
    tok = tiny_tokenizer(specials)
    matcher = SubjectMatcher(tok, NAMES)
    out = tok(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    wanted, latest = [], NO_ANCHOR
    ends = {o.end: o.subject for o in matcher.find(text)}
    spans = [None if s else span for span, s in zip(out["offset_mapping"], out["special_tokens_mask"], strict=True)]
    for i, span in enumerate(spans):
        # Several tokens may hold bytes of one character; the last of them completes it.
        if span and not any(later and later[0] < span[1] for later in spans[i + 1 :]):
            latest = ends.get(span[1], latest)
        wanted.append(latest)
    assert matcher.anchors(out["input_ids"]) == wanted
    assert len(set(wanted)) > 1


def test_anchors_do_not_look_ahead() -> None:
    matcher = SubjectMatcher(TOK, NAMES)
    ids = encode_text(TOK, "We met Zoë Łukasz in Rome, then Ana Lyon and Ana; May she live.")
    whole = matcher.anchors(ids)
    for end in range(1, len(ids)):
        assert matcher.anchors(ids[:end])[: end - 1] == whole[: end - 1] or "Ana" in TOK.decode(ids[:end])[-5:]
    assert matcher.anchors([]) == []


# ---------------------------------------------------------------- KV cache


def greedy(model: nn.Module, ids: list[int], steps: int) -> list[int]:
    """Without a cache and one text at a time."""
    out = list(ids)
    for _ in range(steps):
        out.append(int(logits(model, out)[0, -1].argmax()))
    return out[len(ids) :]


TEXTS = ["Danielle Darrieux speaks", UNTOUCHED, "We know: the twin city of Lyon is", "Angola is in"]
CACHED = ["qwen3_moe", "gpt_oss", "qwen3_5_moe", "deepseek_v3", "dense", "nemotron_h"]


@pytest.mark.parametrize("family", CACHED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_in_a_padded_batch(family: str, side: str) -> None:
    if side == "right" and family in ("qwen3_5_moe", "nemotron_h", "gpt_oss"):
        pytest.skip("such padding changes what linear attention and sliding windows compute, without an adapter too")
    model, tok = tiny_model(family), tiny_tokenizer(padding_side=side)
    attached(model)
    alone = [greedy(model, encode_text(TOK, text), 5) for text in TEXTS]
    batch = tok(TEXTS, return_tensors="pt", padding=True)
    if side == "left":
        out = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        assert out[:, batch["input_ids"].shape[1] :].tolist() == alone
        return
    # generate() continues after the last column, so prompts padded on the right are continued by hand.
    lengths = batch["attention_mask"].sum(1)
    mask, positions = batch["attention_mask"], lengths[:, None]
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        token = out.logits[torch.arange(len(TEXTS)), lengths - 1].argmax(-1, keepdim=True)
        written = [token]
        for _ in range(4):
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            out = model(
                token, attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values, use_cache=True
            )
            token, positions = out.logits[:, -1].argmax(-1, keepdim=True), positions + 1
            written.append(token)
    assert torch.cat(written, dim=1).tolist() == alone


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "dense"])
def test_token_by_token_is_the_same_as_at_once(family: str) -> None:
    model = tiny_model(family)
    adapter = attached(model)
    ids = encode_text(TOK, "We met Zoë Łukasz in Rome, and Danielle Darrieux speaks")
    with recorded_routing(adapter) as seen:
        whole = logits(model, ids)[0]
    cache, parts = None, []
    with torch.no_grad(), recorded_routing(adapter) as stepwise:
        for i, step in enumerate(ids):
            out = model(torch.tensor([[step]]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0, 0])
            assert len(cache._memoe_history.ids[0]) == i + 1
    torch.testing.assert_close(torch.stack(parts), whole, atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.cat([r.anchor for r in stepwise]), seen[0].anchor)
    assert set(seen[0].anchor.tolist()) == {SUBJECTS.index("Zoë Łukasz"), SUBJECTS.index("Danielle Darrieux")}


def test_beams_take_their_anchors_along() -> None:
    model, tok = tiny_model(), tiny_tokenizer(padding_side="left")
    attached(model)
    batch = tok(TEXTS, return_tensors="pt", padding=True)
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@torch.no_grad()
def test_rows_of_a_cache_that_are_moved() -> None:
    model = tiny_model()
    attached(model)
    ids = torch.tensor([encode_text(TOK, text)[:4] for text in TEXTS[:2]])
    token = torch.tensor([[7], [8]])

    def after(change: Any, rows: list[int], more: Tensor) -> None:
        cache = model(ids, use_cache=True).past_key_values
        change(cache)
        cached = model(more, past_key_values=cache).logits[:, -1]
        whole = model(torch.cat([ids[rows], more], dim=1)).logits[:, -1]
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)

    after(lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0], token)
    after(lambda c: c.batch_select_indices(torch.tensor([1])), [1], token[:1])
    after(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1], token[[0, 1, 0, 1]])
    original = model(ids, use_cache=True).past_key_values
    other = copy.deepcopy(original)
    other.reorder_cache(torch.tensor([1, 0]))
    for cache, rows in ((original, [0, 1]), (other, [1, 0])):
        whole = model(torch.cat([ids[rows], token], dim=1)).logits[:, -1]
        torch.testing.assert_close(model(token, past_key_values=cache).logits[:, -1], whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused() -> None:
    model, ids = tiny_model(), torch.tensor([[5, 6, 7], [8, 9, 10]])
    early = model(ids, use_cache=True).past_key_values
    attached(model)
    with pytest.raises(AdapterError, match="holds 3 tokens from before the adapter was attached"):
        model(ids[:, :1], past_key_values=early)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="does not fit the ids seen so far: 1 sequences"):
        model(ids[:1, :1], past_key_values=cache)
    assert model(ids).logits.shape[:2] == (2, 3)


# ---------------------------------------------------------------- files


def saved(model: nn.Module, folder: Path) -> MoEAdapter:
    adapter = attached(model)
    adapter.facts, adapter.edits = (Fact("Angola is in", "Angola", "Russia"),), 2
    adapter.save(folder)
    return adapter


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "dense"])
def test_save_and_load(family: str, tmp_path: Path) -> None:
    model, other = tiny_model(family), tiny_model(family)
    adapter = saved(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    loaded = attach(other, TOK, MoEAdapter.load(tmp_path / "adapter"))
    assert (loaded.config, loaded.subjects, loaded.facts, loaded.edits) == (
        adapter.config, adapter.subjects, adapter.facts, 2,
    )  # fmt: skip
    assert not any(p.requires_grad for p in loaded.parameters())
    for text in [r["prompt"] for r in requests(4)]:
        assert torch.equal(logits(other, text), logits(model, text))
    half = tiny_model(family, dtype=torch.bfloat16)
    attach(half, TOK, MoEAdapter.load(tmp_path / "adapter").bfloat16())
    adapter.save(tmp_path / "adapter")  # over an adapter of the same model


def test_another_model_is_refused(tmp_path: Path) -> None:
    first = tiny_model()
    saved(first, tmp_path / "adapter")
    other = tiny_model(seed=1)
    before = state_of(other)
    with pytest.raises(AdapterError, match="made for another model"):
        attach(other, TOK, MoEAdapter.load(tmp_path / "adapter"))
    assert_same_state(before, state_of(other))
    files = {p: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    with pytest.raises(AdapterError, match="holds an adapter of another model"):
        saved(other, tmp_path / "adapter")
    assert {p: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == files
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="is a file"):
        find_adapter(first).save(tmp_path / "file")


def test_unusable_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter\.json does not exist"):
        MoEAdapter.load(tmp_path)
    folder = tmp_path / "adapter"
    model = tiny_model()
    saved(model, folder)
    text = (folder / "adapter.json").read_text(encoding="utf-8")
    for broken in (text[:50], "[]", text.replace('"top_k"', '"topk"'), text.replace("memoe-adapter", "other")):
        (folder / "adapter.json").write_text(broken, encoding="utf-8")
        with pytest.raises(AdapterError, match=r"save the adapter anew|can't be read as JSON"):
            MoEAdapter.load(folder)
    changed = json.loads(text) | {"edits": 3}
    (folder / "adapter.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(AdapterError, match="do not belong together"):
        MoEAdapter.load(folder)
    (folder / "adapter.json").write_text(text, encoding="utf-8")
    weights = (folder / "adapter.safetensors").read_bytes()
    (folder / "adapter.safetensors").write_bytes(weights[:-40])
    with pytest.raises(AdapterError, match="truncated"):
        MoEAdapter.load(folder)


def test_fingerprint_of_the_base_alone() -> None:
    models = {family: base_fingerprint(tiny_model(family)) for family in [*CONFIGS, "dense"]}
    assert len(set(models.values())) == len(models)
    model = tiny_model()
    attached(model)
    assert base_fingerprint(model) == models["qwen3_moe"]
    assert base_fingerprint(tiny_model(dtype=torch.bfloat16)) == models["qwen3_moe"]
    assert token_ids(3) == token_ids(3)
