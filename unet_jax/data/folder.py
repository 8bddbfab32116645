"""Folders of 2-D images and masks, paired by name.

Three layouts::

    root/images/a.png  root/masks/a.png              the default
    root/train/images/a.png  root/train/masks/a.png  the split's name picks the folder
    root/*/images/a.png  root/*/masks/a.png          any other, by glob
"""

import contextlib
import glob
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unet_jax.data import images as image_files
from unet_jax.data import masks as mask_codings
from unet_jax.data import split as splits
from unet_jax.data.masks import Coding
from unet_jax.data.source import NoInstances
from unet_jax.types import Example, InputError, NumpyArray, Shape, size_text

_LOG = logging.getLogger("unet_jax")

# What the one list of a root without split folders may be called.
WHOLE = ("all", "train")

# With more pairs than this, sizes are compared when an example is read and not before.
CHECK_AT_OPENING = 3000


class Pair(NamedTuple):
    """An image file and its mask file."""

    image: Path
    mask: Path


class Folder:
    """A source of 2-D examples from image files and mask files; see `open`."""

    def __init__(
        self, pairs: Sequence[Pair], root: Path, *, coding: Coding, channels: int
    ) -> None:
        self.pairs, self.root = tuple(pairs), root
        self.coding, self.channels = coding, channels
        self._sizes: dict[int, Shape] = {}
        if len(self.pairs) <= CHECK_AT_OPENING:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(self._check_size, range(len(self.pairs))))

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.coding.label_names

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int, /) -> Example:
        pair = self.pairs[i]
        image = image_files.read_image(pair.image, channels=self.channels)
        mask = image_files.read_mask(pair.mask)
        same_size(pair, image.shape[:2], mask.shape[:2])
        label, weight = self.coding.decode(mask, str(pair.mask))
        if weight is None:
            return {"image": image, "label": label}
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """The image's path below the root."""
        return relative(self.pairs[i].image, self.root)

    def size(self, i: int, /) -> Shape:
        """(H, W), from the image's header."""
        if i not in self._sizes:
            self._sizes[i] = image_files.image_size(self.pairs[i].image)
        return self._sizes[i]

    def instances(self, i: int, /) -> NumpyArray:
        """The `objects` of a mask, ``i32[H, W]``; there are with mask="instances"."""
        path = self.pairs[i].mask
        return objects(image_files.read_mask(path), self.coding, str(path))

    def _check_size(self, i: int) -> None:
        same_size(
            self.pairs[i], self.size(i), image_files.image_size(self.pairs[i].mask)
        )


def open(
    *,
    root: str | Path,
    split: str,
    images: str = "images",
    masks: str = "masks",
    mask: str = "auto",
    colors: Sequence[Sequence[int]] = (),
    label_names: Sequence[str] = (),
    channels: int = 0,
    ignore: int = -1,
) -> Folder:
    """Opens images and masks in folders.

    Args:
        root: the folder everything is under.
        split: a name, and if wanted a part of the list of pairs sorted by stem
            (`split.parse`). If ``root/<name>/`` holds the folder ``images``, the
            list is that folder's; otherwise ``all`` and ``train`` mean the one list.
        images, masks: a folder, or a glob such as ``"*/images/*.png"``, below the root.
            An image and its mask have the same stem, the file's name without the
            ending; with a glob, the same text where its last wildcards are, so that
            ``masks="masks/*_mask.png"`` pairs ``a_mask.png`` with ``a``.
        mask: what the masks hold (see `masks`): auto, binary, index, instances (> 0 is
            foreground) or colors. auto looks at the masks of all splits, so that they
            agree on the classes.
        colors: the RGB colour of each class.
        label_names: the name of each class id; empty: made from the masks.
        channels: 1 or 3 converts every image, 0 keeps the files' channels.
        ignore: the mask value that gets weight 0; -1: none.

    Raises:
        InputError: nothing there, an image without mask, an unreadable file, an image
            and a mask of different sizes, or masks whose values no rule explains.
    """
    root = Path(root).expanduser()
    name, select = splits.parse(split)
    pairs, every_mask = find_pairs(
        root, name, images=images, masks=masks, suffixes=image_files.SUFFIXES
    )
    pairs = splits.take(pairs, select(len(pairs)))
    coding = mask_codings.choose(
        every_mask,
        image_files.read_mask,
        mask=mask,
        colors=colors,
        label_names=label_names,
        ignore=ignore,
    )
    return Folder(pairs, root, coding=coding, channels=channels)


