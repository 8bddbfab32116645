"""The image files and mask files of a layout, and those that have no partner.

A source refuses what does not pair; an inspection counts it and goes on.
"""

import dataclasses
import glob
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unet_jax.data import split as splits
from unet_jax.data import trust
from unet_jax.data.folder import relative
from unet_jax.inspection.layout import Layout, files_in, listable, stem_of, suffix_of

# What the sources take where nothing is said.
DEFAULTS = {
    "folder": {"images": "images", "masks": "masks"},
    "volumes": {"images": "train-volume.tif", "masks": "train-labels.tif"},
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image file and its mask files: one, one an object, or one a label."""

    name: str
    image: Path
    masks: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a data set.

    ``pairs``: sorted by name.
    ``bare``: images without a mask, as paths below the root.
    ``spare``: masks without an image, likewise.
    ``twice``: names that two files of one side have, such as a.png and a.jpg.
    """

    pairs: tuple[Pair, ...]
    bare: tuple[str, ...] = ()
    spare: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()


def files_of(layout: Layout, *, links: bool = False) -> Listing | None:
    """The pairs of files of a layout.

    Args:
        layout: of the source ``folder`` or ``volumes``; of others None comes back,
            because their files do not stand for themselves.
        links: whether files may be links that lead out of the root.

    Raises:
        InputError: a link that leads out of the root, or a folder that cannot be
            listed.
    """
    if layout.source not in DEFAULTS or layout.root is None:
        return None
    options: dict[str, Any] = {**DEFAULTS[layout.source], **layout.options}
    labelled = options.get("label_masks") or ()
    patterns = [pattern for _, pattern in dict(labelled).items()] or [options["masks"]]
    several = options.get("mask") == "objects"
    whole: list[Listing] = []
    with listable():
        for base in _bases(layout, options["images"]):
            images = _found(base, options["images"], several)
            sides = [_found(base, pattern, several) for pattern in patterns]
            whole.append(_join(layout.root, images, sides, several))
    listing = Listing(
        *(
            tuple(entry for part in whole for entry in getattr(part, field.name))
            for field in dataclasses.fields(Listing)
        )
    )
    every = [f for pair in listing.pairs for f in (pair.image, *pair.masks)]
    trust.check_links(layout.root, every, links=links)
    return listing


def _bases(layout: Layout, images: str) -> list[Path]:
    """The split folders of a root, as the sources find them; or the root itself."""
    assert layout.root is not None
    names = {splits.parse(part)[0] for part in (layout.train, layout.evaluation)}
    bases = [layout.root / name for name in sorted(names)]
    bases = [base for base in bases if base.is_dir() and _exists(base, images)]
    return bases or [layout.root]


def _exists(base: Path, pattern: str) -> bool:
    if glob.has_magic(pattern):
        return any(True for _ in glob.iglob(pattern, root_dir=base, recursive=True))
    return (base / pattern).exists()


def _found(base: Path, pattern: str, several: bool) -> list[tuple[str, Path]]:
    """(key, file) for all files of a folder, a file or a glob, sorted by path."""
    place = base / pattern
    if place.is_dir():
        return [(stem_of(p.name), p) for p in files_in(place)]
    if place.is_file():
        return [("", place)]
    names = sorted(glob.glob(pattern, root_dir=base, recursive=True))
    found = [(_wild(name, pattern, first=several), base / name) for name in names]
    return [(key, p) for key, p in found if suffix_of(p.name) and p.is_file()]


def _wild(name: str, pattern: str, *, first: bool) -> str:
    """What the wildcards of a pattern's last part that has any stand for.

    Of several masks an image it is the first part: the others tell objects apart. A
    part that is the whole file name counts without its ending.
    """
    pairs = list(zip(Path(name).parts, Path(pattern).parts, strict=False))
    for found, part in pairs if first else reversed(pairs):
        if not glob.has_magic(part):
            continue
        pieces = re.split(r"(\*+|\?|\[[^\]]*\])", part)
        rule = "".join(
            f"({'.*' if p[0] == '*' else '.' if p == '?' else p.replace('[!', '[^')})"
            if i % 2
            else re.escape(p)
            for i, p in enumerate(pieces)
        )
        found_in = re.fullmatch(rule, found, re.DOTALL)
        return "".join(found_in.groups()) if found_in else found
    return name


def _join(
    root: Path,
    images: Sequence[tuple[str, Path]],
    sides: Sequence[Sequence[tuple[str, Path]]],
    several: bool,
) -> Listing:
    masks: dict[str, list[Path]] = {}
    taken: set[Path] = set()
    twice = [key for key, n in Counter(k for k, _ in images).items() if n > 1]
    for side in sides:
        taken |= {path for _, path in side}
        counts = Counter(key for key, _ in side)
        twice += [key for key, n in counts.items() if n > 1 and not several]
        for key, path in side:
            masks.setdefault(key, []).append(path)
    # One folder may hold both, told apart by globs of which one matches all.
    images = [(key, path) for key, path in images if path not in taken]
    keys = {key for key, _ in images}
    # Equal keys on one side are reported, and one of them is taken.
    last = dict(images)
    return Listing(
        tuple(
            Pair(relative(last[key], root), last[key], tuple(masks[key]))
            for key in sorted(last)
            if key in masks
        ),
        tuple(relative(path, root) for key, path in images if key not in masks),
        tuple(relative(masks[k][0], root) for k in sorted(masks) if k not in keys),
        tuple(sorted(set(twice))),
    )
