"""Batches that are read ahead of their use, in threads.

grain runs the work and hands it on in order. Its shuffle, seed, repeat and checkpoint
are not used: which examples a step sees is ``plan``'s affair alone.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


def endless(
    read: Callable[[int], Any], *, start: int = 0, together: int = 1, threads: int = 2
) -> Iterator[Any]:
    """What a reader gives for each number from one on.

    Args:
        read: from a number, 0 or more, to a batch of NumPy arrays; safe to call from
            several threads at once.
        start: the first number.
        together: of more than 1, so many batches come as one whose arrays have an axis
            of batches first.
        threads: how many read ahead; 0 reads in the caller's thread.
    """
    if together == 1:
        return run(read, sys.maxsize, start, threads)

    # Joined by the threads: many large batches are a second's work.
    def some(number: int) -> Any:
        first = start + number * together
        return joined([read(step) for step in range(first, first + together)])

    return run(some, sys.maxsize, 0, threads)


def joined(batches: Sequence[Any]) -> Any:
    """Batches as one, with an axis of batches first."""
    return {key: np.stack([b[key] for b in batches]) for key in batches[0]}


class _Batches:
    """What grain wants to read from: a length, and item i."""

    def __init__(self, read: Callable[[int], Any], count: int) -> None:
        self.read, self.count = read, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.read(index)


def run(
    read: Callable[[int], Any], count: int, start: int, threads: int
) -> Iterator[Any]:
    """What ``read`` gives for ``start`` to ``count - 1``, in order.

    Args:
        read, start, threads: as for `endless`.
        count: of all that there are.
    """
    if threads == 0:
        return map(read, range(start, count))
    import grain

    # A small buffer: grain's default of 64 batches is slow to begin and large.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    batches = grain.MapDataset.source(_Batches(read, count))[start:]
    return iter(batches.to_iter_dataset(options))