def find_pairs(
    root: Path, name: str, *, images: str, masks: str, suffixes: Sequence[str]
) -> tuple[list[Pair], list[Path]]:
    """The pairs of one split, and the masks of all splits that are folders of the root.

    Args:
        root: the folder everything is under.
        name: the split's name.
        images, masks: as for `open`; each may also name a single file.
        suffixes: the endings that count, in lower case.

    Returns:
        ``(pairs, every mask)``, the pairs sorted by stem.

    Raises:
        InputError: see `open`.
    """
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist: check `data.root`.")
    parts = [p for p in sorted(root.iterdir()) if p.is_dir() and _exists(p, images)]
    if root / name in parts:
        pairs = _pairs(root / name, images, masks, suffixes)
        every = [pair.mask for pair in pairs]
        for part in parts:
            # Another split's faults are that split's to report.
            with contextlib.suppress(InputError):
                if part != root / name:
                    every += _files(part, masks, suffixes, "mask").values()
        return pairs, every
    if parts and not _exists(root, images):
        have = ", ".join(part.name for part in parts)
        raise InputError(
            f"{root} has no split {name!r}: name one of its folders, {have}, perhaps "
            f"with a part such as {parts[0].name}[:80%]."
        )
    if name not in WHOLE:
        raise InputError(
            f"{root} has no folder {name!r} to be that split: name a part of its one"
            " list, such as train[:80%] and train[80%:], or all[-20:]."
        )
    pairs = _pairs(root, images, masks, suffixes)
    return pairs, [pair.mask for pair in pairs]


def same_size(pair: Pair, image: Shape, mask: Shape) -> None:
    """Raises InputError if the two spatial shapes differ."""
    if image != mask:
        raise InputError(
            f"{pair.image} has the size {size_text(image)}, but its mask {pair.mask} "
            f"{size_text(mask)} (rows first): give them the same size."
        )


def objects(mask: NumpyArray, coding: Coding, name: str) -> NumpyArray:
    """The numbers of objects in a mask of the kind ``instances``.

    Args:
        mask: ``[*S]`` whole numbers as stored.
        coding: how the masks are read.
        name: the mask file, for messages.

    Returns:
        ``i32[*S]`` as stored, 0 where the mask says that nothing is annotated.

    Raises:
        NoInstances: masks of another kind, whose numbers are classes.
        InputError: the mask is coloured.
    """
    if coding.kind != "instances":
        raise NoInstances(
            f"The mask {name} is read as classes ({coding.kind}): set `mask` to "
            "instances if each object has its own number."
        )
    if mask.ndim != coding.rank:
        raise InputError(
            f"The mask {name} is coloured: save one number for each object."
        )
    mask = mask.astype(np.int32)
    return np.where(mask == coding.ignore, 0, mask)


