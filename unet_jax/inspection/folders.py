"""Rules for folders of images and masks: each is a root -> Layout, or None.

Every rule looks at names, and at the headers of a few files.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from unet_jax.data.places import SPLIT
from unet_jax.inspection.globs import Globs, ending_of, layout_of, matched
from unet_jax.inspection.layout import (
    EVALUATION,
    TRAIN,
    Layout,
    files_in,
    folders_in,
    stem_of,
)
from unet_jax.inspection.templates import joined
from unet_jax.inspection.words import role


def two_folders(root: Path) -> Layout | None:
    """``images`` and ``masks`` under any of their names, with or without splits."""
    parts = [(role(p.name), p) for p in folders_in(root)]
    above = {r.split: p for r, p in parts if r.split and not r.what and r.exact}
    found = {split: _inside(place, "") for split, place in above.items()}
    if (first := found.get("train")) is not None:
        if SPLIT in first.images:
            return layout_of(above["train"], first)
        return _with_splits(root, above, found, first, "one folder a split")
    if (globs := _inside(root, "")) is not None:
        return layout_of(root, globs)
    if (globs := _inside(root, "train")) is not None:
        held = {r.split for r, _ in parts if r.what} - {"", "train"}
        others = {split: _inside(root, split) for split in held}
        return layout_of(root, joined(globs, others))
    return None


def sample_folders(root: Path) -> Layout | None:
    """A folder an example: ``ID/images/a.png`` and ``ID/masks/*.png``, or two files."""
    for base in (root, *sorted(folders_in(root), key=_train_first)):
        places = [p for p in folders_in(base) if not role(p.name).what]
        if len(places) < 2:
            continue
        prefix = "" if base == root else f"{base.name}/"
        globs = _samples_of_folders(places) or _samples_of_files(places)
        if globs is not None:
            globs = dataclasses.replace(
                globs, images=prefix + globs.images, masks=prefix + globs.masks
            )
            return layout_of(root, globs, why="one folder an image")
    return None


def one_folder(root: Path) -> Layout | None:
    """Images and masks side by side: ``a.png`` and ``a_mask.png``, ``mask-a.png``."""
    above = {
        r.split: p for p in folders_in(root) if (r := role(p.name)).split and r.exact
    }
    found = {split: _side_by_side(place) for split, place in above.items()}
    if (first := found.get("train")) is not None:
        return _with_splits(root, above, found, first, "image and mask side by side")
    globs = _side_by_side(root)
    if globs is None:
        return None
    return layout_of(root, globs, why="image and mask side by side")


def _with_splits(
    root: Path,
    above: dict[str, Path],
    found: dict[str, Globs | None],
    first: Globs,
    why: str,
) -> Layout:
    """A root whose folders are the splits."""
    name = above["train"].name
    for other in ("val", "test"):
        globs = found.get(other)
        if globs is not None and (globs.images, globs.masks) == (
            first.images,
            first.masks,
        ):
            return layout_of(
                root, first, train=name, evaluation=above[other].name, why=why
            )
    notes = ()
    if held := sorted(set(above) - {"train"}):
        names = " and ".join(above[split].name for split in held)
        notes = (
            f"{names} in {root} cannot be evaluated on, having no masks or other names"
            f" of folders than {name}: part of {name} is taken.",
        )
    train, evaluation = (part.replace("train", name, 1) for part in (TRAIN, EVALUATION))
    return layout_of(
        root, first, train=train, evaluation=evaluation, why=why, notes=notes
    )


def _inside(base: Path, split: str) -> Globs | None:
    """A folder of images beside one of masks, both of that split by their names."""
    places = [(role(p.name), p) for p in folders_in(base)]
    sides = {
        what: sorted(
            (p for r, p in places if r.what == what and r.split == split),
            key=lambda p: not role(p.name).exact,
        )
        for what in ("image", "mask")
    }
    # Kept under one name, the wanted folder may be that of the classes or of another
    # truth: the one with most pairs.
    found = [
        _paired(i, m, i.name, m.name) for i in sides["image"] for m in sides["mask"]
    ]
    return max((g for g in found if g), key=lambda g: g.pairs, default=None)


def _paired(images: Path, masks: Path, left: str, right: str) -> Globs | None:
    """How the files of two folders, called ``left`` and ``right``, belong together."""
    flat, under = files_in(images), folders_in(masks)
    globs = matched(flat, files_in(masks), left, right)
    if globs is not None:
        return globs
    stems = {stem_of(p.name) for p in flat}
    if flat and under:
        return _folders_of_masks(flat, stems, left, right, under)
    # The same folders below both: splits, patients, places.
    held = {p.name for p in folders_in(images)}
    names = held & {p.name for p in under}
    if not flat and not names:
        return _one_place_of_masks(images, masks, left, right)
    split = next((n for n in sorted(names) if role(n).split == "train"), None)
    if split is not None:
        parts = {role(n).split: n for n in sorted(held, reverse=True)}
        found = {
            part: _paired(images / n, masks / n, f"{left}/{n}", f"{right}/{n}")
            for part, n in {**parts, "train": split}.items()
            if part and (masks / n).is_dir()
        }
        first = found.pop("train")
        others = {part: found.get(part) for part in parts if part not in ("", "train")}
        return first and joined(first, others)
    shared = sorted(names)
    flat = [p for n in shared for p in files_in(images / n)]
    inner = [p for n in shared for p in files_in(masks / n)]
    return matched(flat, inner, f"{left}/*", f"{right}/*")


def _one_place_of_masks(
    images: Path, masks: Path, left: str, right: str
) -> Globs | None:
    """A folder of images for each split, and one of the masks of all of them."""
    parts = {r.split: p for p in folders_in(images) if (r := role(p.name)).split}
    stems = [{stem_of(f.name) for f in files_in(p)} for p in parts.values()]
    # Of images of one name in two splits, no mask says whose it is.
    if "train" not in parts or sum(map(len, stems)) > len(set().union(*stems)):
        return None
    found = {
        split: _paired(place, masks, f"{left}/{place.name}", right)
        for split, place in parts.items()
    }
    first = found.pop("train")
    return first and joined(first, found)


def _folders_of_masks(
    images: Sequence[Path], stems: set[str], left: str, right: str, under: list[Path]
) -> Globs | None:
    """Masks in folders of their own: one a class, or one an image."""
    named = [p for p in under if p.name in stems]
    if len(named) * 2 > len(stems):
        inner = files_in(named[0])
        example = next((i for i in images if stem_of(i.name) == named[0].name), None)
        if not inner or example is None:
            return None
        return Globs(
            f"{left}/*{ending_of(images)}",
            f"{right}/*/*{ending_of(inner)}",
            len(named),
            (("mask", "objects"),),
            (example, inner[0]),
        )
    labels: list[tuple[str, str]] = []
    pairs, example = 0, None
    for place in under:
        inner = files_in(place)
        globs = matched(images, inner, left, f"{right}/{place.name}")
        if globs is not None:
            labels.append((place.name, globs.masks))
            pairs, example = pairs + globs.pairs, globs.example
    if not labels:
        return None
    return Globs(left, "", pairs, (("label_masks", tuple(labels)),), example)


