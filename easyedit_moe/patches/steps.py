"""How the steps of a patch lie in its file: factors for every expert, or a core and what maps it back to its layer.

A core needs the layer's Tucker factors and the vectors of its null spaces, E h times a rank at most; in a file they lie
once per layer. Where a patch is so small that its updates' own factors are fewer numbers, these are written in place of
both: what is applied has the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from easyedit_moe.algebra.core import FactoredCore
from easyedit_moe.algebra.core_update import CoreUpdate, TuckerFactors, Update
from easyedit_moe.algebra.metric import IdentityMetric
from easyedit_moe.algebra.nullspace import ExpertProjector, NullSpace
from easyedit_moe.algebra.routed_keys import FactoredUpdate
from easyedit_moe.patches.stored import FLIPS, SavedWeights, places
from easyedit_moe.storage.checksums import checksum
from easyedit_moe.storage.schema import Expected, check_tensors

FACTORS = "factors."
"""What the names of a layer's Tucker factors begin with in a file; their number and part follow."""
_CORES_SINCE = 4
_WHOLE, _REAL, _FLAG = (torch.int64,), (torch.float32,), (torch.bool,)


def tensors_of(steps: Sequence[Update]) -> dict[str, Tensor]:
    """Steps by their names in a file; what several of them share is there once."""
    forms = smallest_forms(steps)
    layers = {id(u.factors): u.factors for u in forms if isinstance(u, CoreUpdate)}
    numbers = {key: number for number, key in enumerate(layers)}
    sources = {id(factors.expert): numbers[key] for key, factors in layers.items()}
    found: dict[str, Tensor] = {}
    for key, factors in layers.items():
        found.update({f"{FACTORS}{numbers[key]}.{name}": t for name, t in factor_tensors(factors).items()})
    first: dict[tuple[int, ...], int] = {}
    for i, update in enumerate(forms):
        if isinstance(update, FactoredUpdate):
            found.update(_factored_tensors(i, update, first.setdefault(_shared_part(update), i)))
            continue
        found[f"{i}.factors"] = torch.tensor([numbers[id(update.factors)]])
        if isinstance(update.core, Tensor):
            found[f"{i}.core"] = update.core
        else:
            same = first.setdefault(_shared_core(update.core), i)
            found.update(_core_tensors(i, update.core, same, sources.get(id(update.core.u_expert))))
    return found


def smallest_forms(steps: Sequence[Update]) -> list[Update]:
    """Every core as it is, or expanded, whichever takes fewer bytes in a file together with the others of its layer;
    cores whose layer's factors are equal have the very same ones.
    """
    steps = sharing_factors(steps)
    cores: dict[int, list[CoreUpdate]] = {}
    for update in steps:
        if isinstance(update, CoreUpdate):
            cores.setdefault(id(update.factors), []).append(update)
    kept = {number for number, updates in cores.items() if _fewer_as_cores(updates)}
    return [u.expanded() if isinstance(u, CoreUpdate) and id(u.factors) not in kept else u for u in steps]


def sharing_factors(steps: Sequence[Update]) -> list[Update]:
    """The same steps, layers' factors that are equal being one value, as they are within a run."""
    known: dict[int, list[TuckerFactors]] = {}
    same: dict[int, TuckerFactors] = {}
    for update in steps:
        if isinstance(update, CoreUpdate) and id(update.factors) not in same:
            alike = known.setdefault(checksum(update.factors.inner), [])
            found = next((other for other in alike if _equal(other, update.factors)), update.factors)
            same[id(update.factors)] = found
            alike += [found] if found is update.factors else []
    moved = {id(u.factors.expert): same[id(u.factors)].expert for u in steps if isinstance(u, CoreUpdate)}
    return [_with_factors(u, same[id(u.factors)], moved) if isinstance(u, CoreUpdate) else u for u in steps]


def _with_factors(update: CoreUpdate, factors: TuckerFactors, experts: Mapping[int, Tensor]) -> CoreUpdate:
    core = update.core
    if isinstance(core, FactoredCore):
        core = replace(core, u_expert=experts.get(id(core.u_expert), core.u_expert))
    return CoreUpdate(core, factors)


