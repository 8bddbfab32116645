"""The largest batch and the least recomputation that fit a memory.

Both are found by compiling and not by crashing: what a compiled step needs is known
before it runs (`unet_jax.compiled.Costs.peak`). A compilation can take a minute, so few
are made and none twice.
"""

import math
from collections.abc import Callable

import jax

from unet_jax.compiled import bytes_text
from unet_jax.types import InputError

__all__ = ["device_memory", "largest_batch", "least_remat"]

# Multiples of the smallest batch beyond which nobody looks: without a bound, a step
# whose memory does not grow would be compiled for ever.
_ENDLESS = 2**16


def device_memory() -> int | None:
    """Bytes that the first local device may use, None where the backend hides it (CPU).

    All of them: what other arrays hold on it now is not subtracted.
    """
    try:
        stats = jax.local_devices()[0].memory_stats()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    return (stats or {}).get("bytes_limit")


def _needs(
    peak: Callable[[int], int],
    *,
    limit: int,
    name: str,
    scale: int = 1,
    say: Callable[[str], None] | None,
) -> Callable[[int], float]:
    """``peak(scale * n)``, asked once for each n and told; infinite where refused.

    A TPU's compiler refuses a program that is larger than its memory, and a GPU's may
    run out of it while it tries algorithms: neither is a crash, both are an answer.
    """
    known: dict[int, float] = {}

    def need(n: int) -> float:
        if n in known:
            return known[n]
        try:
            known[n] = peak(scale * n)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            known[n] = math.inf
        if say is not None:
            over = f", and there are {bytes_text(limit)}" if known[n] > limit else ""
            say(f"{name} {scale * n}: {_size(known[n])}{over}")
        return known[n]

    return need


def _size(count: float) -> str:
    if math.isinf(count):
        return "more than the compiler allows"
    return f"{bytes_text(count)} a device"


def _step_up(
    need: Callable[[int], float], previous: int, low: int, limit: int, tries: int
) -> int:
    """How far up the line through two fitting points says that there is room.

    Nowhere is to go where the line is right and ends at ``low``; one further is then
    asked for to be sure. Where the line keeps being wrong, steps double.
    """
    least = 2 ** max(tries - 2, 0)
    if low == previous:
        return least
    rise = need(low) - need(previous)
    room = (limit - need(low)) * (low - previous) // rise if rise > 0 else low
    return max(int(room), least)


def _between(
    need: Callable[[int], float],
    low: int,
    high: int,
    limit: int,
    tries: int,
    *,
    up: bool,
) -> int:
    """A number between one that fits and one that does not; ``up`` if from below.

    The line through both finds the last that fits at once if memory is affine. Where it
    is not, the line is still nearly right: steps away from what it found double, until
    the middle is as good. A refused one has no line, but is seldom far too large.
    """
    least = 2 ** max(tries - 1, 0)
    if high - low <= 2 * least:
        return (low + high) // 2
    bottom, top = need(low), need(high)
    if math.isinf(top):
        return high - least
    n = low + int((limit - bottom) * (high - low) // (top - bottom))
    return max(n, low + least) if up else min(max(n, low + 1), high - least)


def largest_batch(
    peak: Callable[[int], int],
    *,
    multiple: int,
    limit: int,
    most: int | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """The largest batch whose step fits.

    Memory is close to affine in the batch, so that the first two sizes tell where the
    limit is crossed, and two more compilations prove it. Where memory is not affine
    more are made, a few times the logarithm of the answer.

    Args:
        peak: Compiles the step for a batch size and returns the bytes that a device
            needs. A ``RESOURCE_EXHAUSTED`` that it raises counts as "does not fit".
        multiple: What batch sizes are multiples of (devices times microbatches).
        limit: Bytes a device has for it, see `device_memory`.
        most: No larger one is of interest, such as the number of training examples;
            None for 65536 times ``multiple``.
        say: Is told the outcome of each compilation in a line.

    Returns:
        A multiple of ``multiple`` that was compiled and fits. The next one was compiled
        and does not fit, or is larger than ``most``.

    Raises:
        InputError: Not even ``multiple`` fits, or it is larger than ``most``.
    """
    end = _ENDLESS if most is None else most // multiple
    if end < 1:
        raise InputError(
            f"the smallest batch is {multiple} and the largest that is allowed {most}:"
            " use fewer devices (mesh.data) or a smaller train.accumulate."
        )
    need = _needs(peak, limit=limit, name="batch", scale=multiple, say=say)
    if need(1) > limit:
        raise InputError(
            f"a batch of {multiple}, the smallest there is, needs"
            f" {_size(need(1))}, and there are {bytes_text(limit)}: use a smaller"
            " train.crop, model.remat=-1, model.dtype=bfloat16 or a larger mesh.space."
        )
    previous, low, high, tries = 1, 1, end + 1, 0
    while low < end and high > end:
        n = min(low + _step_up(need, previous, low, limit, tries), end)
        tries += 1
        if need(n) <= limit:
            previous, low = low, n
        else:
            high = n
    tries, up = 0, False
    while high - low > 1:
        n = _between(need, low, high, limit, tries, up=up)
        tries, up = tries + 1, need(n) <= limit
        low, high = (n, high) if up else (low, n)
    return low * multiple


def least_remat(
    peak: Callable[[int], int],
    *,
    levels: int,
    limit: int,
    say: Callable[[str], None] | None = None,
) -> int:
    """The fewest levels of a net to compute again in the backward pass.

    What is computed again need not be kept, so that memory falls with each level. XLA's
    scheduler may have it otherwise: on CPU a level more saves nothing to speak of.

    Args:
        peak: Compiles the step with ``model.remat`` levels and returns the bytes that a
            device needs. A ``RESOURCE_EXHAUSTED`` that it raises counts as "does not
            fit".
        levels: The most there can be (all of the net's).
        limit: Bytes a device has for it, see `device_memory`.
        say: Is told the outcome of each compilation in a line.

    Returns:
        A number of 0 to ``levels`` that was compiled and fits. One level fewer was
        compiled and does not.

    Raises:
        InputError: None fits.
    """
    need = _needs(peak, limit=limit, name="model.remat", say=say)
    if need(0) <= limit:
        return 0
    if need(levels) > limit:
        # Memory seldom rises with a level, but a run that could begin is worth a look.
        for n in range(1, levels):
            if need(n) <= limit:
                return n
        best = min(range(levels + 1), key=need)
        raise InputError(
            f"the least memory, {_size(need(best))}, is needed with model.remat ="
            f" {best}, and there are {bytes_text(limit)}: use a smaller"
            " train.batch_size, a smaller train.crop, model.dtype=bfloat16 or a larger"
            " mesh.space."
        )
    low, high = 0, levels
    while high - low > 1:
        n = (low + high) // 2
        if need(n) <= limit:
            high = n
        else:
            low = n
    return high
