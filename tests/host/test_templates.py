"""Braces and the like in the facts of EasyEdit's own methods. What takes ``host`` needs a checkout of EasyEdit."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from easyedit_methods import settings
from tiny import state_of, tiny_model, tiny_tokenizer

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import encode_prompt
from easyedit_moe.host.baseline_hparams import HOST_METHODS
from easyedit_moe.host.baselines import BaselineEditor
from easyedit_moe.host.templates import SLOTTED, host_requests

FACTS = {
    "braces before": EditRequest('{"name": "Zoë", "of": Angola} lives in', "Angola", "Rome"),
    "a slot before": EditRequest("Fill {} and {0} or {x!r:>{width}} for Angola in", "Angola", "Rome"),
    "unbalanced": EditRequest("}}{ Ana from Angola } lives {in", "Angola", "Rome"),
    "doubled": EditRequest("{{Angola}} and {{{{", "Angola", "Rome"),
    "percent": EditRequest("100% of %s, %(x)d and %% in Angola live 5%d in", "Angola", "Rome"),
    "backslashes": EditRequest(r"C:\new\{Angola}\1 \g<0> is \u007b in", "Angola", "Rome"),
    "in the subject": EditRequest("The set {a, {}} is in {", "{a, {}}", "Rome"),
    "in the target": EditRequest("Angola is in {", "Angola", "{Rome {} in} {Paris"),
    "subject twice": EditRequest("Angola {is} in Angola, and Angolan", "Angola", "Rome"),
    "inside another word": EditRequest("Angolan {Ana} from Angola lives in", "Angola", "Rome"),
    "another form": EditRequest("{The  twin} city of Zoe\u0308  Łukasz is", "Zoë Łukasz", "Rome"),
    "white space at the ends": EditRequest("{Ana} from Angola lives in ", " Angola ", " Rome "),
}


pytestmark = pytest.mark.usefixtures("own_folder", "no_editing_warnings")


def lookups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """Token ids and index of each sentence in which EasyEdit looks for the subject, as they come up."""
    from easyeditor.models.rome import repr_tools

    found: list[tuple[list[int], int]] = []
    original = repr_tools.get_words_idxs_in_templates

    def recording(tok: Any, context_templates: Any, words: Any, subtoken: str) -> Any:
        indices = original(tok, context_templates, words, subtoken)
        for template, word, (index,) in zip(context_templates, words, indices, strict=True):
            found.append((tok(template.format(word))["input_ids"], index))
        return indices

    monkeypatch.setattr(repr_tools, "get_words_idxs_in_templates", recording)
    return found


@pytest.mark.parametrize("specials", ["", "bos"])
@pytest.mark.parametrize("method", SLOTTED)
@pytest.mark.parametrize("name", FACTS)
def test_the_edited_token_is_the_one_we_compute(
    name: str, method: str, specials: str, host: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact, tok, model = FACTS[name], tiny_tokenizer(specials), tiny_model()
    editor = BaselineEditor(settings(data, method))
    found = lookups(monkeypatch)
    before = state_of(model)
    patch = editor.edit(model, tok, [fact]).patch
    ours = encode_prompt(tok, fact.prompt, fact.subject)
    bare = [(ids, index) for ids, index in found if tuple(ids[: len(ours.ids)]) == ours.ids]
    assert len(bare) > 1
    assert {index for _, index in bare} == {ours.fact}
    # Behind a generated context the prompt is the same, and the token as well.
    assert {ids[index] for ids, index in found if tok.decode(ids).find(" is a") < 0} == {ours.ids[ours.fact]}
    patch.restore(model)
    assert all(torch.equal(p, before["parameters"][n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("method", HOST_METHODS)
@pytest.mark.parametrize("name", ["a slot before", "unbalanced", "in the target", "backslashes"])
def test_the_model_is_given_the_text_itself(name: str, method: str, host: ModuleType, data: Path) -> None:
    fact, tok, model = FACTS[name], tiny_tokenizer(), tiny_model()
    rows: list[str] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: rows.extend(tok.decode(ids, skip_special_tokens=True) for ids in args[0])
    )
    other = EditRequest("Ana {met} Anabel in", "Ana", "Paris")
    BaselineEditor(settings(data, method)).edit(model, tok, [fact, other])
    hook.remove()
    whole = tok.decode(tok(f"{fact.prompt} {fact.target_new}")["input_ids"][:-1])
    assert any(row.startswith(whole) for row in rows)
    assert any(row.startswith("Ana {met} Anabel in") for row in rows)
    assert not any("\uf8c0" <= char <= "\uf8ff" for row in rows for char in row)


def test_facts_without_braces_are_given_as_they_are() -> None:
    tok = tiny_tokenizer()
    (request,), given = host_requests(tok, [EditRequest("Ana from Angola is in", "Angola", "Rome", "Lyon")], "FT")
    assert given is tok
    assert request == {
        "prompt": "Ana from Angola is in", "subject": "Angola", "target_new": "Rome", "ground_truth": "Lyon",
        "case_id": 0,
    }  # fmt: skip
    (request,), _ = host_requests(tok, [EditRequest("Ana from Angola is in", "Angola", "Rome")], "ROME")
    assert request["prompt"] == "Ana from {} is in"


def test_characters_for_private_use_of_the_facts_stay_theirs() -> None:
    tok, used = tiny_tokenizer(), "".join(chr(code) for code in range(0xF8C0, 0xF8F0))
    fact = EditRequest(f"{used} {{Angola}} is in", "Angola", "Rome")
    (request,), given = host_requests(tok, [fact], "MEMIT")
    assert given(request["prompt"].format("Angola"))["input_ids"] == tok(fact.prompt)["input_ids"]
    assert given.encode(request["prompt"].format("Angola")) == tok.encode(fact.prompt)
    assert given.padding_side == tok.padding_side
    everything = EditRequest("".join(chr(code) for code in range(0xF8C0, 0xF900)) + "{", None, "Rome")
    with pytest.raises(RequestError, match=r"U\+F8C0 to U\+F8FF"):
        host_requests(tok, [everything], "FT")
