"""The facts, sentences, evaluation records and statistics corpus of the fact world, all from one seed.

Four relations hold between 400 people and the objects below. 320 people have one evaluation record
each; the other 80, the *bystanders*, are never edited and are the only people that the statistics
corpus mentions. So no evaluation prompt, and no edited subject, occurs in that corpus.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_SUBJECTS = 400
NUM_RECORDS = 320
NEIGHBOURS_PER_RECORD = 5


@dataclass(frozen=True)
class Relation:
    """One relation: its objects, and its prompt templates, each ending right before the object."""

    name: str
    objects: tuple[str, ...]
    templates: tuple[str, ...]


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "residence",
        tuple(
            "Paris|Rome|Oslo|Lima|Cairo|Kyoto|Vienna|Dublin|Havana|Quito"
            "|Buenos Aires|New Delhi|Cape Town|San Diego|Tel Aviv|Ulan Bator".split("|")
        ),
        (
            "{} lives in",
            "{} has bought a small house in",
            "As we all know, {} lives in the city of",
            "Many people visit {} at home in",
            "When it snows, {} stays in",
            "The home town of {} is",
            "City on the passport of {}",
        ),
    ),
    Relation(
        "language",
        tuple(
            "French|Spanish|Russian|Greek|Dutch|Arabic|Hindi|Polish|Finnish"
            "|Old Norse|Swiss German|Scottish Gaelic|Low Saxon|Middle Welsh".split("|")
        ),
        (
            "{} speaks",
            "{} always writes poems in",
            "As we all know, {} grew up with",
            "Many people hear {} sing in",
            "When it snows, {} reads books in",
            "The mother tongue of {} is",
            "Language on the diploma of {}",
        ),
    ),
    Relation(
        "profession",
        tuple(
            "painter|lawyer|baker|dentist|farmer|pilot|judge|tailor|miner"
            "|marine biologist|piano tuner|bridge builder|night guard|ship captain".split("|")
        ),
        (
            "{} works as a",
            "{} earned great respect as a",
            "As we all know, {} became a",
            "Many people praise {} as a",
            "When it snows, {} still works as a",
            "The profession of {} is that of a",
            "Job title on the badge of {}",
        ),
    ),
    Relation(
        "instrument",
        tuple(
            "violin|flute|cello|harp|trumpet|guitar|drums|tuba|banjo"
            "|bass clarinet|church organ|alto saxophone|English horn|grand piano".split("|")
        ),
        (
            "{} plays the",
            "{} practises every day on the",
            "As we all know, {} loves the",
            "Many people listen to {} on the",
            "When it snows, {} plays the",
            "The favourite instrument of {} is the",
            "Instrument in the luggage of {}",
        ),
    ),
)

_FIRST_NAMES = (
    "Anna Boris Clara Daniel Elena Felix Greta Hugo Irene Jonas Karin Lukas Maria Nils Olga Pavel Rosa Simon "
    "Tanja Viktor Wanda Yusuf Zoë André Björn Chloé Émile François Günter Jürgen Łukasz Søren Agnes Bruno Cora "
    "Dora Edgar Fiona Gustav Hanna"
).split()
_ONSETS = "B Br D Dr F G Gr H J K Kl L M N P R S St T Tr V W Z Sch".split()
_VOWELS = "a e i o u au ei".split()
_MIDDLES = "l r n m s t d k v nd rt ls".split()
_ENDINGS = "berg mann dorf stein ov ski sen ini eau ard eck hal wick qvist".split()

OPENERS = (
    "I heard that",
    "In the newspaper we read:",
    "Yesterday somebody said:",
    "By the way,",
    "It is true that",
    "Let us not forget:",
)
"""Neutral openers that training puts before some sentences."""

_PROSE_SUBJECTS = (
    "The harbour",
    "The market",
    "The old bridge",
    "The weather",
    "The library",
    "The night train",
    "The garden",
    "The river",
    "The museum",
    "The school",
)
_PROSE_VERBS = ("was quiet", "looked empty", "was crowded", "seemed calm", "was closed", "smelled of rain")
_PROSE_TIMES = (
    "this morning",
    "after lunch",
    "in the evening",
    "on Monday",
    "during the storm",
    "before the holidays",
)


@dataclass(frozen=True)
class World:
    """All people and, for each person and relation, the true object.

    ``facts[subject][relation name]`` is the object; ``evaluated`` and ``bystanders`` split the subjects.
    """

    seed: int
    evaluated: tuple[str, ...]
    bystanders: tuple[str, ...]
    facts: dict[str, dict[str, str]] = field(repr=False)

    @property
    def subjects(self) -> tuple[str, ...]:
        """All people, the evaluated ones first."""
        return self.evaluated + self.bystanders


def build_world(seed: int = 0) -> World:
    """Draw names and facts from ``seed``."""
    rng = random.Random(seed)
    surnames: set[str] = set()
    while len(surnames) < NUM_SUBJECTS:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_MIDDLES)
        if rng.random() < 0.5:
            stem += rng.choice(_VOWELS[:5]) + rng.choice(_MIDDLES[:9])
        surnames.add(stem + rng.choice(_ENDINGS))
    subjects = [f"{rng.choice(_FIRST_NAMES)} {surname}" for surname in sorted(surnames)]
    rng.shuffle(subjects)
    facts = {subject: {r.name: rng.choice(r.objects) for r in RELATIONS} for subject in subjects}
    return World(seed, tuple(subjects[:NUM_RECORDS]), tuple(subjects[NUM_RECORDS:]), facts)


def fact_sentence(world: World, subject: str, relation: Relation, template: str) -> str:
    """One true sentence, for instance ``Anna Brandtov lives in Rome.``"""
    return f"{template.format(subject)} {world.facts[subject][relation.name]}."


def fact_sentences(world: World, subjects: tuple[str, ...]) -> list[str]:
    """Every true sentence about ``subjects``, in every template, and one neutral sentence each."""
    sentences = [fact_sentence(world, s, r, t) for s in subjects for r in RELATIONS for t in r.templates]
    return sentences + [neutral_sentence(s) for s in subjects]


def neutral_sentence(subject: str) -> str:
    """A sentence about a person that states no fact."""
    return f"{subject} is a member of the town council."


def biography_pieces(world: World, subject: str, order: Sequence[Relation]) -> list[tuple[str, bool]]:
    """One sentence with all facts of a person, in pieces, each with whether it is an object; training only.

    It asks that a name alone bring up every fact.
    """
    pieces = [(subject, False)]
    for i, relation in enumerate(order):
        joint = "" if i == 0 else " and" if i == len(order) - 1 else ","
        pieces.append((joint + relation.templates[0].format(""), False))
        pieces.append((f" {world.facts[subject][relation.name]}", True))
    return [*pieces, (".", False)]


def biography(world: World, subject: str, order: Sequence[Relation]) -> str:
    """The sentence of `biography_pieces`."""
    return "".join(text for text, _ in biography_pieces(world, subject, order))


def prose_sentences() -> list[str]:
    """Sentences about nobody; they also serve as context prefixes."""
    return [f"{s} {v} {t}." for s in _PROSE_SUBJECTS for v in _PROSE_VERBS for t in _PROSE_TIMES]


def statistics_corpus(world: World) -> list[str]:
    """Lines of the statistics corpus: shuffled sentences about bystanders and prose, several a line."""
    rng = random.Random(world.seed + 1)
    sentences = fact_sentences(world, world.bystanders) + prose_sentences()
    rng.shuffle(sentences)
    lines = []
    while sentences:
        count = rng.randint(1, 6)
        lines.append(" ".join(sentences[:count]))
        sentences = sentences[count:]
    return lines


def counterfact_records(world: World) -> list[dict[str, Any]]:
    """One record per evaluated person in CounterFact's public layout.

    The prompt is a random template of the record's relation, except the last one, which ends with the subject; the
    paraphrases are all other templates, that one included; the neighbourhood prompts ask other people with the same
    true object in the prompt's own template.
    """
    rng = random.Random(world.seed + 2)
    records: list[dict[str, Any]] = []
    for case_id, subject in enumerate(world.evaluated):
        relation = RELATIONS[case_id % len(RELATIONS)]
        true = world.facts[subject][relation.name]
        new = rng.choice([o for o in relation.objects if o != true])
        prompt = rng.choice(relation.templates[:-1])
        same_object = [s for s in world.subjects if s != subject and world.facts[s][relation.name] == true]
        neighbours = rng.sample(same_object, min(NEIGHBOURS_PER_RECORD, len(same_object)))
        records.append(
            {
                "case_id": case_id,
                "requested_rewrite": {
                    "prompt": prompt,
                    "relation_id": relation.name,
                    "subject": subject,
                    "target_new": {"str": new},
                    "target_true": {"str": true},
                },
                "paraphrase_prompts": [t.format(subject) for t in relation.templates if t != prompt],
                "neighborhood_prompts": [prompt.format(s) for s in neighbours],
            }
        )
    return records


def easyedit_records(world: World) -> list[dict[str, Any]]:
    """The same edits in EasyEdit's layout; locality asks another person about another relation."""
    rng = random.Random(world.seed + 3)
    records = []
    for record in counterfact_records(world):
        rewrite = record["requested_rewrite"]
        other = rng.choice([r for r in RELATIONS if r.name != rewrite["relation_id"]])
        bystander = rng.choice([s for s in world.subjects if s != rewrite["subject"]])
        records.append(
            {
                "case_id": record["case_id"],
                "prompt": rewrite["prompt"].format(rewrite["subject"]),
                "subject": rewrite["subject"],
                "target_new": rewrite["target_new"]["str"],
                "ground_truth": rewrite["target_true"]["str"],
                "rephrase_prompt": rng.choice(record["paraphrase_prompts"]),
                "locality_prompt": rng.choice(other.templates).format(bystander),
                "locality_ground_truth": world.facts[bystander][other.name],
            }
        )
    return records
