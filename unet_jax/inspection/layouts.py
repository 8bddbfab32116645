"""Which layout a folder has: a table of rules, the first that fits."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unet_jax.data import FILES, SOURCES, stacks, trust
from unet_jax.inspection import folders
from unet_jax.inspection.layout import (
    Layout,
    files_in,
    folders_in,
    listable,
    stem_of,
    suffix_of,
)
from unet_jax.inspection.words import role, words
from unet_jax.types import InputError, choose

# Of a JSON larger than this only the name is looked at.
READ_JSON = 64 * 2**20
MOST_JSONS = 12
KNOWN = (
    "images/ and masks/ (under many names, with train/ and val/ above them or not);"
    " a.png beside a_mask.png; one folder an image, with images/ and masks/ in it;"
    " masks/CLASS/; a TIFF stack and one of labels; NIfTI volumes; dataset.json of"
    " nnU-Net or the Decathlon; a COCO JSON; 01 and 01_GT of the Cell Tracking"
    " Challenge"
)


def find(root: Path) -> Layout:
    """The layout of a data set.

    Args:
        root: a folder. If it holds nothing but another folder that has a layout, that
            one is meant.

    Raises:
        InputError: no folder, or none of the layouts; it says what was found.
    """
    # Unlike pathlib's, these do not fail on a name that is too long, nor on ~nobody.
    root = Path(os.path.expanduser(root))
    if not os.path.isdir(root):
        what = "is a file" if os.path.exists(root) else "does not exist"
        raise InputError(f"{root} {what}: give the folder of a data set.")
    root = root.resolve()
    with listable():
        for place in (root, *folders_in(root)):
            found = (rule(place) for rule in RULES)
            if (layout := next((one for one in found if one), None)) is not None:
                return layout
        if plain := _only_images(root):
            raise InputError(plain)
        raise InputError(
            f"{root} has none of the layouts that are known; it holds {_held(root)}."
            f" Known are: {KNOWN}."
        )


def _only_images(root: Path) -> str:
    """A sentence where there is nothing but one folder of images, else ""."""
    inside = folders_in(root)
    place = root if not inside else inside[0]
    alone = len(inside) == 1 and not files_in(root) and not folders_in(place)
    if not files_in(place) or (inside and not alone):
        return ""
    above = place.parent
    found = next((one for one in (rule(above) for rule in RULES) if one), None)
    if found is not None and found.options.get("images") == place.name:
        remedy = f"give {above}, which has both"
    else:
        remedy = (
            f"put masks of the same names into {above / 'masks'}, and the images into"
            f" {above / 'images'}, or see docs/inspect.md for other layouts"
        )
    return f"{place} holds {_held(place)}, and no masks were found: {remedy}."


def of_config(data: Mapping[str, Any], name: str) -> tuple[Layout, bool]:
    """The layout that a config's data section states, and whether links are allowed.

    Args:
        data: of a config, without the keys that are None.
        name: of its file, for messages.

    Raises:
        InputError: an unknown source, or no root where the source needs one.
    """
    source = choose(SOURCES, data["source"], f"data.source of {name} =")
    root = data.get("root") or None
    if root is None and source in FILES:
        raise InputError(f"{name} names no folder: give --config.data.root=DIR.")
    path = None if root is None or source == "cells" else Path(os.path.expanduser(root))
    layout = Layout(
        source,
        path,
        dict(data.get(source) or {}),
        data["train"],
        data["evaluation"],
        f"as {name} says",
    )
    return layout, bool(data.get("links", False))


def _dataset_json(root: Path) -> Layout | None:
    if not (root / "dataset.json").is_file():
        return None
    return Layout("nnunet", root, {}, why="dataset.json")


def _tracking(root: Path) -> Layout | None:
    sequences = [
        p.name
        for p in folders_in(root)
        if p.name.isdecimal() and (root / f"{p.name}_GT" / "SEG").is_dir()
    ]
    if not sequences:
        return None
    first = sequences[0]
    train, evaluation = f"{first}[:80%]", f"{first}[80%:]"
    if len(sequences) > 1:
        train, evaluation = first, sequences[1]
    return Layout("ctc", root, {}, train, evaluation, why=f"{first} and {first}_GT/SEG")


def _coco(root: Path) -> Layout | None:
    places = [root, root / "annotations", *folders_in(root)]
    there = {p for place in places if place.is_dir() for p in place.glob("*.json")}
    # Theirs is a large one; of small ones there may be one an image.
    sizes = {path: path.stat().st_size for path in there if path.is_file()}
    large = sorted(sizes, key=lambda path: -sizes[path])[:MOST_JSONS]
    files = [path for path in sorted(large) if _is_coco(path)]
    if not files:
        return None
    splits: dict[str, str] = {}
    # Of the lists of several years the last: a later split may mix the earlier parts.
    for path in reversed(files):
        # What the root is called says nothing of one of its files.
        above = "" if path.parent == root else path.parent.name
        split = role(path.stem).split or role(above).split
        name = path.parent.name if path.name.startswith("_annotations") else None
        word = next((w for w in words(path.stem) if role(w).split), split)
        splits.setdefault(split, name or word)
    why = f"the COCO annotations {files[0].relative_to(root)}"
    named = [splits[split] for split in ("train", "val", "test") if split in splits]
    if "train" in splits and len(named) > 1:
        return Layout("coco", root, {}, named[0], named[1], why)
    if named and ("train" in splits or "" not in splits):
        name = named[0]
        return Layout("coco", root, {}, f"{name}[:80%]", f"{name}[80%:]", why)
    return Layout("coco", root, {}, why=why)


def _is_coco(path: Path) -> bool:
    """Whether a JSON has what COCO's have; a damaged one has not."""
    try:
        if path.stat().st_size > READ_JSON:
            return bool({"coco", "instances"} & set(words(path.stem)))
        held = trust.read_json(path)
    except (InputError, OSError):
        return False
    return isinstance(held, dict) and {"images", "annotations", "categories"} <= set(
        held
    )


