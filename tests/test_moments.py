"""Second moments of keys and outputs against dense sums over single forwards."""

from __future__ import annotations

import pytest
import torch
from tiny import CASES, TEXTS, assert_same_state, reference_key, shared_model, state_of, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from easyedit_moe.capture import layer_output
from easyedit_moe.errors import DataError, LayerError, NumericalError
from easyedit_moe.layers import MoELayerView
from easyedit_moe.moments import LayerMoments, collect_moments
from easyedit_moe.tokens import encode_text

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
    moments = LayerMoments(keys, counts, torch.eye(2), 7)
    coverage = moments.coverage()
    assert (coverage.minimum, coverage.median, coverage.thin, coverage.d_hidden) == (0, 4.0, [0, 2], 4)
    wanted = (5 * 1 + 3 * 2 + 4 * 3 + 9 * 4) / 21 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(moments.pooled(), wanted)
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
