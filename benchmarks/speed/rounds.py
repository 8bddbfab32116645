"""Timing candidates beside each other: round after round, in shuffled order.

What else the machine does then meets all of them alike, and the ratio of a round's own
times says more than the times.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

PAUSE = 0.03  # seconds after which the other's OpenMP threads no longer spin
SPAN = 0.1  # seconds that a timing takes at least
LEAST = 3  # rounds, however long they take


class Program(NamedTuple):
    """A candidate.

    Attributes:
        run: Begins one pass, which need not be done when it returns.
        wait: Waits for what `run` returned.
        value: What came of it, as a NumPy array: logits with channels last, or a loss.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], object]
    value: Callable[[Any], Any]


def seconds(program: Program, calls: int) -> float:
    """Of one of ``calls`` passes that are begun one after the other."""
    begin = time.perf_counter()
    for _ in range(calls - 1):
        program.run()
    program.wait(program.run())
    return (time.perf_counter() - begin) / calls


def interleaved(
    programs: Mapping[str, Program], *, rounds: int, limit: float, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of a pass of each candidate, one figure a round.

    Args:
        programs: The candidates; each has been run once, to compile, and is once more.
        rounds: How many, at most.
        limit: Seconds after which no round is begun, if there are `LEAST`.
        seed: Of the order.
    """
    calls = {}
    for name, program in programs.items():
        time.sleep(PAUSE)
        calls[name] = math.ceil(SPAN / max(seconds(program, 1), 1e-6))

    def one(name: str) -> float:
        time.sleep(PAUSE)
        return seconds(programs[name], calls[name])

    return alternated(one, list(programs), rounds=rounds, limit=limit, seed=seed)


def alternated(
    measure: Callable[[str], float],
    names: Sequence[str],
    *,
    rounds: int,
    limit: float = math.inf,
    seed: int = 0,
) -> dict[str, list[float]]:
    """A figure of each candidate for each round; see `interleaved`.

    Args:
        measure: A candidate's name to its figure.
        names: The candidates.
        rounds, limit, seed: As for `interleaved`.
    """
    order, found = list(names), {name: [] for name in names}
    shuffle, begin = random.Random(seed).shuffle, time.perf_counter()
    for number in range(rounds):
        if number >= LEAST and time.perf_counter() - begin > limit:
            break
        shuffle(order)
        for name in order:
            found[name].append(measure(name))
    return found


class Ratio(NamedTuple):
    """Of medians, and the quartiles of the rounds' own ratios."""

    middle: float
    low: float
    high: float


def ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    """One candidate's figures over another's, round by round."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    low, high = np.quantile(a / b, (0.25, 0.75))
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def best(figures: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """The candidate with the smallest median."""
    return min(names, key=lambda name: float(np.median(figures[name])))