def _stacks(root: Path) -> Layout | None:
    """Two TIFF stacks, of which one is named like masks."""
    files = [p for p in files_in(root) if suffix_of(p.name) in (".tif", ".tiff")]
    if not 2 <= len(files) <= 100:
        return None

    def key(path: Path) -> frozenset[str]:
        rest = [w for w in words(stem_of(path.name)) if not role(w).what]
        return frozenset(rest)

    pairs = [
        (image, mask)
        for mask in files
        if role(stem_of(mask.name)).what == "mask"
        for image in files
        if role(stem_of(image.name)).what != "mask" and key(image) == key(mask)
    ]
    pairs = [pair for pair in pairs if _pages(pair[0]) == _pages(pair[1]) > 1]
    trained = [p for p in pairs if role(stem_of(p[0].name)).split == "train"]
    if len(trained) == 1:
        pairs = trained
    if len(pairs) != 1:
        return None
    image, mask = pairs[0]
    options = {"images": image.name, "masks": mask.name, "slices": True}
    return Layout("volumes", root, options, why="a stack of images and one of labels")


def _pages(path: Path) -> int:
    try:
        return stacks.volume_size(path)[0][0]
    except InputError:
        return 0


Rule = Callable[[Path], Layout | None]
RULES: tuple[Rule, ...] = (
    _dataset_json,
    _tracking,
    folders.two_folders,
    _coco,
    _stacks,
    folders.sample_folders,
    folders.one_folder,
)


def _held(root: Path) -> str:
    """A few names and counts of what is in a folder."""
    inner = folders_in(root)
    said = []
    if inner:
        names = ", ".join(p.name for p in inner[:6]) + ", ..." * (len(inner) > 6)
        said.append(f"the folder{'s' * (len(inner) > 1)} {names}")
    endings: dict[str, list[str]] = {}
    for path in sorted(p for p in root.iterdir() if p.is_file()):
        ending = suffix_of(path.name) or path.suffix or "(without ending)"
        endings.setdefault(ending, []).append(path.name)
    for ending, names in sorted(endings.items(), key=lambda item: -len(item[1]))[:4]:
        said.append(f"{len(names)} {ending} (such as {names[0]})")
    return "; ".join(said) or "nothing"
