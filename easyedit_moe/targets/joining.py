"""Facts that lie at one token, such as several relations of one person, whose prompts begin with the name.

The states at such a token are the same for all of them, so one target vector has to serve them all: of vectors that
were found for each alone, a solver can write no more than the mean, and the next one undoes those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from easyedit_moe.facts.requests import EditRequest

Place = tuple[int, ...]
"""Where a fact lies: the tokens of its bare prompt up to the fact token, which alone decide the states there."""


@dataclass(frozen=True)
class JoinedFacts:
    """Requests in groups of those that get one target.

    Attributes:
        facts: of each group, first those of the batch, then earlier ones.
        numbers: per request of the batch, its group.
    """

    facts: list[list[EditRequest]]
    numbers: list[int]


def joined_facts(
    requests: Sequence[EditRequest], places: Sequence[Place], earlier: Mapping[Place, Mapping[str, EditRequest]]
) -> JoinedFacts:
    """Groups by place; without places each request is one.

    Args:
        requests: of a batch, none of which asks twice of one prompt.
        places: where each lies, or nothing.
        earlier: facts of earlier batches by place and prompt; a prompt that is asked of again counts as it is now.
    """
    if not places:
        return JoinedFacts([[one] for one in requests], list(range(len(requests))))
    found: dict[Place, list[EditRequest]] = {}
    for request, place in zip(requests, places, strict=True):
        found.setdefault(place, []).append(request)
    numbers = {place: number for number, place in enumerate(found)}
    for place, group in found.items():
        now = {one.prompt for one in group}
        group += [one for prompt, one in earlier.get(place, {}).items() if prompt not in now]
    return JoinedFacts(list(found.values()), [numbers[place] for place in places])
