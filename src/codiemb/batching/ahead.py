"""The next items of an iterator are made while the last one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_END = object()


class Ahead(Iterator[Any]):
    """An iterator in a thread of its own, in the same order; what it raises is raised where the item is asked for.

    Args:
        items: touched by that thread only, from now on.
        depth: items that are ready, or being made, at most.
    """

    def __init__(self, items: Iterator[Any], depth: int = 2) -> None:
        self.items = items
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._ready = deque(self._thread.submit(next, items, _END) for _ in range(depth))

    def __next__(self) -> Any:
        item = self._ready[0].result() if self._ready else _END
        if item is _END:
            self.close()
            raise StopIteration
        self._ready.popleft()
        self._ready.append(self._thread.submit(next, self.items, _END))
        return item

    def close(self) -> None:
        """Makes no further item; waits for the one that is being made."""
        self._ready.clear()
        self._thread.shutdown(cancel_futures=True)
