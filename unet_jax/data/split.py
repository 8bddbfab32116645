"""Which part of a data set a source reads: ``train``, ``train[:80%]``, ``train[5:9]``.

The rule is cheap and contiguous: examples keep their order, and the neighbouring slices
of one stack never fall on both sides of a cut at more than one place.
"""

import re
from collections.abc import Callable

from unet_jax.types import InputError

Select = Callable[[int], slice]
"""number of examples -> the contiguous slice of them that a split means"""

_RULE = (
    "write a name and, if wanted, one contiguous part in whole numbers or per cent, "
    "such as train, train[:80%], train[80%:] or train[20:30]"
)
_BOUND = r"(-?\d+%?)?"
_SPLIT = re.compile(rf"([\w.\-]+)(?:\[{_BOUND}:{_BOUND}\])?")


def parse(split: str) -> tuple[str, Select]:
    """Reads a split.

    A percentage is rounded to the nearest example, and a negative bound counts from
    the end, so ``train[:80%]``, ``train[80%:]`` and ``train[-20%:]`` always meet at the
    same example.

    Args:
        split: a name, or a name with one slice: ``name[begin:end]``, each bound a whole
            number of examples, a whole percentage, or nothing.

    Returns:
        ``(name, select)``, where ``select(n)`` is the slice of n examples, with
        ``0 <= start < stop <= n``. ``select`` raises InputError if that part is empty
        or asks for more examples than there are.

    Raises:
        InputError: the text does not follow the rule.
    """
    match = _SPLIT.fullmatch(split.strip())
    if match is None:
        raise InputError(f"The split {split!r} cannot be read: {_RULE}.")
    name, begin, end = match.groups()
    for bound in (begin, end):
        if bound and bound.endswith("%") and abs(int(bound[:-1])) > 100:
            raise InputError(
                f"The split {split!r} names {bound}: give a percentage from -100 to "
                "100."
            )

    def select(count: int) -> slice:
        start = 0 if begin is None else _position(begin, count)
        stop = count if end is None else _position(end, count)
        if not 0 <= start <= count or not 0 <= stop <= count:
            raise InputError(
                f"The split {split!r} reaches outside the {count} examples of "
                f"{name!r}: choose bounds between 0 and {count}."
            )
        if start >= stop:
            raise InputError(
                f"The split {split!r} of the {count} examples of {name!r} is empty: "
                "choose a larger part, or add examples."
            )
        return slice(start, stop)

    return name, select


def _position(bound: str, count: int) -> int:
    if not bound.endswith("%"):
        return int(bound) + (count if bound.startswith("-") else 0)
    percent = int(bound[:-1]) + (100 if bound.startswith("-") else 0)
    # Whole numbers only: a float product could round one cut two ways.
    return (percent * count + 50) // 100
