"""What masks mean, guessed from how often which values occur: pure functions.

A guess is a `Kind`: the options that a source would need, and the reason in words.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Color = tuple[int, int, int]

MOST_IDS = 32  # class ids run up to here; beyond, numbers are objects or greys
MOST_COLORS = 64
NEAR = 32  # greys that are as good as black or white, where 255 is white
FAR = 64  # between two colours of a clean palette, in the channel that differs most
RARE = 0.15  # part of the pixels that a border of 255 takes at most


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The values of all masks of a data set.

    ``pixels``: how many pixels have a value: whole numbers, or packed 0xRRGGBB.
    ``files``: how many masks have it.
    ``masks``: how many masks there are.
    ``coloured``: whether the values are packed colours.
    ``lossy``: whether some of the files are JPEGs.
    ``palette``: whether some of the files have a palette.
    ``white``: the largest number that the type holds.
    ``consecutive``: part of the masks with objects, whose values are 0 or 1 to n
        without a gap.
    ``pieces``: connected pieces that a value has in a mask, on average; 0: not known.
    ``thin``: part of the pixels of 255 that lie within two pixels of another value.
    """

    pixels: Mapping[int, int]
    files: Mapping[int, int]
    masks: int
    coloured: bool = False
    lossy: bool = False
    palette: bool = False
    white: int = 255
    consecutive: float = 0.0
    pieces: float = 0.0
    thin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """What masks are taken for.

    ``name``: a word or two for people.
    ``why``: the reason, a clause.
    ``options``: of the source: mask, colors, ignore.
    ``label_names``: of the classes; () where the source makes them.
    ``problem``: why training cannot go well, and the remedy; "" if it can.
    ``guess``: what was decided and may be wrong; "" if nothing.
    """

    name: str
    why: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label_names: tuple[str, ...] = ()
    problem: str = ""
    guess: str = ""


def shares(histogram: Histogram) -> dict[int, float]:
    """The part of all pixels that each value has, the commonest first."""
    total = max(sum(histogram.pixels.values()), 1)
    common = sorted(histogram.pixels.items(), key=lambda item: (-item[1], item[0]))
    return {value: count / total for value, count in common}


def kind_of(histogram: Histogram) -> Kind:
    """What the masks of a data set are, by their values."""
    if not histogram.pixels:
        return Kind("nothing", "no mask could be read", problem="No mask can be read.")
    return _of_colours(histogram) if histogram.coloured else _of_numbers(histogram)


def _of_numbers(histogram: Histogram) -> Kind:
    values = sorted(histogram.pixels)
    beside = [value for value in values if value != 0]
    listed = _listed(values)
    if values[0] < 0:
        return _unclear(f"the value {values[0]} is below 0")
    if len(values) == 1:
        return _one_value(values[0])
    if len(values) == 2 and 0 in values and (beside[0] == 1 or not histogram.lossy):
        return Kind(
            f"binary 0/{beside[0]}",
            f"all masks hold {listed} and nothing else",
            {"mask": "binary"} if beside[0] not in (1, 255, 65535) else {},
            ("background", "foreground"),
        )
    if (blurred := _blurred(histogram)) is not None:
        return blurred
    ids = [value for value in values if value != 255]
    rare = shares(histogram).get(255, 0.0) < RARE or histogram.thin > 0.5
    if 255 in values and 0 < ids[-1] < MOST_IDS and rare and not _objects(histogram):
        kind = _ids(ids, histogram)
        return dataclasses.replace(
            kind,
            options={**kind.options, "ignore": 255},
            guess="255 beside small class ids is taken for 'not annotated' (ignore=255)"
            ", as in Pascal VOC: set ignore to -1 and add a name if it is a class.",
        )
    if _objects(histogram):
        return Kind(
            "instances",
            f"{len(values)} values ({listed}), numbered one after another in each mask"
            " as objects are",
            {"mask": "instances"},
            ("background", "foreground"),
            guess="Each number is taken for one object of one class: set mask to index"
            " if the numbers are classes.",
        )
    if values[-1] < MOST_IDS:
        return _ids(values, histogram)
    if len(values) <= 16 and values[-1] <= 255:
        table = tuple((value, value, value) for value in values)
        return Kind(
            "greys as classes",
            f"{len(values)} distant greys ({listed}), each a class",
            {"mask": "colors", "colors": table},
            _names(table),
            guess=f"The greys {listed} are taken for classes: give them names.",
        )
    return _unclear(
        f"{len(values)} values ({listed}) are neither ids nor black and white"
    )


def _of_colours(histogram: Histogram) -> Kind:
    colours = [_unpacked(value) for value in shares(histogram)]
    if len(colours) <= MOST_COLORS and not histogram.lossy:
        table = tuple(sorted(colours))
        return Kind(
            "RGB colours",
            f"{len(table)} colours, each a class",
            {"mask": "colors", "colors": table},
            _names(table),
        )
    palette = clean_palette(histogram)
    text = ", ".join(map(str, palette)) or "none stands out"
    if palette:
        return Kind(
            "damaged colours",
            f"{len(colours)} colours around {len(palette)}",
            problem=f"The masks have {len(colours)} colours, most of them near the"
            f" {len(palette)} colours {text}, as JPEG and smoothing leave them: save"
            " them anew as PNG from the originals, each pixel with the nearest of"
            " these.",
        )
    return _unclear(f"{len(colours)} colours are too many for classes")


