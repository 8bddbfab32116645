"""From what mask files hold to class ids: which numbers or colours mean which class.

``index``      the numbers are class ids
``binary``     black is background, white (255, or 1) foreground
``instances``  0 is background, every other number one object: all are foreground
``colors``     a table of RGB colours, one for each class
``auto``       looks at the masks and decides for one of these, or says why it cannot
"""

import dataclasses
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from unet_jax.data import formats
from unet_jax.data.images import LOSSY
from unet_jax.types import InputError, NumpyArray

_LOG = logging.getLogger("unet_jax")

KINDS = ("auto", "binary", "index", "instances", "colors")
Kind = Literal["binary", "index", "instances", "colors"]
Color = tuple[int, int, int]
Reader = Callable[[Path], NumpyArray]
"""path -> [*S] whole numbers, or [*S, 3] colours"""

# Looking at every mask of a large folder would take longer than the first step may;
# what a mask not looked at holds is still checked when it is read.
LOOK_AT = 1000
# Beyond these, a mask is more likely a picture, or one number for each object.
MOST_CLASSES = 32
MOST_COLORS = 64


@dataclasses.dataclass(frozen=True)
class Coding:
    """How the masks of one data set are read.

    ``label_names``: names of the class ids 0 .. K-1.
    ``colors``: the colour of each class, for ``colors``.
    ``foreground``: the one value beside 0, for ``binary``; 0: not known.
    ``ignore``: the stored number (or grey) that means "not counted"; -1: none.
    ``shift``: what is subtracted from the stored number, for ``index``.
    ``rank``: spatial axes of a mask; one more axis holds colours.
    """

    kind: Kind
    label_names: tuple[str, ...]
    colors: tuple[Color, ...] = ()
    foreground: int = 0
    ignore: int = -1
    shift: int = 0
    rank: int = 2

    def decode(
        self, mask: NumpyArray, name: str
    ) -> tuple[NumpyArray, NumpyArray | None]:
        """Class ids and weights of one mask.

        Args:
            mask: ``[*S]`` whole numbers, or ``[*S, 3]`` colours, as stored.
            name: the mask file, for messages.

        Returns:
            ``(label, weight)``: u8 (u16 from 257 classes on) ``[*S]``, and ``f32[*S]``
            with 0 at ignored pixels, or None without ``ignore``.

        Raises:
            InputError: a value or a colour that is no class.
        """
        color = mask.ndim > self.rank
        if color and self.kind in ("binary", "index"):
            raise InputError(
                f"The mask {name} is coloured: set `mask` to colors and give the "
                "table of `colors`, or save it as grey."
            )
        if self.kind == "colors" or color:
            mask = _packed(mask, color)
        void = None
        if self.ignore >= 0:
            grey = 0x010101 if self.kind == "colors" or color else 1
            void = mask == self.ignore * grey
        decode = {
            "index": self._index,
            "binary": self._binary,
            "instances": self._instances,
            "colors": self._colors,
        }[self.kind]
        label = decode(mask, void, name)
        label = label.astype(np.uint8 if len(self.label_names) <= 256 else np.uint16)
        if void is None:
            return label, None
        label[void] = 0
        return label, (~void).astype(np.float32)

    def _index(
        self, mask: NumpyArray, void: NumpyArray | None, name: str
    ) -> NumpyArray:
        low, high = self.shift, self.shift + len(self.label_names) - 1
        bad = (mask < low) | (mask > high)
        if void is not None:
            bad &= ~void
        if bad.any():
            raise self._out_of_range(int(mask[bad].flat[0]), name)
        return mask if not low else mask.astype(np.int64) - low

    def _binary(
        self, mask: NumpyArray, void: NumpyArray | None, name: str
    ) -> NumpyArray:
        known = mask if void is None else np.where(void, 0, mask).astype(mask.dtype)
        low, high = int(known.min(initial=0)), int(known.max(initial=0))
        white = 2 ** (8 * mask.dtype.itemsize) if mask.dtype.kind == "u" else 256
        half = (self.foreground + 1) // 2 or white // 2
        soft = name.lower().endswith(LOSSY)
        if self.foreground and not soft:
            other = (known != 0) & (known != self.foreground)
            if other.any():
                raise self._out_of_range(int(known[other].flat[0]), name)
        if low < 0:
            raise self._out_of_range(low, name)
        if not soft and not ((known != 0) & (known != high)).any():
            return known != 0
        # JPEG blurs a mask, and a soft edge has greys: cut in the middle.
        if not soft and high < half:
            raise self._out_of_range(high, name)
        return known >= half

    def _instances(
        self, mask: NumpyArray, void: NumpyArray | None, name: str
    ) -> NumpyArray:
        if mask.min(initial=0) < 0 and (void is None or (mask[~void] < 0).any()):
            raise self._out_of_range(int(mask.min()), name)
        return mask != 0

    def _colors(
        self, mask: NumpyArray, void: NumpyArray | None, name: str
    ) -> NumpyArray:
        table = np.asarray([r << 16 | g << 8 | b for r, g, b in self.colors])
        order = np.argsort(table)
        place = np.searchsorted(table[order], mask).clip(max=len(table) - 1)
        label = order[place]
        bad = table[label] != mask
        if void is not None:
            bad &= ~void
        if bad.any():
            r, g, b = _unpacked(int(mask[bad].flat[0]))
            raise InputError(
                f"The mask {name} has the colour ({r}, {g}, {b}) in {bad.sum()} pixels,"
                " which is not in the table of `colors`: add it, or mend the mask."
            )
        return label

    def _out_of_range(self, value: int, name: str) -> InputError:
        names = ", ".join(self.label_names)
        if self.kind == "index":
            last = self.shift + len(self.label_names) - 1
            means = f"the {len(self.label_names)} classes {names} are {self.shift} to "
            means += str(last)
        elif self.kind == "binary":
            means = f"a binary mask has 0 and {self.foreground or 255}"
        else:
            means = "0 is the background and every object a positive number"
        return InputError(
            f"The mask {name} has the value {value}, but {means}: mend the mask, set "
            "`mask` and `label_names` to what the values mean, or set `ignore` to the "
            "value that means not annotated."
        )