def relative(path: Path, root: Path) -> str:
    """The path below the root with forward slashes; as it is if not below."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _pairs(base: Path, images: str, masks: str, suffixes: Sequence[str]) -> list[Pair]:
    mask_files = _files(base, masks, suffixes, "mask")
    image_files = _files(base, images, suffixes, "image")
    # One folder may hold both, told apart by globs of which one matches all.
    if images != masks:
        taken = set(mask_files.values())
        image_files = {k: p for k, p in image_files.items() if p not in taken}
    if (base / images).is_file() and (base / masks).is_file():
        return [Pair(base / images, base / masks)]
    if not image_files:
        raise _nothing(base, images, suffixes, "image")
    missing = sorted(image_files.keys() - mask_files.keys())
    if missing:
        raise _no_mask(missing, image_files, mask_files, base / masks)
    spare = sorted(mask_files.keys() - image_files.keys())
    if spare:
        _LOG.warning(
            "%d masks have no image and are left out, such as %s",
            len(spare),
            mask_files[spare[0]],
        )
    return [Pair(image_files[key], mask_files[key]) for key in sorted(image_files)]


def _files(
    base: Path, pattern: str, suffixes: Sequence[str], what: str
) -> dict[str, Path]:
    """Stem -> file, for a folder, a file or a glob below the base."""
    place = base / pattern
    if place.is_dir():
        found = [p for p in place.iterdir() if not p.name.startswith(".")]
        keys = {p: _stem(p.name, suffixes) for p in found}
    elif place.is_file():
        keys = {place: _stem(place.name, suffixes)}
    elif glob.has_magic(pattern):
        names = glob.glob(pattern, root_dir=base, recursive=True)
        keys = {base / n: _wild(n, pattern) for n in names}
    else:
        raise InputError(
            f"{place} does not exist: put the {what}s there, or name another folder or "
            f"a glob below {base} in the option `{what}s`."
        )
    files: dict[str, Path] = {}
    for path, key in sorted(keys.items()):
        if not path.name.lower().endswith(tuple(suffixes)) or path.is_dir():
            continue
        if key in files:
            raise InputError(
                f"{files[key]} and {path} are both the {what} {key!r}: keep one of "
                "them, or tell them apart by a glob."
            )
        files[key] = path
    if not files:
        raise _nothing(base, pattern, suffixes, what)
    return files


def _stem(name: str, suffixes: Sequence[str]) -> str:
    # the longest first, so that a.nii.gz loses both endings
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _wild(name: str, pattern: str) -> str:
    """What the wildcards of the pattern's last part that has any stand for."""
    names, parts = Path(name).parts, Path(pattern).parts
    for found, part in zip(reversed(names), reversed(parts), strict=False):
        pieces = re.split(r"(\*+|\?|\[[^\]]*\])", part)
        if len(pieces) > 1:
            rule = "".join(
                f"({_wildcard(p)})" if i % 2 else re.escape(p)
                for i, p in enumerate(pieces)
            )
            match = re.fullmatch(rule, found, re.DOTALL)
            return "".join(match.groups()) if match else found
    return name


def _wildcard(piece: str) -> str:
    if piece[0] == "*":
        return ".*"
    return "." if piece == "?" else piece.replace("[!", "[^")


def _exists(base: Path, pattern: str) -> bool:
    if glob.has_magic(pattern):
        return any(True for _ in glob.iglob(pattern, root_dir=base, recursive=True))
    return (base / pattern).exists()


def _nothing(
    base: Path, pattern: str, suffixes: Sequence[str], what: str
) -> InputError:
    return InputError(
        f"{base / pattern} holds no {what}s: put {', '.join(suffixes)} files there, or "
        f"name another folder or a glob below {base} in the option `{what}s`."
    )


def _no_mask(
    missing: list[str],
    image_files: dict[str, Path],
    mask_files: dict[str, Path],
    place: Path,
) -> InputError:
    key = missing[0]
    near = next((m for m in sorted(mask_files) if m.startswith(key)), None)
    more = f" ({len(missing)} of {len(image_files)} images have none)"
    if near is not None:
        pattern = "*" + mask_files[near].name[len(key) :]
        remedy = f"if {mask_files[near].name} is it, set `masks` to a glob such as "
        remedy += f"'{place.name}/{pattern}'"
    else:
        remedy = f"add a file of the same stem in {place}, or take the image away"
    more = more if len(missing) > 1 else ""
    return InputError(f"The image {image_files[key]} has no mask{more}: {remedy}.")
