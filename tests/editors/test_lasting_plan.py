"""What plans count of options for long runs, against the bytes of what is carried."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from solving_editors import TOK, hparams
from tiny import tiny_model

from benchmarks.allocations import tracked
from easyedit_moe.editors import make_editor
from easyedit_moe.editors.planner import MemoryPlan, Workload
from easyedit_moe.facts.requests import parse_requests

NAMES = ["Alice", "Bob", "Carol", "Dave", "Erin", "Frank"]
pytestmark = pytest.mark.usefixtures("no_editing_warnings")
RANK = {"nullspace_threshold": None, "nullspace_relative": False, "nullspace_rank": 0.25}


def facts(start: int) -> list[Any]:
    """Three facts from a number on."""
    record = {"prompt": "{} lives in the city of", "target_new": "Rome"}
    return parse_requests(
        [record | {"prompt": record["prompt"].format(name), "subject": name} for name in NAMES[start : start + 3]]
    )


def run(hp: Any) -> tuple[Any, list[Any]]:
    """An editor after two batches of three facts, and the memory after each."""
    model, editor, memories = tiny_model(), make_editor(hp, progress=False), [None]
    for start in (0, 3):
        memories.append(editor.edit(model, TOK, facts(start), memories[-1]).memory)
    return editor, memories[1:]


def storages(one: Any, seen: set[int] | None = None) -> dict[int, int]:
    """Bytes of every storage that an object leads to, by address."""
    seen = set() if seen is None else seen
    if id(one) in seen:
        return {}
    seen.add(id(one))
    if isinstance(one, torch.Tensor):
        return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()}
    parts = one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
    found: dict[int, int] = {}
    for part in [*parts, getattr(one, "__dict__", None)]:
        found |= storages(part, seen)
    return found


def objects(one: Any, seen: set[int]) -> int:
    """Bytes of Python's own objects."""
    if id(one) in seen:
        return 0
    seen.add(id(one))
    parts = [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
    inside = [] if isinstance(one, torch.Tensor) else [getattr(one, "__dict__", None)]
    return sys.getsizeof(one) + sum(objects(part, seen) for part in [*parts, *inside] if part is not None)


def kept(found: MemoryPlan, name: str) -> int:
    return next(stage.kept for stage in found.stages if stage.name == name)


def planned(hp: Any, edits: int, earlier: int = 0) -> MemoryPlan:
    return make_editor(hp, progress=False).plan_for(hp, tiny_model(), Workload(edits, earlier))


@pytest.mark.parametrize(
    "options",
    [{"cumulative_ridge": True, "remember_edits": True}, {"sequence_rate": 1.0}, {"norm_anchor": 1.1},
     {"preservation_bound": 0.1}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_the_state_of_layers_is_counted_to_the_byte(options: dict[str, Any], data: Path) -> None:
    hp = hparams(data, **options)
    _, memories = run(hp)
    wanted = storages([solve.wanted for solve in memories[-1]._log])
    carried = storages(memories[-1].carried.layers)
    assert sum({**carried, **wanted}.values()) == kept(planned(hp, 6), "carried on")
    # The batch before is still there, and shares only what it does not make anew.
    before = storages([memories[0].carried.layers, [solve.wanted for solve in memories[0]._log[:1]]])
    assert sum(before.values()) == kept(planned(hp, 3, 3), "carried")


@pytest.mark.parametrize("options", [{"join_facts": True, "anchor_targets": True}, {"replay_facts": 2}], ids=str)
def test_places_and_facts_are_counted(options: dict[str, Any], data: Path) -> None:
    hp = hparams(data, **options)
    _, memories = run(hp)
    carried = memories[-1].carried
    numbers, seen = storages(carried.first), set[int]()
    found = sum(numbers.values()) + objects(carried.first, seen) + objects(carried.joined, seen)
    assert kept(planned(hp, 6), "carried on") == pytest.approx(found, rel=0.25)
    assert kept(planned(hp, 3, 3), "carried") == kept(planned(hp, 3, 3), "carried on")


@pytest.mark.parametrize(("method", "rank"), [("Global", 0.25), ("MoTE", 0.25), ("MoTE/update", 0.25), ("Global", 1)])
def test_systems_of_remembered_facts_are_counted_to_the_byte(method: str, rank: float, data: Path) -> None:
    """By tokens, or by unknowns where there are fewer: a null space of one dimension leaves one of each expert."""
    prefixes = ["It is said: ", "We know: "] if rank == 1 else []
    ranks = {**RANK, "nullspace_rank": rank}
    hp = hparams(data, method, remember_edits=True, lambda_reg=1.0, context_prefixes=prefixes, **ranks)
    editor, _ = run(hp)
    held = storages([vars(system) for _, system in editor.holding._held.values()])
    inside = storages([system.rows for _, system in editor.holding._held.values()])
    shared = storages([system.coordinates for _, system in editor.holding._held.values()])
    found = sum(size for place, size in held.items() if place not in inside and place not in shared)
    assert found == kept(planned(hp, 3, 3), "held")
    assert rank != 1 or found == len(hp.layers) * 8 * 8**2
    assert "held" not in {stage.name for stage in planned(hp, 3).stages}


@pytest.mark.parametrize(("name", "option"), [("directions", "sphere_energy"), ("moments", "preservation_bound")])
def test_what_is_prepared_for_an_option_is_counted(name: str, option: str, data: Path) -> None:
    hp = hparams(data, **{option: 0.5})
    editor = make_editor(hp, progress=False)
    layers = editor.prepare(tiny_model(), TOK).layers
    found = sum(storages([getattr(layer, name) for layer in layers.values()]).values())
    plan = planned(hp, 3)
    assert found == kept(plan, name)
    total = sum(stage.kept for stage in planned(hparams(data), 3).stages if stage.name == "statistics")
    assert kept(plan, "statistics") + (found if name == "moments" else 0) == total


def test_statistics_that_are_read_again_are_counted(data: Path) -> None:
    hp = hparams(data, refresh_every=3, **RANK)
    editor, memories = run(hp)
    first = storages(editor.prepared)
    again = {place: size for place, size in storages(memories[-1].carried.prepared).items() if place not in first}
    counts = sum(8 * layer.num_experts for layer in editor.prepared.layers.values())
    plan = planned(hp, 3, 3)
    assert sum(again.values()) - counts == kept(plan, "refresh")
    assert kept(planned(hp, 3, 6), "refresh") == 2 * kept(plan, "refresh")
    assert "refresh" not in {stage.name for stage in planned(hp, 3).stages}
    needs = next(stage.working for stage in plan.stages if stage.name == "refresh")
    gathered = next(stage for stage in plan.stages if stage.name == "statistics")
    assert needs >= gathered.kept + gathered.working


def test_a_step_of_a_cumulative_ridge_allocates_what_is_planned(data: Path) -> None:
    """Every expert's own factor of full rank is written then, which is most of what the batch needs."""
    hp = hparams(data, cumulative_ridge=True, remember_edits=True)
    model, editor = tiny_model(), make_editor(hp, progress=False)
    memory = editor.edit(model, TOK, facts(0)).memory
    found, _ = tracked(lambda: editor.edit(model, TOK, facts(3), memory))
    plan = planned(hp, 3, 3)
    own = [stage for stage in plan.stages if stage.name in ("targets", "capture", "solve", "write")]
    assert sum(stage.kept for stage in own) + own[-1].working == pytest.approx(found.peak, rel=0.2)
    assert own[-1].working > 3 * next(s.working for s in planned(hparams(data), 3).stages if s.name == "write")


def test_without_options_nothing_is_carried(data: Path) -> None:
    names = {stage.name for stage in planned(hparams(data), 3, 3).stages}
    assert names == {"statistics", "metric", "targets", "capture", "solve", "write"}
