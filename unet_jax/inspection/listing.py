"""The image files and mask files of a layout, and those that have no partner.

A source refuses what does not pair; an inspection counts it and goes on.
"""

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unet_jax.data import split as splits
from unet_jax.data import trust
from unet_jax.data.folder import relative
from unet_jax.data.names import exists, stands_for, varies
from unet_jax.data.places import SPLIT, Place
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
        for place in _places(layout, options["images"]):
            images = _found(place, options["images"], several)
            sides = [_found(place, pattern, several) for pattern in patterns]
            whole.append(_join(layout.root, images, sides, several))
    listing = Listing(
        *(
            tuple(entry for part in whole for entry in getattr(part, field.name))
            for field in dataclasses.fields(Listing)
        )
    )
    every = [f for pair in listing.pairs for f in (pair.image, *pair.masks)]
    trust.check_links(layout.root, every, links=links)
    # Where all splits have their masks in one place, some are of the other part.
    used = {relative(path, layout.root) for path in every}
    spare = dict.fromkeys(name for name in listing.spare if name not in used)
    return dataclasses.replace(listing, spare=tuple(spare))


def _places(layout: Layout, images: str) -> list[Place]:
    """The places of both splits, as the sources find them; or the root itself."""
    root = layout.root
    assert root is not None
    both = {splits.parse(part)[0] for part in (layout.train, layout.evaluation)}
    names = sorted(both)
    if SPLIT in images:
        return [Place(root, name) for name in names]
    found = [Place(root / name, name) for name in names]
    found = [p for p in found if os.path.isdir(p.base) and exists(p.base, images)]
    return found or [Place(root, names[0])]


def _found(where: Place, pattern: str, several: bool) -> list[tuple[str, Path]]:
    """(key, file) for all files of a folder, a file or a glob, sorted by path."""
    base, pattern = where.base, where.of(pattern)
    place = base / pattern
    # Unlike pathlib's, this does not fail on a name that is too long.
    if os.path.isdir(place):
        return [(stem_of(p.name), p) for p in files_in(place)]
    if os.path.isfile(place):
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
        if varies(part):
            return "".join(stands_for(found, part))
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
