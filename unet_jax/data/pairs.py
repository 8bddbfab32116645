"""Which mask files belong to which image file: layouts, globs, stems.

An image has one mask file (`find_pairs`), one file for each of its objects
(`find_objects`), or one for each label (`find_labels`).
"""

import contextlib
import glob
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from unet_jax.data import places, trust
from unet_jax.data.faults import Faults
from unet_jax.data.names import by_key, first_wild, nothing
from unet_jax.data.places import SPLIT, WHOLE, Place
from unet_jax.types import InputError, Shape, size_text

__all__ = [
    "WHOLE",
    "Entry",
    "Pair",
    "find_labels",
    "find_objects",
    "find_pairs",
    "passing",
    "relative",
    "same_size",
]

_LOG = logging.getLogger("unet_jax")

T = TypeVar("T")


class Pair(NamedTuple):
    """An image file and its mask file."""

    image: Path
    mask: Path


class Entry(NamedTuple):
    """An image file and all of its mask files; None where a label has no file."""

    image: Path
    masks: tuple[Path | None, ...]


def find_pairs(
    root: Path,
    name: str,
    *,
    images: str,
    masks: str,
    suffixes: Sequence[str],
    faults: Faults | None = None,
    links: bool = False,
) -> tuple[list[Pair], list[Path]]:
    """The pairs of one split, and the masks of all splits (`places`).

    Args:
        root: the folder everything is under.
        name: the split's name.
        images, masks: as for `folder.open`; each may also name a single file.
        suffixes: the endings that count, in lower case.
        faults: takes images that cannot be paired; None: they are raised.
        links: whether files may be links that lead out of the root.

    Returns:
        ``(pairs, every mask)``, the pairs sorted by stem.

    Raises:
        InputError: see `folder.open`.
    """
    faults = faults or Faults("stop", f"images of {root}")
    own, others = places.find(root, name, images, [masks])
    pairs = _pairs(own, images, masks, suffixes, faults)
    _check_links(own, images, (pair.image for pair in pairs), root, links)
    _check_links(own, masks, (pair.mask for pair in pairs), root, links)
    every = [pair.mask for pair in pairs]
    for other in [own] if _shared(images, masks) else others:
        # Another split's faults are that split's to report.
        with contextlib.suppress(InputError):
            ours = Faults("skip", f"masks of {other.name}")
            files = by_key(other.base, other.of(masks), suffixes, "mask", ours).values()
            _check_links(other, masks, files, root, links)
            every += files
    return pairs, list(dict.fromkeys(every))


def find_objects(
    root: Path,
    name: str,
    *,
    images: str,
    masks: str,
    suffixes: Sequence[str],
    faults: Faults,
    links: bool = False,
) -> list[Entry]:
    """The images of one split with the files of their objects, sorted by name.

    The files of an image are those for which the first part of the path with a wildcard
    stands for the image's stem. In the last part, the file's name, the last wildcard
    numbers the objects and the others stand for the stem.

    Args:
        root, name, images, suffixes, faults, links: as for `find_pairs`.
        masks: a glob, or a folder that holds a folder of files for each image.

    Returns:
        The entries sorted by stem. An image has no files if the folder that its files
        would be in exists and is empty.

    Raises:
        InputError: see `folder.open`.
    """
    own, _ = places.find(root, name, images, [masks])
    base, pattern = own.base, own.of(masks)
    if not glob.has_magic(pattern):
        pattern = f"{pattern.rstrip('/')}/*/*"
    if "**" in pattern:
        raise InputError(
            f"masks={masks!r} does not say which folder is an image's: write one * for "
            "each folder, such as '*/masks/*.png', where mask='objects'."
        )
    files = [
        path
        for path in glob.glob(pattern, root_dir=base)
        if path.lower().endswith(tuple(suffixes))
    ]
    if not files:
        raise nothing(base / pattern, base, suffixes, "mask")
    of_image: dict[str, list[Path]] = {}
    folder = os.path.dirname(pattern)
    if glob.has_magic(folder):
        for place in glob.glob(folder, root_dir=base):
            if (base / place).is_dir():
                of_image[first_wild(place, pattern)] = []
    for file in sorted(files):
        of_image.setdefault(first_wild(file, pattern), []).append(base / file)
    found = by_key(base, own.of(images), suffixes, "image", faults)
    taken = {path for paths in of_image.values() for path in paths}
    found = {key: path for key, path in found.items() if path not in taken}
    remedy = f"put one file for each object in {base / pattern} where the first * is "
    remedy += "the image's stem"
    keys = _with_masks(found, of_image.keys(), remedy, faults)
    if not _shared(images, masks):
        _warn_spare({key: paths[0] for key, paths in of_image.items() if paths}, found)
    entries = [Entry(found[key], tuple(of_image[key])) for key in keys]
    _check_links(own, images, (entry.image for entry in entries), root, links)
    every = (path for key in keys for path in of_image[key])
    _check_links(own, pattern, every, root, links)
    return entries


