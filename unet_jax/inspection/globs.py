"""Globs for the images and the masks of a folder, and the source that reads them."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unet_jax.data import formats, stacks
from unet_jax.inspection.layout import EVALUATION, TRAIN, Layout, stem_of, suffix_of
from unet_jax.inspection.words import match
from unet_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class Globs:
    """Where the images and the masks below a folder are, as options of a source.

    ``splits``: of patterns with ``{split}``, for training and for evaluation.
    """

    images: str
    masks: str
    pairs: int
    more: tuple[tuple[str, Any], ...] = ()
    # A pair of files, by which the source is chosen.
    example: tuple[Path, Path] | None = None
    notes: tuple[str, ...] = ()
    splits: tuple[str, str] = (TRAIN, EVALUATION)


def matched(
    images: Sequence[Path], masks: Sequence[Path], left: str, right: str
) -> Globs | None:
    """Files of two places that pair by their names, and globs for them.

    Args:
        images, masks: the files.
        left, right: the places as globs below a root; "" is the root itself.

    Returns:
        None where hardly any name has a partner.
    """
    if not images or not masks:
        return None
    by_image = {stem_of(p.name): p for p in images}
    by_mask = {stem_of(p.name): p for p in masks}
    found = match(list(by_image), list(by_mask))
    if found is None or found.pairs * 10 < min(len(by_image), len(by_mask)):
        return None
    plain = found.image == found.mask == "*"
    if plain:
        key = next(k for k in sorted(by_image) if k in by_mask)
        pair = (by_image[key], by_mask[key])
    else:
        pair = (images[0], masks[0])
    if plain and "*" not in left and "*" not in right:
        return Globs(left, right, found.pairs, (), pair)
    prefix_left, prefix_right = (
        f"{place}/" if place else "" for place in (left, right)
    )
    return Globs(
        f"{prefix_left}{found.image}{ending_of(images)}",
        f"{prefix_right}{found.mask}{ending_of(masks)}",
        found.pairs,
        (),
        pair,
    )


def layout_of(
    root: Path,
    globs: Globs,
    *,
    train: str = "",
    evaluation: str = "",
    why: str = "",
    notes: Sequence[str] = (),
) -> Layout:
    """A layout of globs, with the source that reads such files.

    Args:
        root: what the globs are below.
        globs: with an example, which tells the source.
        train, evaluation: splits; "": those of the globs.
        why: what it was recognised by.
        notes: sentences to go with it.

    Raises:
        InputError: volumes with several masks each, which nothing reads.
    """
    assert globs.example is not None
    source, more = source_of(*globs.example)
    if source == "volumes" and globs.more:
        raise InputError(
            f"{root} has several masks for each volume, such as {globs.example[1]}:"
            " join them into one mask of class ids, for only 2-D images may have"
            " several."
        )
    options = {"images": globs.images, "masks": globs.masks, **dict(globs.more), **more}
    if "label_masks" in options:
        del options["masks"]
        why = "one folder of masks a label"
    if options.get("mask") == "objects":
        why = "one mask file an object"
    return Layout(
        source,
        root,
        options,
        train or globs.splits[0],
        evaluation or globs.splits[1],
        why or "a folder of images and one of masks",
        (*globs.notes, *notes),
    )


def source_of(image: Path, mask: Path) -> tuple[str, dict[str, Any]]:
    """Which source reads such a pair of files, and the options that it needs.

    A file that cannot be read is left to `folder`; it is reported when it is looked at.
    """
    suffix = suffix_of(image.name)
    try:
        if suffix in stacks.NIFTI:
            return "volumes", {"slices": False}
        if suffix in (".tif", ".tiff"):
            (pages, *_), _ = stacks.volume_size(image)
            if pages > 1 and stacks.volume_size(mask)[0][0] == pages:
                return "volumes", {"slices": True}
        if suffix == ".npy" and suffix_of(mask.name) == ".npy":
            shapes = []
            for path in (image, mask):
                with formats.readable(str(path)):
                    shapes.append(formats.npy_header(path)[0])
            if len(shapes[1]) == 3 and shapes[0][:3] == shapes[1]:
                return "volumes", {"slices": False}
    except InputError:
        pass
    return "folder", {}


def ending_of(files: Sequence[Path]) -> str:
    """The ending that most of the files have, as they write it."""
    endings = Counter(p.name[len(stem_of(p.name)) :] for p in files)
    return endings.most_common(1)[0][0]
