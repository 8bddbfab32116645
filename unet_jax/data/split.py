"""Which part of a data set a source reads: ``train[:80%]``, ``all[not fold 2/5]``.

The rule is cheap and contiguous: examples keep their order, and the neighbouring slices
of one stack, which look alike, never fall on both sides of a cut at more than one place
(two for a fold in the middle).
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from unet_jax.types import InputError

Part = slice | list[int]
"""the numbers of the examples that a split means, in rising order; see `take`"""

Select = Callable[[int], Part]
"""number of examples -> the part of them that a split means"""

T = TypeVar("T")

_RULE = (
    "write a name and, if wanted, one contiguous part in whole numbers or per cent, or "
    "a fold or all but that fold, such as train, train[:80%], train[80%:], "
    "train[20:30], all[fold 2/5] or all[not fold 2/5]"
)
_BOUND = r"(-?\d+%?)?"
_FOLD = r"(not +)?fold +(\d+) */ *(\d+)"
_SPLIT = re.compile(rf"([\w.\-]+)(?:\[(?:{_BOUND}:{_BOUND}| *{_FOLD} *)\])?")


def parse(split: str) -> tuple[str, Select]:
    """Reads a split.

    A percentage is rounded to the nearest example, and a negative bound counts from
    the end, so ``train[:80%]``, ``train[80%:]`` and ``train[-20%:]`` always meet at the
    same example. Fold k of n is what lies between (k - 1)/n and k/n of the list,
    rounded likewise: the n folds are the whole list, and each stays together.

    Args:
        split: a name, or a name with one slice ``name[begin:end]``, each bound a whole
            number of examples, a whole percentage, or nothing; or a name with
            ``[fold k/n]`` or, for all other examples, ``[not fold k/n]``.

    Returns:
        ``(name, select)``, where ``select(n)`` says which of n examples: a slice with
        ``0 <= start < stop <= n``, or, of ``not fold``, a list of at least one number.
        ``select`` raises InputError if that part is empty or asks for more examples
        than there are.

    Raises:
        InputError: the text does not follow the rule.
    """
    match = _SPLIT.fullmatch(split.strip())
    if match is None:
        raise InputError(f"The split {split!r} cannot be read: {_RULE}.")
    name, begin, end, others, fold, folds = match.groups()
    for bound in (begin, end):
        if bound and bound.endswith("%") and abs(int(bound[:-1])) > 100:
            raise InputError(
                f"The split {split!r} names {bound}: give a percentage from -100 to "
                "100."
            )
    k, n = int(fold or 1), int(folds or 2)
    if n < 2 or not 1 <= k <= n:
        raise InputError(
            f"The split {split!r} names fold {k} of {n}: give two folds or more, and "
            "one of them, the first of which is 1."
        )

    def select(count: int) -> Part:
        if fold:
            start, stop = (_round(edge * count, n) for edge in (k - 1, k))
        else:
            start = 0 if begin is None else _position(begin, count)
            stop = count if end is None else _position(end, count)
        held = "1 example" if count == 1 else f"{count} examples"
        if not 0 <= start <= count or not 0 <= stop <= count:
            raise InputError(
                f"The split {split!r} reaches outside the {held} of {name!r}: choose "
                f"bounds between 0 and {count}."
            )
        rest = [*range(start), *range(stop, count)]
        if start >= stop or (others and not rest):
            raise InputError(
                f"The split {split!r} of the {held} of {name!r} is empty: choose a "
                "larger part, or add examples."
            )
        return rest if others else slice(start, stop)

    return name, select


def take(items: Sequence[T], part: Part) -> Sequence[T]:
    """The items that a part means."""
    return items[part] if isinstance(part, slice) else [items[i] for i in part]


def _position(bound: str, count: int) -> int:
    if not bound.endswith("%"):
        return int(bound) + (count if bound.startswith("-") else 0)
    percent = int(bound[:-1]) + (100 if bound.startswith("-") else 0)
    return _round(percent * count, 100)


def _round(numerator: int, denominator: int) -> int:
    # Whole numbers only: a float product could round one cut two ways.
    return (2 * numerator + denominator) // (2 * denominator)
