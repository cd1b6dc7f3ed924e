"""Chats: what templates put around a question, and where the answer begins; templates of many makers, written here."""

from __future__ import annotations

import pytest
import transformers as hf
from tiny import chat_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, processors

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.chat import user_turn, writes_the_date
from easyedit_moe.facts.tokens import cut_context, decode, encode_context, encode_pair, encode_prompt, encode_text

LOOP = "{% for m in messages %}"
TURNS = LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
ASKED = "{% if add_generation_prompt %}"

# Name -> template, what stands before a question, and between it and the answer.
TEMPLATES = {
    "plain turns": (
        TURNS + ASKED + "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "a switch that closes the thought (Qwen3)": (
        TURNS + ASKED + "<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "a switch of another name (DeepSeek)": (
        LOOP + "{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}<|Assistant|></think>{{ m['content'] }}"
        "{% endif %}{% endfor %}"
        + ASKED + "<|Assistant|>{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}",
        "<|User|>", "<|Assistant|></think>",
    ),
    "a thought that is always open": (
        LOOP + "{% if m['role'] == 'user' %}<u>{{ m['content'] }}{% else %}<a>{{ m['content'] }}{% endif %}{% endfor %}"
        + ASKED + "<a><think>\n{% endif %}",
        "<u>", "<a>",
    ),
    "a thought that is closed in histories only (thinking models)": (
        LOOP + "{% if m['role'] == 'user' %}<u>{{ m['content'] }}{% else %}<a><think>\n\n</think>\n\n{{ m['content'] }}"
        "{% endif %}{% endfor %}" + ASKED + "<a><think>\n{% endif %}",
        "<u>", "<a><think>\n\n</think>\n\n",
    ),
    "channels (GPT-OSS)": (
        LOOP + "{% if m['role'] == 'user' %}<|start|>user<|message|>{{ m['content'] }}<|end|>{% else %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        + ASKED + "<|start|>assistant{% endif %}",
        "<|start|>user<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "a space before answers (Llama 2)": (
        "{{ bos_token }}" + LOOP + "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]{% else %} "
        "{{ m['content'] }} </s>{% endif %}{% endfor %}",
        "<bos>[INST] ", " [/INST] ",
    ),
    "no answers in histories": (
        LOOP + "{% if m['role'] != 'user' %}{{ raise_exception('users only') }}{% endif %}Q: {{ m['content'] }}\n"
        "{% endfor %}" + ASKED + "A:{% endif %}",
        "Q: ", "\nA:",
    ),
    "parts of content (multimodal models)": (
        LOOP + "<{{ m['role'] }}>{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
        + ASKED + "<assistant>{% endif %}",
        "<user>", "<assistant>",
    ),
    "a thought in other brackets": (
        LOOP + "{% if m['role'] == 'user' %}<u>{{ m['content'] }}{% else %}<a>◁think▷◁/think▷{{ m['content'] }}"
        "{% endif %}{% endfor %}" + ASKED + "<a>◁think▷{% endif %}",
        "<u>", "<a>◁think▷◁/think▷",
    ),
    "a system text of its own": (
        "<sys>Be kind.</sys>" + TURNS + ASKED + "<|im_start|>assistant\n{% endif %}",
        "<sys>Be kind.</sys><|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_around_a_question(name: str) -> None:
    template, before, after = TEMPLATES[name]
    turn = user_turn(chat_tokenizer(template=template))
    assert (turn.before, turn.after) == (before, after)


@pytest.mark.parametrize("specials", ["", "bos", "bos eos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_question_and_answer_are_one_text(name: str, specials: str) -> None:
    template, before, after = TEMPLATES[name]
    tok = chat_tokenizer(specials, template)
    wants_bos = "bos" in specials or before.startswith("<bos>")
    for asked in ("Danielle Darrieux speaks", "Danielle Darrieux speaks  "):
        ids, answer = encode_pair(tok, asked, " Polish", "Danielle Darrieux", chat=True)
        text = before + "Danielle Darrieux speaks" + after
        whole = decode(tok, [*ids, *answer]).removeprefix("<bos>")
        assert whole == text.removeprefix("<bos>") + "Polish"
        assert decode(tok, answer).strip() == "Polish"
        assert [*ids, *answer].count(tok.bos_token_id) == int(wants_bos)
        assert tok.eos_token_id not in [*ids, *answer]
        assert [*ids, *answer] == encode_text(tok, text + "Polish")
        prompt = encode_prompt(tok, asked, "Danielle Darrieux", "subject_last", "Polish", chat=True)
        assert list(prompt.ids) == ids
        assert decode(tok, ids[: prompt.fact + 1]).endswith("Danielle Darrieux")
        last = encode_prompt(tok, asked, "Danielle Darrieux", "last", "Polish", chat=True)
        assert last.fact == len(ids) - 1
        context = encode_context(tok, asked, chat=True)
        assert decode(tok, context).removeprefix("<bos>") == text.removeprefix("<bos>").rstrip(" ")


@pytest.mark.parametrize("written", ["<bos><eos>", "<bos>", ""])
def test_what_a_tokenizer_puts_before_every_text_is_there_once(written: str) -> None:
    """As GLM's, which begins with two special tokens that its template writes as well."""
    tok = chat_tokenizer("bos", written + "<user>{{ messages[0]['content'] }}<assistant>")
    made = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    ids = [(name, made.token_to_id(name)) for name in ("<bos>", "<eos>")]
    made.post_processor = processors.TemplateProcessing(single="<bos> <eos> $A", special_tokens=ids)
    tok = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>",
                                     chat_template=tok.chat_template)  # fmt: skip
    found = encode_pair(tok, "Ana speaks", "Polish", chat=True)[0]
    expected = tok(written + "<user>Ana speaks<assistant>", add_special_tokens=False)["input_ids"]
    if written == "<bos><eos>":
        assert found == expected
    else:
        assert found == [tok.bos_token_id, tok.eos_token_id, *expected]


def test_dates() -> None:
    assert writes_the_date(chat_tokenizer(template="{{ strftime_now('%Y') }}"))
    assert not writes_the_date(chat_tokenizer())
    assert not writes_the_date(tiny_tokenizer())


def test_a_subject_is_looked_for_in_the_question() -> None:
    template = "user of assistant: " + TURNS + ASKED + "<|im_start|>assistant\n{% endif %}"
    tok = chat_tokenizer(template=template)
    found = encode_prompt(tok, "The assistant of Ana speaks", "assistant", chat=True)
    assert decode(tok, found.ids[: found.fact + 1]).endswith("user\nThe assistant")
    with pytest.raises(RequestError, match="'user' does not occur"):
        encode_prompt(tok, "Ana speaks", "user", chat=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", "no users here"),
        ("nothing", "as it is"),
        (LOOP + "{{ m['content'] | upper }}{% endfor %}", "as it is"),
        (LOOP + "{{ m['content'] }}{{ m['content'] }}{% endfor %}", "once"),
    ],
)
def test_templates_that_can_not_be_used(template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode_pair(chat_tokenizer(template=template), "Ana speaks", "Polish", chat=True)


def test_no_template() -> None:
    for call in (encode_context, user_turn):
        with pytest.raises(RequestError, match="no chat template"):
            call(tiny_tokenizer(), **({"prompt": "Ana", "chat": True} if call is encode_context else {}))


@pytest.mark.parametrize("specials", ["", "bos"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_long_question_is_cut_behind_what_must_stay(chat: bool, specials: str) -> None:
    tok = chat_tokenizer(specials)
    ids = encode_context(tok, "The quick brown fox jumps over the lazy dog and then speaks", chat)
    assert cut_context(tok, ids, None, chat) == cut_context(tok, ids, len(ids), chat) == ids
    cut = cut_context(tok, ids, 20, chat)
    assert len(cut) == 20
    text = decode(tok, cut)
    head = ("<bos>" if specials else "") + ("<user>" if chat else "")
    assert text.startswith(head)
    assert text.endswith("speaks\n<assistant>" if chat else "speaks")
    assert cut_context(tok, ids, 1, chat) == ids[-1:]
