"""Second moments of keys and outputs against dense sums over single forwards."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from tiny import CASES, TEXTS, assert_same_state, reference_key, shared_model, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.errors import DataError, LayerError, NumericalError
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.moe.layer_outputs import layer_output
from easyedit_moe.moe.layers import MoELayerView
from easyedit_moe.statistics import moments
from easyedit_moe.statistics.moments import LayerMoments, collect_moments

TOK = tiny_tokenizer()


def collect(model: nn.Module, layers: list[int], texts: list[str] = TEXTS, **options) -> dict[int, LayerMoments]:
    return collect_moments(MoELayerView(model), TOK, texts, layers, progress=False, **options)


class Reference:
    """Sums in float64 over one unpadded forward per text."""

    def __init__(self, model: nn.Module, layer: int, texts: list[str] = TEXTS, max_length: int = 512) -> None:
        self.moe = MoELayerView(model).layers[layer]
        layout = self.moe.experts.layout
        self.sums = torch.zeros(8, layout.d_hidden, layout.d_hidden, dtype=torch.float64)
        self.counts = torch.zeros(8, dtype=torch.int64)
        self.output = torch.zeros(layout.d_model, layout.d_model, dtype=torch.float64)
        self.tokens = 0
        handles = [self.moe.block.register_forward_hook(self.add)]
        if layout.storage == "packed":
            handles.append(self.moe.experts.module.register_forward_pre_hook(self.remember))
        with torch.no_grad():
            for text in texts:
                model(torch.tensor([encode_text(TOK, text)[:max_length]]))
        for handle in handles:
            handle.remove()

    def remember(self, module: nn.Module, args: tuple) -> None:
        self.hidden, self.expert = args[:2]

    def add(self, block: nn.Module, args: tuple, output: object) -> None:
        if self.moe.experts.layout.storage == "modulelist":
            self.hidden = args[0].reshape(-1, 32)
            self.expert = block.gate(self.hidden).topk(block.top_k, dim=-1).indices
        for row, picked in zip(self.hidden, self.expert.tolist(), strict=True):
            for j in picked:
                key = reference_key(self.moe.experts.module, row[None], j)
                self.sums[j] += key.T @ key
                self.counts[j] += 1
        y = layer_output(output).reshape(-1, 32).double()
        self.output += y.T @ y
        self.tokens += len(y)

    def check(self, found: LayerMoments) -> None:
        assert found.num_tokens == self.tokens > 50
        assert torch.equal(found.counts, self.counts)
        keys = self.sums / self.counts.clamp_min(1)[:, None, None]
        close(found.keys.double(), keys)
        close(found.output.double(), self.output / self.tokens)
        close(found.pooled(), self.sums.sum(0) / self.counts.sum())
        assert keys.norm() > 1e-2


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "how"), [*CASES, ("nemotron_h", "eager"), ("laguna", "eager")])
def test_moments_equal_dense_sums(family: str, how: str) -> None:
    model = shared_model(family, how)
    layer = max(index for index in MoELayerView(model).layers if index < 3)
    found = collect(model, [layer], batch_size=3)
    assert list(found) == [layer]
    Reference(model, layer).check(found[layer])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist", "deepseek_v3", "qwen3_5_moe"])
def test_batch_size_and_padding_do_not_matter(family: str) -> None:
    model = shared_model(family)
    texts = [*TEXTS, "Ana", "Rome is in"]
    single, whole = collect(model, [1], texts, batch_size=1)[1], collect(model, [1], texts, batch_size=10)[1]
    assert single.num_tokens == whole.num_tokens == sum(len(encode_text(TOK, text)) for text in texts)
    assert torch.equal(single.counts, whole.counts)
    active = 3
    assert int(whole.counts.sum()) == active * whole.num_tokens
    close(single.keys, whole.keys)
    close(single.output, whole.output)


@pytest.mark.parametrize("family", ["qwen3_moe", "modulelist"])
def test_layers_in_one_pass_equal_one_at_a_time(family: str) -> None:
    model = shared_model(family)
    together = collect(model, [0, 2, 3])
    assert list(together) == [0, 2, 3]
    for layer, found in together.items():
        alone = collect(model, [layer])[layer]
        assert torch.equal(found.counts, alone.counts)
        assert found.num_tokens == alone.num_tokens
        close(found.keys, alone.keys)
        close(found.output, alone.output)
    assert not torch.allclose(together[0].keys, together[2].keys)


def test_long_texts_are_cut() -> None:
    model = shared_model()
    found = collect(model, [1], max_length=7)[1]
    assert found.num_tokens == 7 * len(TEXTS)
    Reference(model, 1, max_length=7).check(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_the_sums(dtype: torch.dtype) -> None:
    found = collect(shared_model(), [1], dtype=dtype)[1]
    assert (found.keys.dtype, found.output.dtype, found.counts.dtype) == (dtype, dtype, torch.int64)
    assert found.pooled().dtype == torch.float64
    assert (found.keys.shape, found.output.shape, found.counts.shape) == ((8, 24, 24), (32, 32), (8,))


def test_half_precision_models_sum_in_single_precision() -> None:
    found = collect(tiny_model(dtype=torch.bfloat16), [1])[1]
    assert found.keys.dtype == torch.float32
    wanted = collect(shared_model(), [1])[1]
    assert (found.output - wanted.output).norm() < 0.1 * wanted.output.norm()
    assert (found.pooled() - wanted.pooled()).norm() < 0.1 * wanted.pooled().norm()


@pytest.mark.parametrize("family", ["qwen3_moe", "modulelist"])
def test_early_exit(family: str) -> None:
    model = tiny_model(family)
    calls: list[str] = []
    for name in ("0", "1", "2", "3"):
        model.model.layers[int(name)].register_forward_pre_hook(lambda *_, n=name: calls.append(n))
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("head"))
    collect(model, [0, 1], batch_size=4)
    assert calls == ["0", "1"] * 2


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_model_is_as_before(family: str, how: str) -> None:
    model = tiny_model(family, implementation=how)
    model.train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    before = state_of(model)
    collect(model, [1, 2])
    assert_same_state(before, state_of(model))
    model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        collect(model, [1, 2])
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "modulelist"])
def test_weights_that_are_not_finite(family: str) -> None:
    model = tiny_model(family)
    view = MoELayerView(model)
    view.layers[1].experts.read(2).fill_(float("nan"))
    for layer in (1, 2):
        with pytest.raises(NumericalError, match=rf"layers\.{layer}"):
            collect(model, [layer])
    assert torch.isfinite(collect(model, [0])[0].keys).all()


def test_sums_that_overflow() -> None:
    """Keys of 1e24 give a finite output here, but their squares need float64."""
    model = tiny_model()
    plain = collect(model, [1])[1]
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj.data[:, 24:].mul_(1e24)
    experts.down_proj.data.div_(1e24)
    with pytest.raises(NumericalError, match=r"layers\.1"):
        collect(model, [1])
    found = collect(model, [1], dtype=torch.float64)[1]
    close(found.output.float(), plain.output)
    close((found.keys / 1e48).float(), plain.keys)


def test_coverage() -> None:
    counts = torch.tensor([0, 5, 3, 4, 9])
    keys = torch.stack([float(n) * torch.eye(4) for n in range(5)])
    found = LayerMoments(keys, counts, torch.eye(2), 7)
    coverage = found.coverage()
    assert (coverage.minimum, coverage.median, coverage.thin, coverage.d_hidden) == (0, 4.0, [0, 2], 4)
    wanted = (5 * 1 + 3 * 2 + 4 * 3 + 9 * 4) / 21 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(found.pooled(), wanted)
    unused = LayerMoments(torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.int64), torch.eye(2), 0)
    assert torch.equal(unused.pooled(), torch.zeros(4, 4, dtype=torch.float64))


def test_an_expert_that_no_token_reaches() -> None:
    model = tiny_model()
    found = collect(model, [1], ["Ana"])[1]
    unused = torch.nonzero(found.counts == 0).squeeze(1).tolist()
    assert unused
    for j in unused:
        assert torch.equal(found.keys[j], torch.zeros(24, 24))
    assert found.coverage().minimum == 0
    assert set(unused) <= set(found.coverage().thin)


def test_refusals() -> None:
    model = shared_model("deepseek_v3")
    with pytest.raises(LayerError, match="dense"):
        collect(model, [0])
    with pytest.raises(LayerError, match="empty"):
        collect(model, [])
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match="token"):
            collect(model, [1], texts)


def test_empty_texts_are_passed_over() -> None:
    model = shared_model()
    found, wanted = collect(model, [1], ["", *TEXTS, ""])[1], collect(model, [1])[1]
    assert found.num_tokens == wanted.num_tokens
    close(found.keys, wanted.keys)


# ---------------------------------------------------------------- keys as the experts compute them


def count_recomputed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    plain = moments.sorted_keys
    monkeypatch.setattr(moments, "sorted_keys", lambda moe, routing: calls.append(1) or plain(moe, routing))
    return calls


GATED_IN_ONE_PLACE = [(f, "grouped_mm") for f in ("qwen3_moe", "gpt_oss", "nemotron_h")] + [("gpt_oss", "eager")]


@pytest.mark.parametrize(("family", "how"), GATED_IN_ONE_PLACE)
def test_no_key_is_computed_twice(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_recomputed(monkeypatch)
    model = shared_model(family, how)
    layer = min(index for index in MoELayerView(model).layers if index > 0)
    Reference(model, layer).check(collect(model, [layer], batch_size=3)[layer])
    assert not calls


def test_an_implementation_in_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_recomputed(monkeypatch)
    model = tiny_model(implementation="batched_mm")
    Reference(model, 1).check(collect(model, [1], batch_size=3)[1])
    assert len(calls) == 3


def test_slots_with_a_zero_gate_do_not_count() -> None:
    model = tiny_model()
    plain = collect(model, [1])[1]
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: (args[0], args[1], args[2] * (args[1] != 2)))
    found = collect(model, [1])[1]
    assert plain.counts[2] > 0
    assert found.counts[2] == 0
    assert torch.equal(found.keys[2], torch.zeros(24, 24))
    kept = [j for j in range(8) if j != 2]
    assert torch.equal(found.counts[kept], plain.counts[kept])
    close(found.keys[kept], plain.keys[kept])


def test_no_expert_computes_padding() -> None:
    model, seen = tiny_model(), []
    for layer in (0, 1):
        experts = model.model.layers[layer].mlp.experts
        plain = type(experts).forward
        experts.forward = lambda *a, _plain=plain, _self=experts: seen.append(len(a[0])) or _plain(_self, *a)
    tokens = sum(len(encode_text(TOK, text)) for text in TEXTS)
    assert collect(model, [1])[1].num_tokens == tokens
    assert seen == [tokens, tokens]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grams_of_groups(dtype: torch.dtype) -> None:
    rows, counts = torch.randn(17, 5), [4, 0, 9, 1, 3]
    sums = torch.randn(5, 5, 5, dtype=dtype)
    wanted = sums.clone()
    for j, group in enumerate(rows.to(dtype).split(counts)):
        wanted[j] += group.T @ group
    padded = moments.pad_groups(rows.to(dtype), counts)
    close(sums + padded.transpose(1, 2) @ padded, wanted)
    moments.add_grams(sums, rows, counts)
    close(sums, wanted)


def test_tensor_cores_only_inside() -> None:
    for before in (False, True):
        torch.backends.cuda.matmul.allow_tf32 = before
        with suppress(ZeroDivisionError), moments._tensor_cores(True):
            assert torch.backends.cuda.matmul.allow_tf32
            raise ZeroDivisionError
        assert torch.backends.cuda.matmul.allow_tf32 == before
        with moments._tensor_cores(False):
            assert torch.backends.cuda.matmul.allow_tf32 == before
    torch.backends.cuda.matmul.allow_tf32 = False


# ---------------------------------------------------------------- shards, coverage, resuming


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """72 texts in shards of 3 and rounds of 6."""
    monkeypatch.setattr(moments, "SHARD_CHARACTERS", 120)
    monkeypatch.setattr(moments, "ROUND_SHARDS", 2)
    return TEXTS * 9


def test_shards_hold_all_texts_in_order(small_shards: list[str]) -> None:
    shards = moments.shards_of(small_shards, 512)
    assert [text for shard in shards for text in shard] == small_shards
    assert len(shards) > 20
    assert len(moments.shards_of(small_shards, 5)) < len(shards) / 2, "what is cut off does not count"


def test_shards_do_not_change_the_result(small_shards: list[str]) -> None:
    model = shared_model()
    found, wanted = collect(model, [1], small_shards)[1], collect(model, [1])[1]
    assert found.num_tokens == 9 * wanted.num_tokens
    assert torch.equal(found.counts, 9 * wanted.counts)
    close(found.keys, wanted.keys)
    close(found.output, wanted.output)


def test_a_layer_stops_when_each_expert_is_covered(small_shards: list[str]) -> None:
    model = tiny_model()
    every = collect(model, [0, 2], small_shards)
    wanted = dict.fromkeys(every, 7 * 24)
    found = collect(model, [0, 2], small_shards, coverage_target=7)
    used = {layer: value.num_tokens for layer, value in found.items()}
    assert all(0 < used[layer] < every[layer].num_tokens for layer in used)
    assert all(int(found[layer].counts.min()) >= wanted[layer] for layer in used)
    assert used[0] != used[2], "each layer stops on its own"
    for layer, value in found.items():
        alone = collect(model, [layer], small_shards, coverage_target=7)[layer]
        assert torch.equal(alone.counts, value.counts)
        close(alone.keys, value.keys)
    unreachable = collect(model, [0], small_shards, coverage_target=1e6)[0]
    assert torch.equal(unreachable.counts, every[0].counts)


def test_layers_that_are_done_are_not_run(small_shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, covered = tiny_model(), moments.Sums.covered
    monkeypatch.setattr(moments.Sums, "covered", lambda s, *a: s.moe.index == 2 and covered(s, *a))
    calls = {index: [] for index in (0, 2)}
    for index in (0, 2):
        model.model.layers[index].register_forward_pre_hook(lambda *_, n=index: calls[n].append(1))
    collect(model, [0, 2], small_shards, coverage_target=7)
    assert 0 < len(calls[2]) < len(calls[0])


def test_long_texts_are_tokenised_only_as_far_as_needed() -> None:
    text = " ".join(TEXTS * 40)
    lengths: list[int] = []

    class Counting:
        def __call__(self, text: str, **options: object) -> object:
            lengths.append(len(text))
            return TOK(text, **options)

        def __getattr__(self, name: str) -> object:
            return getattr(TOK, name)

    assert moments.encode_cut(Counting(), text, 100) == encode_text(TOK, text)[:100]
    assert lengths == [1600]
    dense = "日本" * 900 + "Rome " * 3  # some 3 bytes, and tokens, a character
    assert moments.encode_cut(TOK, dense, 100) == encode_text(TOK, dense)[:100]
    sparse = (" " * 200 + "Rome") * 20
    assert moments.encode_cut(TOK, sparse, 100) == encode_text(TOK, sparse)[:100]


def test_batches_respect_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "BATCH_TOKENS", 60)
    batches = list(moments._batches(TOK, [*TEXTS, "Ana", ""], 512, 100))
    assert sorted(len(ids) for batch in batches for ids in batch) == sorted(
        len(encode_text(TOK, text)) for text in [*TEXTS, "Ana"]
    )
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= 60


def test_pooled_moments_do_not_depend_on_how_many_rows_are_pooled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    keys, counts = torch.randn(5, 7, 7, generator=draw), torch.tensor([3, 0, 9, 1, 4])
    found = moments.LayerMoments(keys, counts, torch.eye(2), 17).pooled()
    wanted = (keys.double() * (counts / counts.sum()).double()[:, None, None]).sum(0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(moments, "POOLED", 5 * 7 * 2)
    torch.testing.assert_close(moments.LayerMoments(keys, counts, torch.eye(2), 17).pooled(), found)
