"""What is edited in a life of edits (`lifelong.py`), of the bundled world or of records, and what is asked beside."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from general_ability_tasks import help_topics
from torch import nn

from easyedit_moe import factworld
from easyedit_moe.errors import DataError
from easyedit_moe.evaluation.generation import generate_answers
from easyedit_moe.evaluation.scoring import score_targets
from easyedit_moe.facts.records import load_records
from easyedit_moe.facts.requests import EditRequest, parse_requests
from easyedit_moe.facts.tokens import encode_text
from easyedit_moe.factworld.world import RELATIONS, build_world
from easyedit_moe.moe.config import context_length
from easyedit_moe.statistics.corpus import load_texts
from easyedit_moe.storage.files import write_text

APART = 100
"""Edits between two of one fact at least, so that no batch holds both."""
FIRST = 100
"""Edits of which every second fact is never edited again; their retention is watched."""
LEAST = APART + FIRST // 2 + 1
"""Facts of which one can always be edited."""
OWN_TOKENS = 3
"""Tokens of a language model's own answer, which it is to keep."""
LEAST_WORDS = 30
"""Of a paragraph of prose."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Stream:
    """Edits in their order, and what is asked besides.

    Attributes:
        edits: a prompt that comes again supersedes its earlier target.
        retained: of the first edits, those that nothing supersedes, as (prompt, target).
        untouched: facts of people that are never edited.
        texts: of the same people, as (beginning, rest), for the perplexity.
        strangers: of ``untouched`` people, those whom the statistics' corpus is not to mention.
        unseen: facts of strangers, which are in ``untouched`` no more.
    """

    edits: tuple[EditRequest, ...]
    retained: tuple[Pair, ...]
    untouched: tuple[Pair, ...]
    texts: tuple[Pair, ...]
    strangers: tuple[str, ...] = ()
    unseen: tuple[Pair, ...] = ()

    def latest(self, start: int, stop: int) -> list[Pair]:
        """The facts of some edits with the values they have at the last of them."""
        return list({one.prompt: one.target_new for one in self.edits[start:stop]}.items())


@dataclass(frozen=True)
class Fact:
    """What can be edited: a prompt of ``subject``, the answer that holds at first, and all that it may become."""

    prompt: str
    subject: str
    value: str
    answers: tuple[str, ...]


def drawn(facts: Sequence[Fact], count: int, rng: random.Random) -> tuple[EditRequest, ...]:
    """``count`` edits, each of a fact to another answer than it has by then; every second one of the first hundred is
    never edited again.

    Raises:
        DataError: so few facts that none is left to edit.
    """
    if len(facts) < LEAST:
        raise DataError(f"A life of edits needs {LEAST} different facts or more; found {len(facts)}.")
    value = {one.prompt: one.value for one in facts}
    recent: list[str] = []
    made: list[EditRequest] = []
    while len(made) < count:
        fact = rng.choice(facts)
        if fact.prompt in recent[-APART:] or (len(made) >= FIRST and fact.prompt in recent[:FIRST:2]):
            continue
        value[fact.prompt] = rng.choice([one for one in fact.answers if one != value[fact.prompt]])
        recent.append(fact.prompt)
        # One by one: together, they would have to agree.
        one = {"prompt": fact.prompt, "subject": fact.subject, "target_new": value[fact.prompt]}
        made += parse_requests([one])
    return tuple(made)


def retained(edits: Sequence[EditRequest]) -> list[Pair]:
    """Of the first hundred, those that nothing supersedes."""
    last = {one.prompt: number for number, one in enumerate(edits)}
    return [(one.prompt, one.target_new) for n, one in enumerate(edits[:FIRST]) if last[one.prompt] == n]


def stream(count: int, asked: int, seed: int = 0, strangers: int = 0) -> Stream:
    """``count`` edits drawn from the bundled world; of what is asked besides, at most ``asked`` of each kind."""
    world = build_world()
    facts = [
        Fact(relation.templates[0].format(person), person, world.facts[person][relation.name], tuple(relation.objects))
        for person in world.evaluated
        for relation in RELATIONS
    ]
    edits = drawn(facts, count, random.Random(seed))
    seen = world.bystanders[: len(world.bystanders) - strangers]
    away = world.bystanders[len(seen) :]
    untouched, unseen = (
        [(r.templates[0].format(p), world.facts[p][r.name]) for p in people for r in RELATIONS]
        for people in (seen, away)
    )
    lines = [line.partition(". ") for line in load_texts(factworld.MODEL_NAME)]
    texts = [(f"{head}.", rest) for head, _, rest in lines if rest]
    parts = (untouched, texts, retained(edits), unseen)
    draw = random.Random(seed)  # the same sample however many edits there are
    some = [tuple(draw.sample(part, min(asked, len(part)))) for part in parts]
    return Stream(edits, some[2], some[0], some[1], away, some[3])


def record_stream(path: Path, model: nn.Module, tok: Any, count: int, asked: int, seed: int = 0) -> Stream:
    """``count`` edits of the facts in a file of records, each to its new answer, back to its true one, and so on.

    "Never edited" are the records' neighbours, with the first tokens that the unedited ``model`` writes after them; the
    perplexity is that of the second half of paragraphs of Python's help topics.

    Raises:
        DataError: a file that can't be read, or fewer facts with a subject and a true answer than it takes.
    """
    records = load_records(path).records
    requests = {
        one.prompt: one
        for one in (record.request for record in records)
        if one.subject and one.ground_truth and one.ground_truth != one.target_new
    }
    facts = [
        Fact(one.prompt, str(one.subject), str(one.ground_truth), (str(one.ground_truth), one.target_new))
        for one in requests.values()
    ]
    edits = drawn(facts, count, random.Random(seed))
    draw = random.Random(seed)  # the same sample however many edits there are
    beside = [*dict.fromkeys(prompt for record in records for prompt, _ in record.neighbours if prompt not in requests)]
    own = own_answers(model, tok, draw.sample(beside, min(asked, len(beside))))
    parts = (prose(tok, context_length(model)), retained(edits))
    some = [tuple(draw.sample(part, min(asked, len(part)))) for part in parts]
    return Stream(edits, some[1], tuple(own), some[0])


def own_answers(model: nn.Module, tok: Any, prompts: Sequence[str]) -> list[Pair]:
    """Prompts with what a model writes first after them; without those whose answer is tokenised in another way."""
    found = generate_answers(model, tok, prompts, OWN_TOKENS)
    pairs = [(prompt, one.text) for prompt, one in zip(prompts, found, strict=True) if one.text.strip()]
    return [pair for pair, score in zip(pairs, score_targets(model, tok, pairs), strict=True) if score.exact]


def prose(tok: Any, limit: int | None) -> list[Pair]:
    """Paragraphs of Python's help topics that are sentences, in two halves; without those of ``limit`` tokens or more,
    which are more than the model can read.
    """
    found = []
    for part in (part for text in help_topics() for part in re.split(r"\n\s*\n", text)):
        words = part.split()
        if len(words) >= LEAST_WORDS and words[0][0].isupper() and words[-1].endswith("."):
            half = len(words) // 2
            found.append((" ".join(words[:half]), " ".join(words[half:])))
    return [pair for pair in found if limit is None or len(encode_text(tok, " ".join(pair))) < limit]


def corpus(alone: int, strangers: Sequence[str], path: Path) -> dict[str, Any]:
    """Settings of statistics that are of the bundled texts and, ``alone`` times, of each name that is never edited;
    without what mentions strangers.

    Facts are edited at the last token of a name, and of the texts' tokens few are such: what is kept of them weighs
    accordingly.
    """
    known = [one for one in build_world().bystanders if one not in strangers]
    texts = [text for text in load_texts(factworld.MODEL_NAME) if not any(one in text for one in strangers)]
    texts += known * alone
    random.Random(0).shuffle(texts)
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"mom2_dataset": str(path), "mom2_n_samples": len(texts)}