def choose(
    paths: Sequence[Path],
    read: Reader,
    *,
    mask: str = "auto",
    colors: Sequence[Sequence[int]] = (),
    label_names: Sequence[str] = (),
    ignore: int = -1,
    rank: int = 2,
    unreadable: dict[Path, InputError] | None = None,
) -> Coding:
    """Decides how masks are to be read; looks into them where that is left open.

    Args:
        paths: the mask files; up to 1000, evenly spread, are looked at.
        read: gives the stored numbers or colours of one.
        mask: auto, binary, index, instances or colors.
        colors: the RGB colour of each class, 0 .. 255; implies ``colors``.
        label_names: the name of each class id; empty: background, foreground, or
            made from the ids or colours.
        ignore: the stored number, or grey, that gets weight 0; -1: none.
        rank: spatial axes of a mask.
        unreadable: takes the masks that cannot be read and why; None: the first of
            them is raised.

    Raises:
        InputError: the options contradict each other or the masks, or ``auto`` cannot
            tell what the values mean.
    """
    if mask not in KINDS:
        raise InputError(f"mask={mask!r} is not known: choose {', '.join(KINDS)}.")
    names = tuple(label_names)
    table = tuple(_color(entry) for entry in colors)
    if table and mask not in ("auto", "colors"):
        raise InputError(f"`colors` needs mask='colors', not {mask!r}: drop one.")
    coding = functools.partial(Coding, ignore=ignore, rank=rank)
    if mask in ("binary", "instances"):
        return coding(mask, _two(names, mask))
    if table:
        return coding("colors", _color_names(names, table), colors=table)
    if mask == "index" and names:
        return coding("index", names)
    found = _Found(paths, read, ignore, rank, unreadable)
    if found.colors and mask != "index":
        table = found.table()
        return coding("colors", _color_names(names, table), colors=table)
    if mask == "colors":
        table = tuple((v, v, v) for v in sorted(found.values))
        return coding("colors", _color_names(names, table), colors=table)
    if mask == "auto":
        found.refuse_lossy()
        beside = sorted(set(found.values) - {0})
        if len(beside) <= 1 and len(names) in (0, 2):
            return coding("binary", _two(names, "binary"), foreground=max([0, *beside]))
    made = names or found.index_names(sure=mask == "index")
    if mask == "auto" and not names:
        _LOG.warning(
            "The masks are read as the classes 0 to %d; if each number is an object,"
            " set the option mask to instances",
            len(made) - 1,
        )
    return coding("index", made)


