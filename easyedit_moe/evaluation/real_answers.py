"""Real answers (the WILD protocol of QAEdit, arXiv 2502.11177): free generation until a stop, then matched.

Teacher forcing shows the model each right token before it asks for the next, and stops where the target does. Here the
model gets the bare prompt, without examples, writes greedily until it ends or a stop comes, and all it wrote is judged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from easyedit_moe.errors import RequestError
from easyedit_moe.evaluation.generation import Answer, check_limit, generate_answers
from easyedit_moe.evaluation.summary import Score
from easyedit_moe.facts.records import EvaluationRecord

Judge = Callable[[str, str, str], bool]
"""Whether an answer is right: called with the question, the target and the answer."""

MATCHES = ("exact", "contains", "judged")


@dataclass(frozen=True)
class RealAnswers:
    """How real answers are asked for and matched.

    Attributes:
        max_new_tokens: most tokens of an answer that neither ends nor stops, >= 1.
        stops: texts that end an answer, none of them empty; what comes before the first one counts. White space at the
            beginning of an answer is no stop.
        judge: decides besides the two matches; none by default.
        judge_name: what results call it.

    Raises:
        RequestError: on construction, for a value out of range.
    """

    max_new_tokens: int = 64
    stops: tuple[str, ...] = ("\n",)
    judge: Judge | None = None
    judge_name: str = ""

    def __post_init__(self) -> None:
        check_limit(self.max_new_tokens)
        if isinstance(self.stops, str) or not all(self.stops):
            raise RequestError(f"stops must be a tuple of texts that are not empty; found {self.stops!r}.")

    def to_dict(self) -> dict[str, Any]:
        """For a result's provenance."""
        return {"max_new_tokens": self.max_new_tokens, "stops": list(self.stops), "judge": self.judge_name or None}


@dataclass(frozen=True)
class AnswerScores:
    """Shares of records, in percent, whose real answer is right; of paraphrases the mean over each record's.

    Attributes:
        exact: the answer is the target, but for case, white space and punctuation around it.
        contains: the target stands in the answer, as whole words in scripts that have them.
        judged: the judge says so; None without one.
        rephrase_exact, rephrase_contains, rephrase_judged: the same after paraphrases.
    """

    exact: Score
    contains: Score
    rephrase_exact: Score
    rephrase_contains: Score
    judged: Score | None = None
    rephrase_judged: Score | None = None


def real_answers(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EvaluationRecord],
    settings: RealAnswers,
    chat: bool = False,
    progress: bool = False,
) -> AnswerScores:
    """Scores of the model's own answers to the prompt and the paraphrases of each record, against the new target.

    Raises:
        RequestError: ``chat`` without a template. JudgeError: the judge can't be reached, or does not say.
    """
    asked = [[record.request.prompt, *record.paraphrases] for record in records]
    prompts = list(dict.fromkeys(prompt for group in asked for prompt in group))
    answers = generate_answers(model, tok, prompts, settings.max_new_tokens, chat, progress=progress)
    said = {prompt: until_stop(answer, settings.stops) for prompt, answer in zip(prompts, answers, strict=True)}
    right = {name: _judged(name, settings, records, asked, said) for name in MATCHES}
    found: dict[str, Any] = {}
    for name, rows in right.items():
        if rows is None:
            continue
        found[name] = Score.of([row[0] for row in rows])
        found[f"rephrase_{name}"] = Score.of([sum(row[1:]) / len(row[1:]) if row[1:] else None for row in rows])
    return AnswerScores(**found)


def _judged(
    name: str,
    settings: RealAnswers,
    records: Sequence[EvaluationRecord],
    asked: Sequence[Sequence[str]],
    said: dict[str, str],
) -> list[list[float]] | None:
    """Per record, whether each of its answers is right; None for a judge that is not there."""
    judges: dict[str, Judge | None] = {
        "exact": lambda question, target, answer: plain(answer) == plain(target),
        "contains": lambda question, target, answer: contains(answer, target),
        "judged": settings.judge,
    }
    judge = judges[name]
    if judge is None:
        return None
    return [
        [float(judge(prompt, record.request.target_new.strip(), said[prompt])) for prompt in group]
        for record, group in zip(records, asked, strict=True)
    ]


def until_stop(answer: Answer, stops: Sequence[str]) -> str:
    """What an answer says before the first stop, stripped."""
    text = answer.text.lstrip()
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def plain(text: str) -> str:
    """A text for comparison: NFKC, case folded, single spaces, without punctuation and spaces around it."""
    line = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return line.strip("".join({c for c in line if unicodedata.category(c)[0] in "PZ"}))


def contains(answer: str, target: str) -> bool:
    """Whether the target stands in the answer; in scripts with spaces not as a part of longer words."""
    wanted, found = plain(target), plain(answer)
    if not wanted:
        return False
    left = r"(?<!\w)" if _in_words(wanted[0]) else ""
    right = r"(?!\w)" if _in_words(wanted[-1]) else ""
    return re.search(left + re.escape(wanted) + right, found) is not None


def _in_words(letter: str) -> bool:
    """Whether a letter or digit is of a script whose words are set apart by spaces."""
    name = unicodedata.name(letter, "")
    return letter.isalnum() and not name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


def with_judge(settings: RealAnswers, judge: Judge, name: str) -> RealAnswers:
    """The same with a judge besides the matches."""
    return replace(settings, judge=judge, judge_name=name)
