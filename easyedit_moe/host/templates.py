"""Facts as EasyEdit's methods take them: prompts with one slot, in which all other braces are text.

EasyEdit fills its templates by ``str.format``, and counts tokens both before and after. Braces of a fact's own are
therefore written as two characters for private use, which a tokenizer for EasyEdit turns back before it looks at them.
A third one is put before a subject that the prompt has again elsewhere, which AlphaEdit would make a second slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError
from easyedit_moe.facts.joining import bare_prompt
from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.facts.tokens import subject_span

SLOTTED = ("ROME", "MEMIT", "AlphaEdit")
"""``alg_name`` of methods that look for the subject; the others take the prompt as it is."""
_PRIVATE = [chr(code) for code in range(0xF8C0, 0xF900)]
"""Characters that no alphabet has: the end of the private use area, since fonts and models use its start."""


def host_requests(
    tok: PreTrainedTokenizerBase, facts: Sequence[EditRequest], alg_name: str
) -> tuple[list[dict[str, Any]], PreTrainedTokenizerBase]:
    """EasyEdit's dicts of one batch, and the tokenizer to give it with them.

    The slot of a prompt is where `easyedit_moe.facts.subjects.find_subject` finds the subject, and only there, while
    EasyEdit would put one wherever the subject's letters are. EasyEdit joins prompt and target by a space of its own.

    Raises:
        RequestError: a batch that has nearly all of the 64 characters that could stand for braces.
    """
    texts = "".join(text for fact in facts for text in vars(fact).values() if text)
    free = [char for char in _PRIVATE if char not in texts][:3]
    if len(free) < 3:
        raise RequestError("The facts have all characters U+F8C0 to U+F8FF, of which EasyEdit needs three for braces.")
    mark, hidden = free[0], str.maketrans("{}", "".join(free[1:]))
    found, marked = [], False
    for number, fact in enumerate(facts):
        prompt, target = bare_prompt(fact.prompt), fact.target_new.strip()
        request = vars(fact) | {"case_id": number, "prompt": prompt.translate(hidden), "target_new": target}
        if fact.subject is not None and alg_name in SLOTTED:
            start, end = subject_span(prompt, fact.subject)
            request["prompt"] = prompt[:start].translate(hidden) + "{}" + prompt[end:].translate(hidden)
            request["subject"] = prompt[start:end]
            if request["subject"] in request["prompt"]:
                request["subject"], marked = mark + request["subject"], True
        found.append(request)
    if not marked and "{" not in texts and "}" not in texts and alg_name != "WISE":
        return found, tok
    wrapped: Any = _Tokenizer(tok, hidden, mark, [request["target_new"] for request in found])
    return found, wrapped


class _Tokenizer:
    """A tokenizer that reads hidden braces as braces, and hides those that EasyEdit puts into templates."""

    def __init__(self, tok: PreTrainedTokenizerBase, hidden: dict[int, int], mark: str, targets: Sequence[str]) -> None:
        self._tok, self._hidden, self._targets = tok, hidden, targets
        self._shown = {ord(mark): None, **{char: brace for brace, char in hidden.items()}}

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        texts = text.translate(self._shown) if isinstance(text, str) else [t.translate(self._shown) for t in text]
        return self._tok(texts, *args, **kwargs)

    def encode(self, text: str, *args: Any, **kwargs: Any) -> Any:
        return self._tok.encode(text.translate(self._shown), *args, **kwargs)

    def decode(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
        """A target without its last token goes into a template; anything else EasyEdit frees of braces itself."""
        text: Any = self._tok.decode(ids, *args, **kwargs)
        begins = any(target.startswith(text.strip()) for target in self._targets)
        return text.translate(self._hidden) if begins else text

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """Generated texts, which WISE makes templates of as they are."""
        return [text.replace("{", "").replace("}", "") for text in self._tok.batch_decode(*args, **kwargs)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tok, name)
