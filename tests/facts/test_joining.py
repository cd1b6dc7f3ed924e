"""What stands between a prompt and its answer, as text and as tokens of four kinds of tokenizers."""

from __future__ import annotations

from functools import cache

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.joining import bare_prompt, bare_target, join, separator
from easyedit_moe.facts.tokens import decode, encode_answer, encode_context, encode_pair, encode_prompt, encode_text

JOINED = [
    ("Ana lives in", "Rome", "Ana lives in Rome"),
    ("Ana lives in ", "Rome", "Ana lives in Rome"),
    ("Ana lives in", " Rome", "Ana lives in Rome"),
    ("Ana lives in \t", "  Rome ", "Ana lives in Rome"),
    ("Where does Ana live?\n", "Rome", "Where does Ana live?\nRome"),
    ("Q: where?\nA:", "Rome", "Q: where?\nA: Rome"),
    ("Where?", "Rome", "Where? Rome"),
    ("Ana said: “", "Rome", "Ana said: “Rome"),
    ('Ana said: "', "Rome", 'Ana said: "Rome'),
    ('The town "Rome" is in', "Italy", 'The town "Rome" is in Italy'),
    ("Rome (", "Italy", "Rome (Italy"),
    ("Rome", ", Italy", "Rome, Italy"),
    ("Rome (in Italy", ")", "Rome (in Italy)"),
    ("It costs $", "5", "It costs $5"),
    ("东京是", "日本的首都", "东京是日本的首都"),
    ("首都：", "东京", "首都：东京"),
    ("東京は", "日本", "東京は日本"),
    ("กรุงเทพ", "ไทย", "กรุงเทพไทย"),
    ("The capital of Japan is", "东京", "The capital of Japan is 东京"),
    ("서울은", "한국", "서울은 한국"),
    ("Столица —", "Рим", "Столица — Рим"),
]
MARKS = [
    ("See https://", "x.org", "See https://x.org"),
    ("in path/", "to", "in path/to"),
    ("C:\\", "Users", "C:\\Users"),
    ("2+2=", "4", "2+2=4"),
    ("2 + 2 =", "4", "2 + 2 = 4"),
    ("twenty-", "one", "twenty-one"),
    ("a snake_", "case", "a snake_case"),
    ("Answer -", "one", "Answer - one"),
    ("Rome –", "Italy", "Rome – Italy"),
    ("Ana works with", ".NET", "Ana works with .NET"),
    ("about", ".5", "about .5"),
    ("see", "../x", "see ../x"),
    ("Wait", "...and", "Wait...and"),
    ("Wait", ".", "Wait."),
    ("so", ": it", "so: it"),
    ("Ana", "'s mother's house", "Ana's mother's house"),
    ("Ana", "'s house", "Ana's house"),
    ("they", "'re", "they're"),
    ("Ana", "’s", "Ana’s"),
    ("lives in", "'s-Hertogenbosch", "lives in 's-Hertogenbosch"),
    ("in", "'t Harde", "in 't Harde"),
    ("can", "'t", "can't"),
    ("do", "n't", "don't"),
    ("lives in", "'Rome'", "lives in 'Rome'"),
    ("Ana said '", "Rome", "Ana said 'Rome"),
    ("Ana said 'Rome", "'", "Ana said 'Rome'"),
    ("the dogs'", "tails", "the dogs' tails"),
    ("called 'Ana'", "here", "called 'Ana' here"),
    ("It's Ana's '", "Rome", "It's Ana's 'Rome"),
    ("Er sagt", "»Rom«", "Er sagt »Rom«"),
    ("Er sagt »", "Rom", "Er sagt »Rom"),
    ("Er sagt »Rom", "«", "Er sagt »Rom«"),
    ("Er sagte »ja«", "und", "Er sagte »ja« und"),
    ("Er sagte", "„ja“", "Er sagte „ja“"),
    ("Er sagte „", "ja", "Er sagte „ja"),
    ("Er sagte „ja", "“", "Er sagte „ja“"),
    ("Er sagte „ja“", "und", "Er sagte „ja“ und"),
    ("Er sagte ‚ja‘", "und", "Er sagte ‚ja‘ und"),
    ("Il dit", "« Rome »", "Il dit « Rome »"),
    ("Il dit « ", "Rome", "Il dit « Rome"),
    ("Il dit «\xa0", "Rome", "Il dit «\xa0Rome"),
    ("Il dit « Rome", "»", "Il dit « Rome »"),
    ("Il dit « Rome »", "et", "Il dit « Rome » et"),
    ("Он сказал «", "Рим", "Он сказал «Рим"),
    ("Он сказал «Рим", "»", "Он сказал «Рим»"),
    ("Il dit « oui » puis «", "non", "Il dit « oui » puis « non"),
    ("Han sa ”", "ja", "Han sa ”ja"),
    ("Han sa ”ja”", "och", "Han sa ”ja” och"),
    ("Han sa", "”ja”", "Han sa ”ja”"),
    ("contact us @", "Rome", "contact us @ Rome"),
    ("ana@", "x.org", "ana@x.org"),
    ("item #", "Rome", "item # Rome"),
    ("ranked #", "1", "ranked #1"),
    ("She codes in C#", "and", "She codes in C# and"),
    ("It costs 5 €", "today", "It costs 5 € today"),
    ("costs ₹", "5", "costs ₹5"),
    ("A:", "\nRome", "A:\nRome"),
    ("A:\t", "\tRome\n", "A:\tRome"),
    ("A: ", " \nRome", "A: \nRome"),
    ("東京は\n", "日本", "東京は\n日本"),
    ("今年是2025", "年", "今年是2025年"),
    ("5", "月", "5月"),
    ("In 2025", "东京", "In 2025 东京"),
    ("ＮＨＫ", "東京", "ＮＨＫ東京"),
    ("東京は", "ＮＨＫ", "東京はＮＨＫ"),
    ("the", "ＮＨＫ", "the ＮＨＫ"),
    ("ＮＨＫ", "is", "ＮＨＫ is"),
    ("第１", "回", "第１回"),
    ("La capitale de l'", "Italie", "La capitale de l'Italie"),
    ("Patrick O'", "Neill", "Patrick O'Neill"),
    ('The 5"', "screen", 'The 5" screen'),
    ('The 5" screen is', '"Retina"', 'The 5" screen is "Retina"'),
    ('He said "yes', '"', 'He said "yes"'),
    ('He said "yes', '", then', 'He said "yes", then'),
    ("“Rome", "”", "“Rome”"),
    ("In the '90s Ana said '", "Rome", "In the '90s Ana said 'Rome"),
    ("他说“", "东京", "他说“东京"),
    ("他说", "“东京”", "他说“东京”"),
    ("他说“东京”", "是", "他说“东京”是"),
    ('他说"东京"', "是", '他说"东京"是'),
    ("首都是東京", "。", "首都是東京。"),
    ("Rome", "。", "Rome。"),
    ("ที่", "ไทย", "ที่ไทย"),
    ("ที่", "x", "ที่x"),
    ("use", "%d", "use %d"),
    ("5", "%", "5%"),
    ("smile", ":)", "smile :)"),
    ("std", "::vector", "std::vector"),
    ("Rome", "!", "Rome!"),
    ("He said “Go.”", "Then", "He said “Go.” Then"),
    ("(Rome", ")", "(Rome)"),
    ("Rome", "(Italy)", "Rome (Italy)"),
    ("‘Rome", "’", "‘Rome’"),
    ("on", "’90s", "on ’90s"),
    ("Say 'x', then", "'y'", "Say 'x', then 'y'"),
    ("Say 'x", "', she said", "Say 'x', she said"),
]
"""Marks, quotes of several languages, endings, white space of the answer, fullwidth letters."""
CORPUS = [joined for *_, joined in JOINED] * 4 + ["Ana lives in Rome and Bob lives in Oslo."] * 20


