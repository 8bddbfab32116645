"""What a JSON file of COCO's format says, entry by entry, and where it lies.

Nothing in it is believed: every entry that cannot be right is refused by its name.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unet_jax.data import polygons as shapes
from unet_jax.data import trust
from unet_jax.data.faults import Faults
from unet_jax.data.folder import WHOLE, relative
from unet_jax.types import InputError, NumpyArray, Shape

# So many entries are looked at for the folder that the images are in.
LOOK_AT = 100


class Region(NamedTuple):
    """One annotation of a class that was asked for.

    ``number``: its place in ``annotations``; ``label``: 1 .. K; ``crowd``: a region of
    many objects that nobody told apart. ``runs`` is None where there are polygons.
    """

    number: int
    label: int
    crowd: bool
    polygons: tuple[NumpyArray, ...]
    runs: tuple[NumpyArray, Shape] | None


class Frame(NamedTuple):
    """An image, its size by the JSON if that says one, and its annotations."""

    image: Path
    size: Shape | None
    regions: tuple[Region, ...]


class Entry(NamedTuple):
    """What ``images`` says of an image."""

    id: int | str
    file: str
    size: Shape | None
    where: str


def read_content(path: Path) -> dict[str, Any]:
    """The JSON, with its three lists."""
    content = trust.read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(
                f"{path} has no list `{key}`: give a JSON of COCO's format with images,"
                " annotations and categories in data.coco.annotations."
            )
    return content


def read_labels(
    categories: list[Any], chosen: Sequence[str], path: Path
) -> tuple[dict[Any, int], tuple[str, ...]]:
    """(category id -> 1 .. K, or 0 if left out; the names of 1 .. K)"""
    names: dict[Any, str] = {}
    for i, category in enumerate(categories):
        where = f"{path}: categories[{i}]"
        key, name = _get(category, "id", where), _get(category, "name", where)
        if type(key) not in (int, str) or not isinstance(name, str) or not name:
            raise InputError(
                f"{where} has the id {key!r:.60} and the name {name!r:.60}: give a "
                "number and a text."
            )
        if key in names or name in names.values():
            raise InputError(
                f"{where} has the id {key!r} and the name {name!r}, one of which an "
                "earlier category has, too: give each its own."
            )
        names[key] = name
    by_id = sorted(names, key=lambda key: (isinstance(key, str), key))
    order = tuple(chosen) or tuple(names[key] for key in by_id)
    for name in order:
        if name not in names.values() or order.count(name) > 1:
            raise InputError(
                f"data.coco.label_names has {name!r} twice, or {path} has no such "
                f"category: choose from {', '.join(names.values())}; what is in none "
                "of them is background, which needs no name."
            )
    if not order:
        raise InputError(f"{path} has no categories: name the classes there.")
    place = {name: k for k, name in enumerate(order, 1)}
    return {key: place.get(name, 0) for key, name in names.items()}, order


def read_entries(
    images: list[Any], path: Path, faults: Faults
) -> tuple[list[Entry], set[Any]]:
    """(the images that are described well enough to be found, the ids of all)"""
    entries: dict[Any, Entry] = {}
    of_file: dict[Path, Entry] = {}
    twice: set[Any] = set()
    ids: set[Any] = set()
    for i, image in enumerate(images):
        where = f"{path}: images[{i}]"
        try:
            key, file = _get(image, "id", where), _get(image, "file_name", where)
            if type(key) not in (int, str):
                raise InputError(f"{where} has the id {key!r:.60}: give a number.")
            ids.add(key)
            place = trust.named(path.parent, file, where)
            entry = Entry(key, file, _size(image, where), where)
            for known in (entries.get(key), of_file.get(place)):
                if known is not None:
                    twice |= {key, known.id}
                    raise InputError(
                        f"{where} has the id {key!r:.60} and the file {file!r:.120}, "
                        f"one of which {known.where} has, too: give each image one "
                        "entry."
                    )
            entries[key] = of_file[place] = entry
        except InputError as error:
            faults.add(error)
    # Which annotations are whose cannot be told.
    kept = [entry for key, entry in entries.items() if key not in twice]
    if not kept:
        faults.report(0)
        raise InputError(f"{path} lists no images: give another JSON file.")
    return kept, ids


def _size(image: dict[str, Any], where: str) -> Shape | None:
    size = (image.get("height"), image.get("width"))
    if size == (None, None):
        return None
    if not all(type(n) is int and 0 < n < 2**31 for n in size):
        raise InputError(
            f"{where} has the height {size[0]!r:.60} and the width {size[1]!r:.60}: "
            "give the pixels of the image, or neither."
        )
    return size  # pyright: ignore[reportReturnType]


def by_image(
    annotations: list[Any], path: Path, ids: set[Any], faults: Faults
) -> dict[Any, list[tuple[int, dict[str, Any]]]]:
    """Image id -> (place in the list, annotation) of each of its annotations."""
    of_image: dict[Any, list[tuple[int, dict[str, Any]]]] = {}
    for i, annotation in enumerate(annotations):
        where = f"{path}: annotations[{i}]"
        try:
            key = _get(annotation, "image_id", where)
            if type(key) not in (int, str) or key not in ids:
                raise InputError(
                    f"{where} belongs to the image {key!r:.60}, which is not in "
                    "`images`: add the image or remove the annotation."
                )
            of_image.setdefault(key, []).append((i, annotation))
        except InputError as error:
            faults.add(error)
    return of_image


def read_region(
    annotation: dict[str, Any], number: int, labels: dict[Any, int], path: Path
) -> Region | None:
    """One annotation; None if it is of a category that was left out."""
    where = f"{path}: annotations[{number}]"
    category = _get(annotation, "category_id", where)
    if type(category) not in (int, str) or category not in labels:
        raise InputError(
            f"{where} has the category {category!r:.60}, which is not in `categories`: "
            "add it there or remove the annotation."
        )
    if not labels[category]:
        return None
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1, None):
        raise InputError(f"{where} has iscrowd={crowd!r:.60}: give 0 or 1.")
    outline = annotation.get("segmentation")
    if not outline or not isinstance(outline, (list, dict)):
        raise InputError(
            f"{where} has no outline in `segmentation`, at most a box: export the "
            "objects with their outlines, or leave such images out with "
            "data.on_error=skip."
        )
    polygons, runs = (), None
    if isinstance(outline, dict):
        runs = shapes.read_runs(outline, where)
    else:
        polygons = tuple(shapes.read_polygon(part, where) for part in outline)
    return Region(number, labels[category], bool(crowd), polygons, runs)


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise InputError(f"{where} has no `{key}`: add it or remove the entry.")
    return entry[key]


def find_annotations(root: Path, name: str, given: str) -> Path:
    """The JSON file of a split."""
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist: check `data.root`.")
    if given:
        path = root / given.replace("{split}", name)
        if not path.is_file():
            raise InputError(
                f"{path} does not exist: check data.coco.annotations; {_there(root)}."
            )
        if name not in WHOLE and "{split}" not in given:
            raise InputError(
                f"{path} is one list, which has no split {name!r}: name a part of it "
                "such as train[:80%] and train[80%:], or write {split} for the split's "
                "name in data.coco.annotations."
            )
        return path
    word = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])", re.IGNORECASE)
    folder = [p for p in _jsons(root / "annotations") if word.search(p.stem)]
    # COCO's own folder also has captions and key points of the same images.
    folder = [p for p in folder if p.name.startswith("instances")] or folder
    beside = [root / name / "_annotations.coco.json"]
    one = [root / "annotations.json"]
    every = [*_jsons(root), *_jsons(root / "annotations")]
    places = [[root / f"{name}.json"], folder, beside]
    if name in WHOLE:
        places += [one, every]
    for choices in places:
        found = [path for path in choices if path.is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise InputError(
        f"{root} has no JSON file, or several, that the split {name!r} may mean: name "
        f"one in data.coco.annotations, where {{split}} stands for the name; "
        f"{_there(root)}."
    )


def _jsons(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        p for p in found if p.suffix.lower() == ".json" and not p.name.startswith(".")
    )


def _there(root: Path) -> str:
    """The JSON files of a root, for messages."""
    folders = [root, root / "annotations"]
    folders += sorted(p for p in root.iterdir() if p.is_dir() and p not in folders)
    found = [relative(p, root) for folder in folders[:50] for p in _jsons(folder)]
    more = f" and {len(found) - 8} others" if len(found) > 8 else ""
    return f"there are {', '.join(found[:8])}{more}" if found else "there is none"


def find_images(
    root: Path, name: str, given: str, path: Path, files: Sequence[str]
) -> Path:
    """The folder that file names are relative to."""
    if given:
        folder = root / given.replace("{split}", name)
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder: check data.coco.images.")
        return folder
    folders = [root / name, root / "images" / name, root / "images", root, path.parent]
    for file in files[:LOOK_AT]:
        for folder in folders:
            # Unlike pathlib's, this does not fail on a name that is too long.
            if os.path.isfile(trust.named(folder, file, str(path))):
                return folder
    where = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise InputError(
        f"{path} names the image {files[0]!r:.120}, which is in none of {where}: put "
        "it there, or name its folder in data.coco.images."
    )
