"""What a file must hold, by type hints and by names, dtypes and shapes; nothing is converted or guessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from easyedit_moe.errors import CacheError, PatchError
from easyedit_moe.storage.schema import Expected, check_tensors, content_of, read_record, read_value


@dataclass(frozen=True)
class Inner:
    name: str
    value: float | None = None


@dataclass(frozen=True)
class Outer:
    schema: Literal[1]
    rows: list[Inner]
    table: dict[int, dict[int, int]]
    pair: tuple[int, int]
    free: dict[str, Any]
    flag: bool = False
    texts: tuple[str, ...] = field(default_factory=tuple)


GOOD: dict[str, Any] = {
    "schema": 1, "rows": [{"name": "a", "value": 2}, {"name": "b"}], "table": {"3": {"0": -7}}, "pair": [1, 2],
    "free": {"x": [None]}, "texts": ["t"],
}  # fmt: skip


def test_records_come_back_as_they_are_hinted() -> None:
    found = read_record(GOOD, Outer)
    assert found == Outer(1, [Inner("a", 2.0), Inner("b")], {3: {0: -7}}, (1, 2), {"x": [None]}, False, ("t",))
    assert type(found.rows[0].value) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2"), ({"schema": True}, "schema is True"), ({"schema": 1.0}, "schema is 1.0"),
        ({"rows": [{"name": 1}]}, r"rows\[0\].name is 1, expected str"), ({"rows": {}}, "rows is {}"),
        ({"rows": [{"name": "a", "other": 1}]}, "holds 'other'"), ({"rows": [{}]}, r"rows\[0\] lacks name"),
        ({"rows": [{"name": "a", "value": float("nan")}]}, "value is nan"),
        ({"rows": [{"name": "a", "value": 10**400}]}, "expected float"),
        ({"rows": [{"name": "a", "value": True}]}, "value is True"),
        ({"table": {"03": {}}}, "no number"), ({"table": {"x": {}}}, "no number"), ({"table": {"٣": {}}}, "no number"),
        ({"table": {"1": {"2": 2.0}}}, "expected int"), ({"pair": [1]}, "pair is"), ({"pair": [1, "2"]}, "pair"),
        ({"flag": 0}, "flag is 0"), ({"free": []}, "free is"), ({"texts": "t"}, "texts is"),
        ({"free": None}, "free is"),
    ],
)  # fmt: skip
def test_other_kinds_of_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_record({**GOOD, **change}, Outer)


@pytest.mark.parametrize("value", ["3", 3, None, [], True, 2.5])
def test_what_is_no_object(value: Any) -> None:
    with pytest.raises(ValueError, match="expected Outer"):
        read_value(value, Outer)


EXPECTED = {"a": Expected(("n", 3)), "b": Expected(("n",), (torch.int64,)), "c": Expected((), None)}
TENSORS = {"a": torch.ones(2, 3), "b": torch.tensor([1, 2]), "c": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(2, 4)}, r"a is \[2, 4\] of float32"), ({"b": torch.ones(2)}, "expected .* of int64"),
        ({"b": torch.tensor([1])}, r"b is \[1\] of int64, expected \[2\]"),
        ({"a": torch.ones(3)}, r"expected \[n, 3\]"),
        ({"c": torch.tensor(1.0, dtype=torch.bfloat16)}, "bfloat16"), ({"d": torch.ones(1)}, "unknown tensor d"),
        ({"c": torch.tensor(float("inf"))}, "infinity"), ({"a": torch.ones(2, 3, dtype=torch.int64)}, "int64"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    check_tensors(TENSORS, EXPECTED)
    with pytest.raises(ValueError, match=message):
        check_tensors({**TENSORS, **change}, EXPECTED)
    with pytest.raises(ValueError, match="lacks the tensor b"):
        check_tensors({"a": TENSORS["a"], "c": TENSORS["c"]}, EXPECTED)


def test_errors_name_the_file_and_what_to_do() -> None:
    with (
        pytest.raises(PatchError, match=r"^f is damaged: wrong; do this\.$"),
        content_of(Path("f"), PatchError, "do this"),
    ):
        raise ValueError("wrong")
    own = CacheError("own")
    with pytest.raises(CacheError) as caught, content_of(Path("f"), PatchError, "do this"):
        raise own
    assert caught.value is own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, bad: float) -> None:
    tensor = torch.randn(3, 50).to(dtype)
    check_tensors({"x": tensor}, {"x": Expected((3, 50), (dtype,))})
    tensor[2, 17] = bad
    with pytest.raises(ValueError, match="non-finite"):
        check_tensors({"x": tensor}, {"x": Expected((3, 50), (dtype,))})
    check_tensors({"x": tensor[:0]}, {"x": Expected((0, 50), (dtype,))})
