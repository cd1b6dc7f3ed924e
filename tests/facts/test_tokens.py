"""Fact-token positions, targets and batches, for several kinds of tokenizers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from tiny import TEXTS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from easyedit_moe.errors import HyperParamsError, RequestError
from easyedit_moe.facts.tokens import (
    FACT_TOKENS,
    collate,
    encode_prompt,
    encode_target,
    encode_text,
    pad_id,
    subject_span,
)


class Slow(hf.PreTrainedTokenizerFast):
    """A tokenizer that gives no offsets, as slow ones don't."""

    is_fast = False

    def __call__(self, *args: object, **kwargs: object):
        assert not kwargs.get("return_offsets_mapping")
        return super().__call__(*args, **kwargs)


def slow(specials: str = "") -> hf.PreTrainedTokenizerBase:
    fast = tiny_tokenizer(specials)
    tok = Slow(tokenizer_object=fast.backend_tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>")
    assert not tok.is_fast
    return tok


def sentencepiece_like() -> hf.PreTrainedTokenizerFast:
    """As Llama's and Mixtral's: spaces become a visible mark, and one is put before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # One word at a time, since no merge of a trained SentencePiece model crosses a space.
    tokenizer.train_from_iterator([word for text in TEXTS[:4] for word in text.split()] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")


TOKENIZERS = {
    "plain": tiny_tokenizer,
    "bos": lambda: tiny_tokenizer("bos"),
    "eos": lambda: tiny_tokenizer("eos"),
    "bos eos": lambda: tiny_tokenizer("bos eos"),
    "left": lambda: tiny_tokenizer("bos eos", padding_side="left"),
    "no pad": lambda: tiny_tokenizer(pad=False),
    "slow": slow,
    "slow bos eos": lambda: slow("bos eos"),
    "sentencepiece": sentencepiece_like,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tok(request: pytest.FixtureRequest) -> hf.PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def plain() -> hf.PreTrainedTokenizerBase:
    return tiny_tokenizer()


PROMPTS = [
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux"),
    ("Danielle Darrieux speaks", "Danielle Darrieux"),
    ("What is the twin city of Lyon", "Lyon"),
    ("The mother tongue of Zoë Łukasz is", "Zoë Łukasz"),
    ("Zoë Łukasz", "Zoë Łukasz"),
    ("東京 is the capital of", "東京"),
    ("The capital of Japan is 東京", "東京"),
    ("What is 東京, and where?", "東京"),
    ("Москва is the capital of", "Москва"),
    ("Where is Москва?", "Москва"),
    ("Say 👩‍🚀 now", "👩‍🚀"),
]


@pytest.mark.parametrize(("prompt", "subject"), PROMPTS)
def test_subject_positions_by_decoding(tok: hf.PreTrainedTokenizerBase, prompt: str, subject: str) -> None:
    """Whole prefixes decode to what they should, without any use of offsets."""
    first, last, after, end = (
        encode_prompt(tok, prompt, subject, name)
        for name in ("subject_first", "subject_last", "subject_first_after_last", "last")
    )
    assert first.ids == last.ids == after.ids == end.ids

    def text(ids: tuple[int, ...]) -> str:
        return tok.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    ids, start = last.ids, prompt.index(subject)
    assert text(ids) == prompt
    # The subject is whole with its last token, and not before it.
    assert text(ids[: last.fact + 1]).startswith(prompt[: start + len(subject)])
    assert not text(ids[: last.fact]).startswith(prompt[: start + len(subject)])
    # Before its first token nothing of it is there, with that token something is (perhaps part of a character).
    assert prompt[:start].rstrip().startswith(text(ids[: first.fact]).rstrip())
    assert "�" not in text(ids[: first.fact])
    assert len(text(ids[: first.fact + 1])) > start
    assert end.fact == len(ids) - 1
    assert after.fact == min(last.fact + 1, len(ids) - 1)
    if prompt.endswith(subject):
        assert last.fact == after.fact == end.fact
    else:
        assert after.fact == last.fact + 1


def test_the_exact_pieces(plain: hf.PreTrainedTokenizerBase) -> None:
    def pieces(prompt: str, subject: str | None) -> dict[str, str]:
        found = {name: encode_prompt(plain, prompt, subject, name) for name in FACT_TOKENS}
        return {name: plain.decode([p.ids[p.fact]]) for name, p in found.items()}

    assert pieces("What is the twin city of Rome? It is", "Rome") == {
        "subject_last": " Rome",
        "subject_first": " Rome",
        "last": " is",
        "subject_first_after_last": "?",
    }
    assert pieces("The name is Stieltjes Joannes, is it", "Stieltjes Joannes") == {
        "subject_last": "nes",
        "subject_first": " St",
        "last": "t",
        "subject_first_after_last": ",",
    }
    assert pieces("She met Zoë Łukasz", "Zoë Łukasz") == {
        "subject_last": "z",
        "subject_first": " Zoë",
        "last": "z",
        "subject_first_after_last": "z",
    }


def test_characters_of_several_tokens(plain: hf.PreTrainedTokenizerBase) -> None:
    prompt = encode_prompt(plain, "a 👩 b", "👩")
    first = encode_prompt(plain, "a 👩 b", "👩", "subject_first")
    assert prompt.fact - first.fact >= 3
    assert plain.decode(list(prompt.ids[prompt.fact + 1 :])) == " b"
    assert plain.decode(list(prompt.ids[first.fact : prompt.fact])).strip(" ") == "�"


@pytest.mark.parametrize("specials", ["", "bos", "eos", "bos eos"])
def test_specials_before_stay_and_specials_behind_go(plain: hf.PreTrainedTokenizerBase, specials: str) -> None:
    bare = encode_prompt(plain, "Angola is in", "Angola")
    shift = 1 if "bos" in specials else 0
    for side in ("left", "right"):
        tok = tiny_tokenizer(specials, padding_side=side)
        prompt = encode_prompt(tok, "Angola is in", "Angola")
        assert prompt.ids == (tok.bos_token_id,) * shift + bare.ids
        assert prompt.fact == bare.fact + shift
        assert encode_text(tok, "Angola is in") == list(prompt.ids)
        assert tok.padding_side == side


def test_slow_and_fast_agree() -> None:
    for specials in ("", "bos eos"):
        fast, without = tiny_tokenizer(specials), slow(specials)
        for prompt, subject in PROMPTS:
            for name in FACT_TOKENS:
                assert encode_prompt(without, prompt, subject, name) == encode_prompt(fast, prompt, subject, name)


def test_one_character_of_a_word_without_offsets() -> None:
    """Byte pieces belong to the character they are part of, not to the next one."""
    for tok in (tiny_tokenizer(), slow()):
        first, second = encode_prompt(tok, "x 東京", "東"), encode_prompt(tok, "x 東京", "京", "subject_first")
        assert tok.decode(list(first.ids[: first.fact + 1])).startswith("x 東")
        assert not tok.decode(list(first.ids[: first.fact])).startswith("x 東")
        assert second.fact >= first.fact


@pytest.mark.parametrize(
    ("prompt", "subject", "start"),
    [
        ("Anabel met Ana in Rome", "Ana", 11),
        ("Ana met Anabel, and Ana left", "Ana", 0),
        ("Rome, Rome and Rome", "Rome", 0),
        ("A C++ and C talk", "C", 10),
        ("A C++ and C talk", "C++", 2),
        ("(Ana)", "Ana", 1),
        ("Ana's Ana", "Ana", 0),
        ("Łukaszów is not Łukasz", "Łukasz", 16),
        ("東京は日本", "東京", 0),
        ("a.b axb", "axb", 4),
    ],
)
def test_the_first_whole_word_is_the_subject(tok, prompt: str, subject: str, start: int) -> None:
    assert subject_span(prompt, subject) == (start, start + len(subject))
    found = encode_prompt(tok, prompt, subject)
    decoded = tok.decode(list(found.ids[: found.fact + 1]), skip_special_tokens=True)
    assert decoded.startswith(prompt[: start + len(subject)])
    before = tok.decode(list(found.ids[: found.fact]), skip_special_tokens=True)
    assert len(before) < start + len(subject) or before.endswith("�")


def test_last_needs_no_subject(tok: hf.PreTrainedTokenizerBase) -> None:
    prompt = encode_prompt(tok, "Angola is in", None, "last")
    assert prompt.fact == len(prompt.ids) - 1
    assert encode_prompt(tok, "Angola is in", "not there", "last") == prompt


def test_errors(tok: hf.PreTrainedTokenizerBase) -> None:
    for subject in ("", "  "):
        with pytest.raises(RequestError, match="empty"):
            encode_prompt(tok, "Angola is in", subject)
    with pytest.raises(RequestError, match="'Lyon' does not occur"):
        encode_prompt(tok, "Angola is in", "Lyon")
    with pytest.raises(RequestError, match="without one"):
        encode_prompt(tok, "Angola is in", None)
    with pytest.raises(HyperParamsError, match=r"subject_last.*'subject_middle'"):
        encode_prompt(tok, "Angola is in", "Angola", "subject_middle")
    for name, subject in (("last", None), ("subject_last", "Angola")):
        with pytest.raises(RequestError, match="no tokens"):
            encode_prompt(tok, "", subject, name)


def test_targets(tok: hf.PreTrainedTokenizerBase) -> None:
    for target in ("French", "Zoë Łukasz", "東京", "a"):
        ids = encode_target(tok, target)
        assert type(ids) is list
        assert ids == encode_target(tok, f"  {target}\n")
        assert not set(ids) & set(tok.all_special_ids)
        # As it stands behind a prompt: one space, and the very tokens of the text as a whole.
        prompt = encode_text(tok, "She speaks")
        whole = tok.decode(prompt + ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert whole == f"She speaks {target}"
        assert encode_text(tok, f"She speaks {target}") == prompt + ids
    for target in ("", "  ", "\n"):
        with pytest.raises(RequestError, match="blank"):
            encode_target(tok, target)


def test_text_of_no_tokens(tok: hf.PreTrainedTokenizerBase) -> None:
    assert encode_text(tok, "") == []


def test_pad_id() -> None:
    assert pad_id(tiny_tokenizer()) == 0
    without = tiny_tokenizer(pad=False)
    assert without.pad_token_id is None
    assert pad_id(without) == without.eos_token_id == 0
    other = tiny_tokenizer()
    other.pad_token = "<bos>"
    assert pad_id(other) == 1
    nothing = hf.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    assert (nothing.pad_token_id, nothing.eos_token_id) == (None, None)
    assert pad_id(nothing) == 0


def test_collate_pads_on_the_right() -> None:
    batch = collate([[5, 6, 7], [8], (9, 10)], pad=3)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 3, 3], [9, 10, 3]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.lengths.tolist() == [3, 1, 2]
    assert {batch.ids.dtype, batch.mask.dtype, batch.lengths.dtype} == {torch.int64}
    assert collate([[5, 6]], pad=5).mask.tolist() == [[1, 1]]
