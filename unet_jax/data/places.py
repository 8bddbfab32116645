"""Where the files of a split lie below a root.

A split is a folder of the root (``root/val/images``), or what stands for ``{split}`` in
a pattern (``images/{split}``, ``{split}_images``); a root of neither has one list.
"""

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from unet_jax.data import formats
from unet_jax.data.names import exists
from unet_jax.types import InputError

SPLIT = "{split}"
# What the one list of a root without split folders may be called.
WHOLE = ("all", "train")
# More names than this are no splits, and looking at all their files would take long.
MOST = 100


class Place(NamedTuple):
    """A split: the folder that its patterns begin in, and its name."""

    base: Path
    name: str

    def of(self, pattern: str) -> str:
        """The pattern with the name for ``{split}``."""
        return pattern.replace(SPLIT, self.name)


def find(
    root: Path, name: str, images: str, masks: Iterable[str]
) -> tuple[Place, list[Place]]:
    """The place of a split, and those of the other splits.

    Args:
        root: the folder everything is under.
        name: the split's name.
        images, masks: folders, files or globs, as for `folder.open`.

    Raises:
        InputError: no such split, or ``{split}`` in ``masks`` alone.
    """
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist: check `data.root`.")
    if SPLIT in images:
        return _named(root, name, images)

    def parts() -> list[Path]:
        with formats.readable(str(root)):
            folders = sorted(path for path in root.iterdir() if path.is_dir())
        return [path for path in folders if exists(path, images)]

    own = root / name
    # Unlike pathlib's, this does not fail on a name that is too long.
    if not _dots(name) and os.path.isdir(own) and exists(own, images):
        others = [Place(part, part.name) for part in parts() if part != own]
        return Place(own, name), others
    # Not before it is needed: a root may hold a folder for each of very many images.
    found = [] if exists(root, images) else parts()
    if found:
        have = ", ".join(part.name for part in found)
        raise InputError(
            f"{root} has no split {name!r}: name one of its folders, {have}, perhaps "
            f"with a part such as {found[0].name}[:80%]."
        )
    if name not in WHOLE:
        raise InputError(
            f"{root} has no folder {name!r} to be that split: name a part of its one"
            " list, such as train[:80%] and train[80%:], or all[-20:], or write"
            f" {SPLIT} for the split's name in `images` and `masks`."
        )
    alone = next((pattern for pattern in masks if SPLIT in pattern), None)
    if alone is not None:
        raise InputError(
            f"{alone!r} holds {SPLIT}, but images={images!r} does not, and then all"
            " splits have the same images: write it in both."
        )
    return Place(root, name), []


def names_of(root: Path, pattern: str) -> list[str]:
    """The names for ``{split}`` in a pattern with which there is something, sorted."""
    parts = Path(pattern).parts
    at = next(i for i, part in enumerate(parts) if SPLIT in part)
    above, below = os.path.join("", *parts[:at]), os.path.join("", *parts[at + 1 :])
    if os.path.isdir(root / above):
        above = glob.escape(above)  # a folder's name may look like a glob
    # Two stars would be any number of folders.
    any_name = re.sub(r"\*+", "*", parts[at].replace(SPLIT, "*"))
    rule, found = _rule(parts[at]), set[str]()
    for path in glob.iglob(
        os.path.join(above, any_name), root_dir=root, recursive=True
    ):
        match = rule.fullmatch(os.path.basename(path))
        name = match["name"] if match else "."
        if _dots(name) or name in found:
            continue
        if below:
            there = exists(root / path, Place(root, name).of(below))
        else:
            # Beside the folders of splits there may be files, such as a README.
            there = os.path.isdir(root / path) or "." in parts[at]
        if there:
            found.add(name)
    return sorted(found)


def _named(root: Path, name: str, images: str) -> tuple[Place, list[Place]]:
    """`find` for images with ``{split}``."""
    have, own = names_of(root, images), Place(root, name)
    # Where a name may end in several ways, as in {split}_*.png, it may be another one.
    there = glob.iglob(own.of(images), root_dir=root, recursive=True)
    if _dots(name) or (name not in have and next(there, None) is None):
        more = f" and {len(have) - 8} others" if len(have) > 8 else ""
        told = f"name one that there is, {', '.join(have[:8])}{more}"
        if not have:
            told = "put the images there, or mend the option `images`"
        raise InputError(
            f"{root} has no split {name!r} where images={images!r} looks for it:"
            f" {told}."
        )
    return own, [Place(root, other) for other in have[:MOST] if other != name]


def _rule(part: str) -> re.Pattern[str]:
    """A part of a pattern as a regular expression with the group ``name``.

    Sets of characters count as any, so that it may match more than the glob.
    """
    rule = re.sub(r"\\\[.*?\\\]", ".", re.escape(part))
    rule = re.sub(r"(\\\*)+", ".*", rule).replace(r"\?", ".")
    holder = re.escape(SPLIT)
    rule = rule.replace(holder, r"(?P<name>[\w.\-]+?)", 1)
    return re.compile(rule.replace(holder, "(?P=name)"), re.DOTALL)


def _dots(name: str) -> bool:
    """Whether a name leads to the folder itself or above it."""
    return name in (".", "..")