@cache
def tokenizer(kind: str) -> hf.PreTrainedTokenizerFast:
    """Trained on the spot: as GPT-2's, Llama's with and without its dummy prefix, and as tiktoken splits."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind.startswith("sentencepiece"):
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        scheme = "first" if kind.endswith("prefix") else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
        special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
        return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    made = Tokenizer(models.BPE())
    if kind == "tiktoken":
        split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        from tokenizers import Regex

        parts = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    else:
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


KINDS = ["byte-level", "tiktoken", "sentencepiece with prefix", "sentencepiece"]


@pytest.mark.parametrize(("prompt", "target", "joined"), [*JOINED, *MARKS])
def test_texts(prompt: str, target: str, joined: str) -> None:
    assert bare_prompt(prompt) + separator(prompt, target) + bare_target(target) == joined
    assert join(prompt, target) == joined


class Slow(hf.PreTrainedTokenizerFast):
    """A tokenizer that gives no offsets, as slow ones don't."""

    is_fast = False


def with_bos(kind: str, slow: bool = False) -> hf.PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before every text and </s> behind it."""
    made = Tokenizer.from_str(tokenizer(kind).backend_tokenizer.to_str())
    made.add_special_tokens(["</s>"])
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return (Slow if slow else hf.PreTrainedTokenizerFast)(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "target", "joined"), [*JOINED, *MARKS])
def test_tokens_are_those_of_the_joined_text(kind: str, prompt: str, target: str, joined: str) -> None:
    plain = tokenizer(kind)
    ids, answer = encode_pair(plain, prompt, target)
    assert ids
    assert answer == encode_answer(plain, prompt, target)
    assert decode(plain, [*ids, *answer], clean_up_tokenization_spaces=False).strip() == joined
    whole = plain(joined, add_special_tokens=False)
    if [*ids, *answer] != whole["input_ids"]:
        # Only where one token holds the whole prompt, which is then tokenised by itself.
        spans = plain(joined, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert spans[0][1] > len(bare_prompt(prompt))
        assert ids == plain(bare_prompt(prompt), add_special_tokens=False)["input_ids"]
    else:
        # No token of the prompt reaches over the border, and the answer's first one is not the prompt's alone.
        assert bare_prompt(prompt).startswith(decode(plain, ids, clean_up_tokenization_spaces=False).strip("\ufffd"))
    for slow in (False, True):
        tok = with_bos(kind, slow)
        found = encode_pair(tok, prompt, target)
        assert found[0][0] == tok.bos_token_id
        assert [*found[0], *found[1]].count(tok.bos_token_id) == 1
        assert tok.eos_token_id not in found[0] + found[1]
        assert (found[0][1:], found[1]) == (ids, answer)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_beginning_of_text_on_every_path(kind: str, slow: bool) -> None:
    tok = with_bos(kind, slow)
    tok.chat_template = "<s>{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    paths = [
        encode_pair(tok, "<s>Ana lives in", "Rome")[0],
        list(encode_prompt(tok, "<s>Ana lives in", "Ana", target="Rome").ids),
        list(encode_prompt(tok, "Ana lives in", "Ana").ids),
        encode_context(tok, "<s>Ana lives in"),
        encode_text(tok, "<s>Ana"),
        encode_context(tok, "Ana lives in", chat=True),
    ]
    assert [ids.count(tok.bos_token_id) for ids in paths] == [1] * len(paths)
    assert {ids[0] for ids in paths} == {tok.bos_token_id}
    place = encode_prompt(tok, "<s>Ana lives in", "Ana", target="Rome")
    assert decode(tok, place.ids[: place.fact + 1]).replace(" ", "").endswith("Ana")


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_one_text_to_every_kind(kind: str, slow: bool) -> None:
    tok = with_bos(kind, slow)
    turns = "{% for m in messages %}{% if m['role'] == 'user' %}in: {{ m['content'] }}\nis: "
    tok.chat_template = turns + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    for prompt, subject, target in (
        ("Ana lives in ", "Ana", " Rome"),
        ("東京Anaは", "東京", "日本"),
        ("Rome:", "Rome", "is"),
    ):
        text = f"in: {prompt.strip()}\nis: {target.strip()}"
        ids, answer = encode_pair(tok, prompt, target, subject, chat=True)
        assert [*ids, *answer] == encode_text(tok, text)
        assert ids[0] == tok.bos_token_id
        assert decode(tok, answer, skip_special_tokens=True).strip() == target.strip()
        assert encode_context(tok, prompt, chat=True) == encode_text(tok, text.removesuffix(" " + target.strip()))
        place = encode_prompt(tok, prompt, subject, target=target, chat=True)
        assert list(place.ids) == ids
        assert decode(tok, ids[: place.fact + 1]).strip().endswith(subject)


def test_words_that_a_vocabulary_lacks_do_not_move_the_subject() -> None:
    vocab = {word: i for i, word in enumerate(["<unk>", "Ana", "of", "lives", "in", "Rome"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for text in ("Ana of xxx lives in", "xxx Ana lives in", "xxx of yyyyy Ana lives", "of xxx yyy Ana zzz", "Ana xxx"):
        found = []
        for kind in (hf.PreTrainedTokenizerFast, Slow):
            tok = kind(tokenizer_object=made, unk_token="<unk>")
            found.append(encode_prompt(tok, text, "Ana"))
            assert decode(tok, [found[-1].ids[found[-1].fact]]) == "Ana"
        assert found[0] == found[1]
        assert encode_prompt(tok, text, text.split()[-1]).fact == len(text.split()) - 1


def merging(slow: bool, *tokens: str) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of characters, and of words of several characters that it makes wherever it can."""
    letters = sorted(set("the word: Ana東京都港区は\n()abc"))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", *letters])}
    merges = []
    for token in tokens:
        for end in range(2, len(token) + 1):
            if token[:end] not in vocab:
                vocab[token[:end]] = len(vocab)
                merges.append((token[: end - 1], token[end - 1]))
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    return (Slow if slow else hf.PreTrainedTokenizerFast)(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("slow", [False, True])
def test_a_token_over_the_border_is_the_answers(slow: bool) -> None:
    tok = merging(slow, "京都", "(a")

    def texts(prompt: str, target: str, subject: str | None = None) -> tuple[list[str], list[str]]:
        ids, answer = encode_pair(tok, prompt, target, subject)
        return tok.convert_ids_to_tokens(ids), tok.convert_ids_to_tokens(answer)

    assert texts("は東京", "都港区") == (["は", "東"], ["京都", "港", "区"])
    assert texts("Ana (", "abc") == (["A", "n", "a", " "], ["(a", "b", "c"])
    assert encode_prompt(tok, "は東京", "東京", target="都港区").fact == 1
    assert encode_prompt(tok, "は東京", "東京", "last", target="都港区").ids == tuple(
        encode_pair(tok, "は東京", "都")[0]
    )
    # What would leave the prompt or its subject without a token.
    assert texts("京", "都") == (["京"], ["都"])
    assert texts("は京", "都", "京") == (["は", "京"], ["都"])
    assert encode_prompt(tok, "は京", "京", target="都").fact == 1


@pytest.mark.parametrize("kind", KINDS)
def test_space_at_either_side_is_the_same_edit(kind: str) -> None:
    tok = tokenizer(kind)
    wanted = encode_prompt(tok, "Ana lives in", "Ana").ids, encode_answer(tok, "Ana lives in", "Rome")
    for prompt, target in (("Ana lives in ", "Rome"), ("Ana lives in", " Rome"), ("Ana lives in  ", " Rome ")):
        assert (encode_prompt(tok, prompt, "Ana").ids, encode_answer(tok, prompt, target)) == wanted
    whole = tok("Ana lives in Rome", add_special_tokens=False)["input_ids"]
    assert [*wanted[0], *wanted[1]] == whole


def test_a_blank_target_is_refused() -> None:
    with pytest.raises(RequestError, match="blank"):
        encode_answer(tokenizer("byte-level"), "A", " \n")