def _samples_of_folders(places: Sequence[Path]) -> Globs | None:
    """``ID/images/*`` with ``ID/masks/*``."""
    names = Counter[tuple[str, str]]()
    for place in places:
        inner = [(role(p.name), p.name) for p in folders_in(place)]
        image = [n for r, n in inner if r.what == "image" and not r.split]
        mask = [n for r, n in inner if r.what == "mask" and not r.split]
        if image and mask:
            names[image[0], mask[0]] += 1
    if not names:
        return None
    (left, right), count = names.most_common(1)[0]
    if count < 2 or count * 2 < len(places):
        return None
    whole = [p for p in places if (p / left).is_dir() and (p / right).is_dir()]
    images = [files_in(p / left) for p in whole]
    masks = [files_in(p / right) for p in whole]
    some = next(
        ((i[0], m[0]) for i, m in zip(images, masks, strict=True) if i and m), None
    )
    if some is None:
        return None
    flat = (
        [f for files in images for f in files],
        [f for files in masks for f in files],
    )
    ends = (ending_of(flat[0]), ending_of(flat[1]))
    if max(map(len, masks)) > 1 and max(map(len, images)) == 1:
        more = (("mask", "objects"),)
        return Globs(f"*/{left}/*{ends[0]}", f"*/{right}/*{ends[1]}", count, more, some)
    same = [{stem_of(f.name) for f in side} for side in flat]
    if all(len(names) == 1 for names in same) and count > 1:
        # What is called alike everywhere is told apart by its folder.
        return Globs(
            f"*/{left}/{flat[0][0].name}",
            f"*/{right}/{flat[1][0].name}",
            count,
            (),
            some,
        )
    return matched(flat[0], flat[1], f"*/{left}", f"*/{right}")


def _samples_of_files(places: Sequence[Path]) -> Globs | None:
    """``ID/image.png`` with ``ID/mask.png``."""
    counts = Counter[tuple[str, str]]()
    for place in places:
        inner = files_in(place)
        if len(inner) > 16:
            return None
        images = [p.name for p in inner if role(stem_of(p.name)).what == "image"]
        masks = [p.name for p in inner if role(stem_of(p.name)).what == "mask"]
        if len(images) == 1 and len(masks) == 1:
            counts[images[0], masks[0]] += 1
    if not counts:
        return None
    (image, mask), count = counts.most_common(1)[0]
    if count < 2 or count * 2 < len(places):
        return None
    place = next(p for p in places if (p / image).is_file() and (p / mask).is_file())
    return Globs(f"*/{image}", f"*/{mask}", count, (), (place / image, place / mask))


def _side_by_side(base: Path) -> Globs | None:
    """``a.png`` with ``a_mask.png`` in one folder."""
    files = files_in(base)
    masks = [p for p in files if role(stem_of(p.name)).what == "mask"]
    images = [p for p in files if role(stem_of(p.name)).what != "mask"]
    if len(masks) < 2 and len(files) > 2:
        return None
    globs = matched(images, masks, "", "")
    if globs is None or globs.masks.startswith("*."):
        return None
    return globs


def _train_first(place: Path) -> tuple[bool, str]:
    return role(place.name).split != "train", place.name
