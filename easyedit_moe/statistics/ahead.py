"""Work that is done in a thread, a few steps ahead of whoever uses it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

DEPTH = 2
"""Results that may wait beside the one that is in use."""

T = TypeVar("T")


class Ahead(Generic[T]):
    """Results of ``make`` for numbers that are asked for in a known order, made one at a time in one thread."""

    def __init__(self, make: Callable[[int], T], numbers: Iterable[int], pool: ThreadPoolExecutor) -> None:
        self._make, self._pool, self._numbers = make, pool, iter(numbers)
        self._started: deque[tuple[int, Future[T]]] = deque()
        self._start(DEPTH)

    def result(self, number: int) -> T:
        """What ``make`` gives for a number, or raises; one that is out of turn is made at once."""
        if not self._started or self._started[0][0] != number:
            return self._pool.submit(self._make, number).result()
        _, found = self._started.popleft()
        self._start(1)
        return found.result()

    def _start(self, count: int) -> None:
        for _ in range(count):
            number = next(self._numbers, None)
            if number is not None:
                self._started.append((number, self._pool.submit(self._make, number)))


@contextmanager
def made_ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[Ahead[T]]:
    """An `Ahead`, whose thread ends with the block, however that ends: what was not begun by then is not made."""
    pool = ThreadPoolExecutor(1, "ahead")
    try:
        yield Ahead(make, numbers, pool)
    finally:
        pool.shutdown(cancel_futures=True)
