"""Facts of earlier batches that are edited again with a batch, so that what later edits moved comes back."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from easyedit_moe.facts.requests import EditRequest
from easyedit_moe.targets.joining import Place


def facts_to_replay(
    earlier: Mapping[Place, Mapping[str, EditRequest]], facts: Sequence[EditRequest], places: Sequence[Place],
    count: int, seed: int, joined: bool,
) -> list[EditRequest]:  # fmt: skip
    """At most ``count`` earlier facts, drawn uniformly, that nothing in the batch supersedes.

    Args:
        earlier: the newest fact of each prompt, by the place where it lies.
        facts: the batch.
        places: where its facts lie.
        count: how many facts to draw at most.
        seed: of the draw; the number of edits so far, so that a run that is repeated draws the same.
        joined: facts at one place share a target (``join_facts``): one of them then stands for all, and none is drawn
            at a place of the batch.
    """
    asked, taken = {fact.prompt for fact in facts}, set(places)
    if joined:
        known = [next(iter(there.values())) for place, there in earlier.items() if place not in taken]
    else:
        known = [fact for there in earlier.values() for prompt, fact in there.items() if prompt not in asked]
    return random.Random(seed).sample(known, min(count, len(known)))