def _equal(a: TuckerFactors, b: TuckerFactors) -> bool:
    if not (_storable(a) and _storable(b)):
        return False
    first, second = factor_tensors(a), factor_tensors(b)
    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and checksum(_bytes(first[name])) == checksum(_bytes(second[name]))
        for name in first
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _storable(factors: TuckerFactors) -> bool:
    return isinstance(factors.metric, (IdentityMetric, NullSpace)) and factors.inner.dtype == torch.float32


def _fewer_as_cores(updates: Sequence[CoreUpdate]) -> bool:
    factors = updates[0].factors
    if not _storable(factors):
        return False
    count, own = len(factors.expert), sum(_numbers(update.core) for update in updates)
    own += factors.expert.numel() + factors.inner.numel() + factors.outer.numel()
    if isinstance(factors.metric, NullSpace):
        own += sum(projector.basis.numel() for projector in factors.metric.projectors)
    columns = 2 * count  # int64
    return own < sum(u.rank * (u.d_model + count * u.d_hidden + columns) for u in updates)


def _numbers(core: FactoredCore | Tensor) -> int:
    if isinstance(core, Tensor):
        return core.numel()
    return core.left.numel() + core.inner.numel() + 2 * core.expert.numel()


def factor_tensors(factors: TuckerFactors) -> dict[str, Tensor]:
    """A layer's factors by their names in a file; of its null spaces the vectors of the smaller side."""
    found = {"expert": factors.expert, "inner": factors.inner, "outer": factors.outer}
    if isinstance(factors.metric, NullSpace):
        parts = factors.metric.projectors
        found["bases"] = torch.cat([part.basis.to(torch.float32) for part in parts], dim=1)
        found["sizes"] = torch.tensor([part.basis.shape[1] for part in parts])
        found["complement"] = torch.tensor([part.complement for part in parts], dtype=torch.uint8).bool()
    return found


def _shared_part(update: FactoredUpdate) -> tuple[int, ...]:
    """What tells whether two updates differ in their left factor only: the very same other tensors."""
    return (*update.experts, *(id(tensor) for tensor in (*update.columns, *update.right)))


def _shared_core(core: FactoredCore) -> tuple[int, ...]:
    return (-1, *(id(tensor) for tensor in (core.expert, core.inner, core.u_expert)))


def _factored_tensors(i: int, update: FactoredUpdate, same: int) -> dict[str, Tensor]:
    """The factors of step ``i``; ``same`` is the first step with all of them but the left."""
    left = {f"{i}.left": update.left.clone()}  # two steps may share it, which safetensors refuses
    if same != i:
        return {**left, f"{i}.same": torch.tensor([same])}
    return {
        **left,
        f"{i}.experts": torch.tensor(update.experts),
        f"{i}.sizes": torch.tensor([len(c) for c in update.columns]),
        f"{i}.columns": torch.cat(update.columns),
        f"{i}.right": torch.cat(update.right, dim=1),
    }


def _core_tensors(i: int, core: FactoredCore, same: int, source: int | None) -> dict[str, Tensor]:
    """As `_factored_tensors`, of a core; ``source`` is the number of the factors whose expert factor is the core's."""
    left = {f"{i}.left": core.left.clone()}
    if same != i:
        return {**left, f"{i}.same": torch.tensor([same])}
    found = {**left, f"{i}.tokens": core.expert.clone(), f"{i}.inner": core.inner.clone()}
    if source is not None:
        return {**found, f"{i}.of": torch.tensor([source])}
    return {**found, f"{i}.source": core.u_expert.clone()}


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class _File:
    """What a file holds of steps, and which of them are cores."""

    tensors: Mapping[str, Tensor]
    sets: Mapping[int, int]
    """Step -> number of its layer's factors."""

    def names(self, number: int) -> list[str]:
        """Parts that the file has of a layer's factors."""
        start = f"{FACTORS}{number}."
        return [name.removeprefix(start) for name in self.tensors if name.startswith(start)]