def find_labels(
    root: Path,
    name: str,
    *,
    images: str,
    label_masks: Mapping[str, str],
    suffixes: Sequence[str],
    faults: Faults,
    links: bool = False,
) -> list[Entry]:
    """The images of one split with a mask file for each label.

    Args:
        root, name, images, suffixes, faults, links: as for `find_pairs`.
        label_masks: label -> its folder or glob, of which each is paired as masks are.

    Returns:
        The entries sorted by stem; None for a label that has no file of this image.

    Raises:
        InputError: see `folder.open`.
    """
    own, _ = places.find(root, name, images, label_masks.values())
    base = own.base
    of_label = {
        label: by_key(base, own.of(pattern), suffixes, "mask", faults, "label_masks")
        for label, pattern in label_masks.items()
    }
    found = by_key(base, own.of(images), suffixes, "image", faults)
    taken = {path for files in of_label.values() for path in files.values()}
    found = {key: path for key, path in found.items() if path not in taken}
    some: dict[str, Path] = {}
    spare: dict[str, Path] = {}
    for label, files in of_label.items():
        some = files | some
        if not _shared(images, label_masks[label]):
            spare = files | spare
    where = ", ".join(str(base / own.of(p)) for p in label_masks.values())
    remedy = f"add a file of the same stem in one of {where}, or take the image away"
    keys = _with_masks(found, some.keys(), remedy, faults)
    _warn_spare(spare, found)
    entries = [
        Entry(found[key], tuple(files.get(key) for files in of_label.values()))
        for key in keys
    ]
    _check_links(own, images, (entry.image for entry in entries), root, links)
    for label, pattern in label_masks.items():
        files = of_label[label]
        used = (files[key] for key in keys if key in files)
        _check_links(own, pattern, used, root, links)
    return entries


def passing(
    items: Sequence[T], check: Callable[[T], object], faults: Faults
) -> list[T]:
    """The items without a fault, in their order.

    Args:
        items: what is checked, in four threads.
        check: raises an InputError for an item that is not to be used.
        faults: takes it, or raises it.
    """

    def fault(item: T) -> InputError | None:
        try:
            check(item)
        except InputError as error:
            if faults.on_error == "stop":
                raise
            return error
        return None

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fault, items))
    for error in found:
        if error is not None:
            faults.add(error)
    return [item for item, error in zip(items, found, strict=True) if error is None]


def same_size(pair: Pair, image: Shape, mask: Shape) -> None:
    """Raises InputError if the two spatial shapes differ."""
    if image != mask:
        raise InputError(
            f"{pair.image} has the size {size_text(image)}, but its mask {pair.mask} "
            f"{size_text(mask)} (rows first): give them the same size."
        )


def relative(path: Path, root: Path) -> str:
    """The path below the root with forward slashes; as it is if not below."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _shared(images: str, masks: str) -> bool:
    """Whether the masks of all splits are in one place, so that some are of others."""
    return SPLIT in images and SPLIT not in masks


def _pairs(
    place: Place, images: str, masks: str, suffixes: Sequence[str], faults: Faults
) -> list[Pair]:
    base = place.base
    image_place, mask_place = base / place.of(images), base / place.of(masks)
    mask_files = by_key(base, place.of(masks), suffixes, "mask", faults)
    image_files = by_key(base, place.of(images), suffixes, "image", faults)
    # One folder may hold both, told apart by globs of which one matches all.
    if image_place != mask_place:
        taken = set(mask_files.values())
        image_files = {k: p for k, p in image_files.items() if p not in taken}
    if os.path.isfile(image_place) and os.path.isfile(mask_place):
        return [Pair(image_place, mask_place)]
    if not image_files:
        raise nothing(image_place, base, suffixes, "image")
    remedy = _remedy(image_files, mask_files, mask_place, masks)
    keys = _with_masks(image_files, mask_files.keys(), remedy, faults)
    if not _shared(images, masks):
        _warn_spare(mask_files, image_files)
    return [Pair(image_files[key], mask_files[key]) for key in keys]


def _remedy(
    images: Mapping[str, Path], masks: Mapping[str, Path], place: Path, given: str
) -> str:
    """What to do about the first image without a mask, from what masks are called."""
    key = min(images.keys() - masks.keys(), default="")
    # Of 1_mask and 10_mask the shorter is that of the image 1.
    spare = (mask for mask in masks.keys() - images.keys() if mask.startswith(key))
    near = min(spare, key=lambda mask: (len(mask), mask), default=None)
    name = "" if near is None else masks[near].name
    if near is None or near not in name:
        return f"add a file of the same stem in {place}, or take the image away"
    before, _, after = name.partition(near)
    parts = (before, near[len(key) :] + after)
    folder = given.rstrip("/") if os.path.isdir(place) else os.path.dirname(given)
    folder = glob.escape(folder) if os.path.exists(place) else folder
    pattern = os.path.join(folder, "*".join(map(glob.escape, parts)))
    return f"if {name} is it, set `masks` to a glob such as {pattern!r}"


def _with_masks(
    images: Mapping[str, Path],
    masked: Set[str],
    remedy: str,
    faults: Faults,
) -> list[str]:
    """The sorted keys of the images that have a mask; the others are faults."""
    missing = sorted(images.keys() - masked)
    more = f" ({len(missing)} of {len(images)} images have none)"
    more = more if len(missing) > 1 else ""
    for key in missing:
        error = InputError(f"The image {images[key]} has no mask{more}: {remedy}.")
        if len(missing) == len(images):
            raise error
        faults.add(error)
    return sorted(images.keys() & masked)


def _warn_spare(masks: Mapping[str, Path], images: Mapping[str, Path]) -> None:
    spare = sorted(masks.keys() - images.keys())
    if len(spare) == 1:
        _LOG.warning("1 mask has no image and is left out: %s", masks[spare[0]])
    elif spare:
        _LOG.warning(
            "%d masks have no image and are left out, such as %s",
            len(spare),
            masks[spare[0]],
        )


def _check_links(
    place: Place, pattern: str, paths: Iterable[Path], root: Path, links: bool
) -> None:
    """Refuses links that lead out of the root, or of the place that a pattern names."""
    pattern = place.of(pattern)
    parts = Path(pattern).parts
    if os.path.isabs(pattern) or ".." in parts:
        # Written by the user, and not by whoever made the files.
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1])
        root = place.base.joinpath(*plain)
    trust.check_links(root, paths, links=links)
