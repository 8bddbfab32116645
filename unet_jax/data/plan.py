"""The order of the data: one pure function of (seed, step).

Everything that feeds a training step follows this plan, on any number of processes, so
the position in the data is the step's number alone and nothing else is ever saved.
"""

import functools

import numpy as np

from unet_jax.types import NumpyArray

_OFFSETS, _AIMS = 2**64 - 1, 2**64 - 2
"""The second word of the key for these; permutations use the epoch's number there."""


def plan(
    seed: int, step: int, *, examples: int, batch_size: int, rank: int
) -> tuple[NumpyArray, NumpyArray]:
    """Which examples a step sees, and where each of their crops begins.

    Row b of step s stands at the position ``p = s * batch_size + b`` of an endless
    list. Epoch ``p // examples`` of it is a permutation of all examples, so a batch may
    hold the end of one epoch and the beginning of the next, and no example is dropped.
    A process takes its rows of the answer.

    Args:
        seed: of the run; any whole number.
        step: number of the update, 0 or more.
        examples: how many there are in the data set, 1 or more.
        batch_size: rows of the whole batch, of all processes together.
        rank: spatial axes, 1 to 4.

    Returns:
        ``(index, offset)``: ``i64[batch_size]`` in ``[0, examples)``, and
        ``f64[batch_size, rank]`` in ``[0, 1)``: a crop of size c begins at
        ``floor(offset * (size - c + 1))``.
    """
    if examples < 1 or batch_size < 1 or step < 0 or not 1 <= rank <= 4:
        raise ValueError(f"{examples=}, {batch_size=}, {step=}, {rank=}")
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(position, examples)
    index = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        index[here] = _permutation(seed, epoch, examples)[places[here]]
    # A block of Philox is four words, so a counter of p makes row p's own four words.
    words = _philox(seed, _OFFSETS, int(position[0])).random_raw(4 * batch_size)
    offset = (words.reshape(batch_size, 4)[:, :rank] >> 11) * 2.0**-53
    return index, offset


def aims(seed: int, step: int, *, batch_size: int) -> NumpyArray:
    """What decides which crops are aimed at a pixel of the foreground, and at which.

    Args:
        seed, step, batch_size: as for `plan`.

    Returns:
        ``f64[batch_size, 3]`` in ``[0, 1)``: a crop is aimed where the first number is
        below the part that should be, at a class by the second, at one of its pixels by
        the third.
    """
    words = _philox(seed, _AIMS, step * batch_size).random_raw(4 * batch_size)
    return (words.reshape(batch_size, 4)[:, :3] >> 11) * 2.0**-53


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, examples: int) -> NumpyArray:
    # Sorting raw words: NumPy keeps those for ever, but not Generator.permutation.
    words = _philox(seed, epoch, 0).random_raw(examples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def _philox(seed: int, stream: int, counter: int) -> np.random.Philox:
    key = np.array([seed % 2**64, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter)