def steps_of(tensors: Mapping[str, Tensor], saved: SavedWeights) -> list[tuple[int, Update]]:
    """Layer and update of each step of a file.

    Raises:
        ValueError: factors that are missing, not asked for, of other dtypes or shapes, not finite, or of experts that
            the metadata do not speak of.
    """
    parts = {name: tensor for name, tensor in tensors.items() if not name.startswith(FLIPS)}
    file = _File(parts, _sets_of(parts, saved))
    expected: dict[str, Expected] = {}
    for number in sorted(set(file.sets.values())):
        expected.update(_expected_factors(file, number))
    for i in range(len(saved.layers)):
        expected.update(_expected_core(file, i) if i in file.sets else _expected_factored(file, i))
    check_tensors(parts, expected)
    factors = {number: _factors(file, number) for number in set(file.sets.values())}
    steps: list[tuple[int, Update]] = []
    for i, layer in enumerate(saved.layers):
        update = CoreUpdate(_core(file, i, factors), factors[file.sets[i]]) if i in file.sets else _factored(file, i)
        steps.append((layer, update))
    _check_layers(steps, saved)
    return steps


def _sets_of(parts: Mapping[str, Tensor], saved: SavedWeights) -> dict[int, int]:
    found = {}
    for i in range(len(saved.layers)):
        name = f"{i}.factors"
        if name in parts:
            check_tensors({name: parts[name]}, {name: Expected((1,), _WHOLE)})
            found[i] = int(parts[name])
    if found and saved.schema < _CORES_SINCE:
        raise ValueError(f"it is of schema {saved.schema} and holds a core")
    return found


def _expected_factors(file: _File, f: int) -> dict[str, Expected]:
    start = f"{FACTORS}{f}."
    found = {
        f"{start}expert": Expected((f"E{f}", f"re{f}"), _REAL),
        f"{start}inner": Expected((f"h of {f}", f"ri{f}"), _REAL),
        f"{start}outer": Expected((f"d of {f}", f"ro{f}"), _REAL),
    }
    if "bases" in file.names(f):
        found[f"{start}bases"] = Expected((f"h of {f}", f"columns{f}"), _REAL)
        found[f"{start}sizes"] = Expected((f"E{f}",), _WHOLE)
        found[f"{start}complement"] = Expected((f"E{f}",), _FLAG)
    return found


def _expected_core(file: _File, i: int) -> dict[str, Expected]:
    f = file.sets[i]
    found = {f"{i}.factors": Expected((1,), _WHOLE)}
    if f"{i}.core" in file.tensors:
        return {**found, f"{i}.core": Expected((f"re{f}", f"ro{f}", f"ri{f}"), _REAL)}
    found[f"{i}.left"] = Expected((f"ro{f}", f"T{i}"), _REAL)
    if f"{i}.same" in file.tensors:
        return {**found, f"{i}.same": Expected((1,), _WHOLE)}
    found[f"{i}.tokens"] = Expected((f"T{i}", f"K{i}"), _WHOLE)
    found[f"{i}.inner"] = Expected((f"T{i}", f"K{i}", f"ri{f}"), _REAL)
    if f"{i}.of" in file.tensors:
        return {**found, f"{i}.of": Expected((1,), _WHOLE)}
    return {**found, f"{i}.source": Expected((f"n{i}", f"re{f}"), _REAL)}


def _expected_factored(file: _File, i: int) -> dict[str, Expected]:
    found = {f"{i}.left": Expected((f"d{i}", f"C{i}"), _REAL)}
    if f"{i}.same" in file.tensors:
        return {**found, f"{i}.same": Expected((1,), _WHOLE)}
    found[f"{i}.experts"] = found[f"{i}.sizes"] = Expected((f"n{i}",), _WHOLE)
    found[f"{i}.columns"] = Expected((f"r{i}",), _WHOLE)
    return {**found, f"{i}.right": Expected((f"h{i}", f"r{i}"), _REAL)}