def clean_palette(histogram: Histogram, *, least: float = 0.005) -> tuple[Color, ...]:
    """The few colours that damaged ones lie around.

    Args:
        histogram: of packed colours.
        least: the part of the pixels that a colour has, with those near it.

    Returns:
        The commonest colour of each group that is dense around it, sorted, for at a
        border colours are mixed; () if these groups hold less than 90 % of the pixels,
        or are more than `MOST_COLORS`.
    """
    kept: list[Color] = []
    gathered: list[float] = []
    dense: list[float] = []
    for value, share in list(shares(histogram).items())[:20_000]:
        colour = _unpacked(value)
        near = [i for i, other in enumerate(kept) if _distance(colour, other) < FAR]
        if near:
            i = min(near, key=lambda i: _distance(colour, kept[i]))
            gathered[i] += share
            dense[i] += share * (_distance(colour, kept[i]) < FAR // 3)
        elif len(kept) < 4 * MOST_COLORS:
            kept.append(colour)
            gathered.append(share)
            dense.append(share)
    groups = [
        (colour, share)
        for colour, share, core in zip(kept, gathered, dense, strict=True)
        if share >= least and core >= 0.5 * share
    ]
    enough = sum(s for _, s in groups) >= 0.9
    return tuple(sorted(c for c, _ in groups)) if enough and len(groups) <= 64 else ()


def _blurred(histogram: Histogram) -> Kind | None:
    """Two clusters of greys, at black and at white, with some between."""
    values, white = sorted(histogram.pixels), histogram.white
    near = NEAR * white // 255
    part = shares(histogram)
    low = sum(s for v, s in part.items() if v <= near)
    high = sum(s for v, s in part.items() if v >= white - near)
    between = [v for v in values if near < v < white - near]
    if values[-1] < white - near or low + high < 0.9 or not high:
        return None
    # A few greys of weight are classes; an edge has many, and each is rare.
    heavy = [v for v in values if part[v] >= 0.01 and v not in (0, white)]
    if not histogram.lossy and (len(values) <= 4 or any(v in between for v in heavy)):
        return None
    inexact = max(1 - part.get(0, 0.0) - part.get(white, 0.0), 1e-12)
    middle = sum(part[v] for v in between)
    damaged = histogram.lossy or middle < 0.5 * inexact
    name = "black and white, damaged by JPEG" if damaged else "black and white, soft"
    cause = "as JPEG leaves them" if damaged else "as smooth edges have them"
    return Kind(
        name,
        f"{len(values)} values in two clusters, {low:.1%} of the pixels near 0 and"
        f" {high:.1%} near {white}, with {middle:.2%} between, {cause}",
        {"mask": "binary"},
        ("background", "foreground"),
        guess=f"The masks are cut at {(white + 1) // 2} (mask=binary): save them anew"
        " as PNG with two values if borders matter.",
    )


def _objects(histogram: Histogram) -> bool:
    """Whether numbers count objects: many, no gaps in a mask, one piece each."""
    values = [v for v in histogram.pixels if v not in (0, 255)]
    if not values:
        return False
    largest = max(values)
    one_piece = 0 < histogram.pieces < 1.3
    if largest >= MOST_IDS:
        many = len(values) > 16
        return many and (histogram.consecutive >= 0.5 or one_piece)
    # Of few numbers only masks that differ in how far they count tell.
    common = histogram.files.get(largest, 0) / max(histogram.masks, 1)
    return (
        histogram.masks >= 3
        and largest > 3
        and histogram.consecutive >= 0.9
        and one_piece
        and common < 0.8
    )


def _ids(values: Sequence[int], histogram: Histogram) -> Kind:
    ids = [value for value in values if value]
    dense = 2 * len(values) > values[-1]
    names = ("background", *(f"class_{i}" for i in range(1, values[-1] + 1)))
    missing = [i for i in range(1, values[-1]) if i not in histogram.pixels]
    guess = ""
    if missing and len(missing) <= 8:
        guess = f"The class ids {_listed(missing)} occur in no mask."
    if 0 not in values:
        guess = f"No mask has the value 0: the ids begin at {ids[0]}, and the class"
        guess += " background stays empty."
    return Kind(
        "palette (index)" if histogram.palette else "index",
        f"{len(values)} values ({_listed(values)}), small numbers as class ids are",
        {} if dense else {"mask": "index"},
        names,
        guess=guess,
    )


def _one_value(value: int) -> Kind:
    what = "empty" if value == 0 else "full"
    return Kind(
        what,
        f"every pixel of every mask is {value}",
        {"mask": "binary"},
        ("background", "foreground"),
        problem=f"Every pixel of every mask is {value}, so there is nothing to learn:"
        " check that these are the masks, and that what opens them shows something.",
    )


def _unclear(why: str) -> Kind:
    return Kind(
        "unclear",
        why,
        problem=f"The masks cannot be told from a picture: {why}; set the option mask"
        " to binary, index or instances if you know what they are, or save them anew.",
    )


def _listed(values: Sequence[int]) -> str:
    few = ", ".join(map(str, values[:8]))
    return few + (f", ... {values[-1]}" if len(values) > 8 else "")


def _names(table: Sequence[Color]) -> tuple[str, ...]:
    made = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in table)
    return tuple("background" if name == "#000000" else name for name in made)


def _unpacked(value: int) -> Color:
    return value >> 16 & 255, value >> 8 & 255, value & 255


def _distance(a: Color, b: Color) -> int:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