class _Found:
    """The values of the masks, each with a file that has it."""

    def __init__(
        self,
        paths: Sequence[Path],
        read: Reader,
        ignore: int,
        rank: int,
        unreadable: dict[Path, InputError] | None = None,
    ) -> None:
        if len(paths) > LOOK_AT:
            spread = np.linspace(0, len(paths) - 1, LOOK_AT).astype(int)
            paths = [paths[i] for i in spread]

        def look(path: Path) -> tuple[frozenset[int], bool] | InputError:
            try:
                with formats.readable(str(path)):
                    stat = os.stat(path)
                return _values(read, path, stat.st_mtime_ns, stat.st_size, rank)
            except InputError as error:
                if unreadable is None:
                    raise
                return error

        self.files: Counter[int] = Counter()  # how many masks have a value
        self.values: dict[int, Path] = {}
        self.colors: dict[int, Path] = {}
        self.paths = paths
        with ThreadPoolExecutor(4) as pool:
            for path, answer in zip(paths, pool.map(look, paths), strict=True):
                if isinstance(answer, InputError):
                    assert unreadable is not None
                    unreadable[path] = answer
                    continue
                values, color = answer
                into = self.colors if color else self.values
                for value in values:
                    into.setdefault(value, path)
                    self.files[value] += 1
        self.values.pop(ignore, None)
        self.colors.pop(ignore * 0x010101, None)

    def refuse_lossy(self) -> None:
        lossy = [p for p in self.paths if p.suffix.lower() in LOSSY]
        if lossy and (self.colors or len(self.values) > 2):
            raise InputError(
                f"The mask {lossy[0]} is a JPEG, which blurs the borders into values "
                "that are no class: save the masks as PNG, or set `mask` to binary if "
                "they are black and white."
            )

    def table(self) -> tuple[Color, ...]:
        """The colours, sorted; a mask that happens to be all grey counts with them."""
        self.refuse_lossy()
        packed = {*self.colors, *(v * 0x010101 for v in self.values if v < 256)}
        if len(packed) > MOST_COLORS:
            example = next(iter(self.colors.values()))
            raise InputError(
                f"The masks have {len(packed)} colours, as in {example}, too many for "
                "classes: give the table of `colors`, set `mask` to instances if each "
                "object has its own colour, or save class ids."
            )
        return tuple(_unpacked(value) for value in sorted(packed))

    def index_names(self, *, sure: bool) -> tuple[str, ...]:
        """Names for ids 0 .. the largest, if the values look like ids at all."""
        largest = max(self.values, default=0)
        dense = 2 * len(self.values) > largest
        if largest > 255 or not (sure or (dense and largest < MOST_CLASSES)):
            few = sorted(self.values)
            text = ", ".join(map(str, few[:8])) + (", ..." if len(few) > 8 else "")
            # The value of the fewest files is the one that is likely to be a slip.
            odd = min(few, key=lambda value: (self.files[value], -value))
            raise InputError(
                f"The masks have the values {text} (such as {odd} in "
                f"{self.values[odd]}), which are not plainly class ids: set `mask` to "
                "binary if they are black and white, with or without greys at soft "
                "edges, to instances if each object has its own number, or to index; "
                f"set `ignore` to {odd} if that means not annotated; or give "
                "`label_names` for the ids or a table of `colors`."
            )
        return ("background", *(f"class_{i}" for i in range(1, max(largest, 1) + 1)))


@functools.lru_cache(maxsize=50_000)
def _values(
    read: Reader, path: Path, changed: int, size: int, rank: int
) -> tuple[frozenset[int], bool]:
    """(the different values, whether they are packed colours) of one mask file.

    Remembered as long as the file has the same size and time of change: training and
    evaluation look at the same masks.
    """
    del changed, size
    mask = read(path)
    color = mask.ndim > rank
    if color:
        mask = _packed(mask, color)
    if mask.dtype.kind == "u" and mask.dtype.itemsize <= 2:
        values = np.flatnonzero(np.bincount(mask.ravel()))
    else:
        values = np.unique(mask)
    return frozenset(values.tolist()), color


def _packed(mask: NumpyArray, color: bool) -> NumpyArray:
    """One number 0xRRGGBB a pixel."""
    if not color:
        return mask.astype(np.int64) * 0x010101
    mask = mask.astype(np.int32)
    return mask[..., 0] << 16 | mask[..., 1] << 8 | mask[..., 2]


def _unpacked(value: int) -> Color:
    return value >> 16 & 255, value >> 8 & 255, value & 255


def _color(entry: Sequence[int]) -> Color:
    if len(entry) != 3 or not all(0 <= int(v) <= 255 for v in entry):
        raise InputError(
            f"{entry!r} is not a colour: `colors` wants three numbers from 0 to 255 "
            "for each class."
        )
    return int(entry[0]), int(entry[1]), int(entry[2])


def _two(names: tuple[str, ...], kind: str) -> tuple[str, ...]:
    if len(names) not in (0, 2):
        raise InputError(
            f"`label_names` has {len(names)} names, but {kind} masks have background "
            "and foreground: give two names, or set `mask` to index."
        )
    return names or ("background", "foreground")


def _color_names(names: tuple[str, ...], table: tuple[Color, ...]) -> tuple[str, ...]:
    if names and len(names) != len(table):
        raise InputError(
            f"`label_names` has {len(names)} names, but there are {len(table)} colours:"
            f" {', '.join(map(str, table))}: give one name for each."
        )
    made = ("#{:02x}{:02x}{:02x}".format(*color) for color in table)
    return names or tuple("background" if m == "#000000" else m for m in made)