def _factors(file: _File, f: int) -> TuckerFactors:
    part = {name: file.tensors[f"{FACTORS}{f}.{name}"] for name in file.names(f)}
    metric: IdentityMetric | NullSpace = IdentityMetric()
    if "bases" in part:
        sizes, bases = part["sizes"].tolist(), part["bases"]
        if not sizes or min(sizes) < 0 or max(sizes) > len(bases) or sum(sizes) != bases.shape[1]:
            raise ValueError(f"the null spaces of factors {f} are not as wide as their sizes say")
        sides = zip(bases.split(sizes, dim=1), part["complement"].tolist(), strict=True)
        metric = NullSpace(tuple(ExpertProjector(basis, flag) for basis, flag in sides))
    return TuckerFactors(part["expert"], part["inner"], part["outer"], metric)


def _core(file: _File, i: int, factors: Mapping[int, TuckerFactors]) -> FactoredCore | Tensor:
    tensors, own = file.tensors, factors[file.sets[i]]
    if f"{i}.core" in tensors:
        return tensors[f"{i}.core"]
    first, left = _first(file, i, "inner"), tensors[f"{i}.left"]
    tokens, inner = tensors[f"{first}.tokens"], tensors[f"{first}.inner"]
    if f"{first}.of" in tensors:
        number = int(tensors[f"{first}.of"])
        if number not in factors:
            raise ValueError(f"the core of step {first} is of the factors {number}, which it does not hold")
        source = factors[number].expert
    else:
        source = tensors[f"{first}.source"]
    sizes = (left.shape[1], source.shape[1], inner.shape[2])
    if sizes != (len(inner), own.expert.shape[1], own.inner.shape[1]):
        raise ValueError(f"the core of step {i} is not of the size of step {first}'s")
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < len(source)):
        raise ValueError(f"the core of step {i} names experts that it does not hold")
    return FactoredCore(left, tokens, inner, source)


def _first(file: _File, i: int, name: str) -> int:
    """The step that holds what step ``i`` has in common with it: itself, or an earlier one."""
    if f"{i}.same" not in file.tensors:
        return i
    first = int(file.tensors[f"{i}.same"])
    if not 0 <= first < i or f"{first}.{name}" not in file.tensors:
        raise ValueError(f"step {i} has the factors of step {first}, which holds none before it")
    return first


def _factored(file: _File, i: int) -> FactoredUpdate:
    first, left = _first(file, i, "right"), file.tensors[f"{i}.left"]
    part = {name: file.tensors[f"{first}.{name}"] for name in ("experts", "sizes", "columns", "right", "left")}
    if left.shape != part["left"].shape:
        raise ValueError(f"the left factor of step {i} is not of the size of step {first}'s")
    sizes, experts, columns = part["sizes"].tolist(), part["experts"].tolist(), part["columns"]
    if not experts or experts != sorted(set(experts)) or experts[0] < 0:
        raise ValueError(f"the experts of step {i} are not increasing numbers")
    if min(sizes) < 0 or sum(sizes) != len(columns):
        raise ValueError(f"the sizes of step {i} are not those of its columns")
    if len(columns) and not (int(columns.min()) >= 0 and int(columns.max()) < left.shape[1]):
        raise ValueError(f"step {i} names columns that it does not hold")
    right = torch.split(part["right"], sizes, dim=1)
    return FactoredUpdate(left, tuple(experts), torch.split(columns, sizes), right)


def _check_layers(steps: Sequence[tuple[int, Update]], saved: SavedWeights) -> None:
    written: dict[int, set[int]] = {}
    for layer, update in steps:
        written.setdefault(layer, set()).update(update.experts)
    for layer, experts in written.items():
        if layer not in saved.stored or not 0 <= max(experts) < saved.stored[layer].experts:
            raise ValueError(f"it does not say where the experts that it writes in layer {layer} are stored")
    for layer, update in steps:
        if isinstance(update, CoreUpdate) and len(update.experts) != saved.stored[layer].experts:
            raise ValueError(f"it holds a core of {len(update.experts)} experts, but layer {layer} has another number")
    for table in (saved.before, saved.after):
        known = {layer: set(experts) for layer, experts in table.items()}
        if known.keys() - written.keys() or any(known[n] - written[n] for n in known):
            raise ValueError("it holds checksums of experts that it does not write")
    if places(saved.before) != places(saved.after):
        raise ValueError("its checksums before and after it are not of the same experts")
