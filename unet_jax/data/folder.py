"""Folders of 2-D images and masks, paired by name.

Layouts::

    root/images/a.png  root/masks/a.png              the default
    root/train/images/a.png  root/train/masks/a.png  the split's name picks the folder
    root/images/train/a.png  root/masks/train/a.png  images="images/{split}" and so on
    root/*/images/a.png  root/*/masks/a.png          any other, by glob

`pairs` finds the files (`places` those of a split), `truth` reads the masks of one
image.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unet_jax.data import images as image_files
from unet_jax.data import masks as mask_codings
from unet_jax.data import split as splits
from unet_jax.data.faults import Faults
from unet_jax.data.pairs import (
    WHOLE,
    Entry,
    Pair,
    find_labels,
    find_objects,
    find_pairs,
    passing,
    relative,
    same_size,
)
from unet_jax.data.truth import (
    Labels,
    Objects,
    One,
    Planes,
    Truth,
    objects,
    read_mask,
)
from unet_jax.types import Example, InputError, NumpyArray, Shape

__all__ = [
    "CHECK_AT_OPENING",
    "WHOLE",
    "Folder",
    "Pair",
    "find_pairs",
    "objects",
    "open",
    "relative",
    "same_size",
]

# With more mask files than this, sizes are compared when an example is read and not
# before.
CHECK_AT_OPENING = 3000

KINDS = (*mask_codings.KINDS, "objects", "planes")


class Folder:
    """A source of 2-D examples from image files and mask files; see `open`.

    Args:
        entries: the files of each example.
        root: what names are relative to.
        truth: how the mask files are read.
        channels: as for `open`.
        sizes: (H, W) of the images of which it is known.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        root: Path,
        *,
        truth: Truth,
        channels: int,
        sizes: Mapping[Path, Shape] | None = None,
    ) -> None:
        self.entries, self.root = tuple(entries), root
        self.truth, self.channels = truth, channels
        self._sizes = dict(sizes or {})

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.truth.label_names

    @property
    def overlapping(self) -> bool:
        return self.truth.overlapping

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int, /) -> Example:
        entry = self.entries[i]
        image = image_files.read_image(entry.image, channels=self.channels)
        label, weight = self.truth.read(entry, image.shape[:2])
        if weight is None:
            return {"image": image, "label": label}
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """The image's path below the root."""
        return relative(self.entries[i].image, self.root)

    def size(self, i: int, /) -> Shape:
        """(H, W), from the image's header."""
        path = self.entries[i].image
        if path not in self._sizes:
            self._sizes[path] = image_files.image_size(path, channels=self.channels)
        return self._sizes[path]

    def instances(self, i: int, /) -> NumpyArray:
        """The numbers of objects, ``i32[H, W]``.

        There are with mask="instances", as stored, and with mask="objects", where k is
        the k-th file of the image.
        """
        return self.truth.instances(self.entries[i], self.size(i))


def open(
    *,
    root: str | Path,
    split: str,
    images: str = "images",
    masks: str = "masks",
    mask: str = "auto",
    label_masks: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    colors: Sequence[Sequence[int]] = (),
    label_names: Sequence[str] = (),
    channels: int = 0,
    ignore: int = -1,
    links: bool = False,
    on_error: str = "stop",
) -> Folder:
    """Opens images and masks in folders.

    Args:
        root: the folder everything is under.
        split: a name, and if wanted a part of the list of images sorted by stem
            (`split.parse`). If ``root/<name>/`` holds the folder ``images``, the
            list is that folder's; otherwise ``all`` and ``train`` mean the one list.
        images, masks: a folder, or a glob such as ``"*/images/*.png"``, below the root.
            An image and its mask have the same stem, the file's name without the
            ending; with a glob, the same text where its last wildcards are, so that
            ``masks="masks/*_mask.png"`` pairs ``a_mask.png`` with ``a``. ``{split}``
            stands for the split's name, as in ``"images/{split}"`` and
            ``"masks/{split}"``; masks without it are those of all splits.
        mask: what the masks hold (see `masks`): auto, binary, index, instances (> 0 is
            foreground) or colors. auto looks at the masks of all splits, so that they
            agree on the classes. Or how they are kept:

            ``objects``: one black and white file for each object. An image has those
            files for which the first wildcards of ``masks`` stand for its stem, as in
            ``"*/masks/*.png"``; a folder means ``"<masks>/*/*"``. Object k is the k-th
            file by name, the first of several on one pixel counts, and an image whose
            folder of objects is empty is all background.

            ``planes``: one file whose channels, or the pages of a TIFF, are labels that
            may overlap, each black and white.
        label_masks: instead of ``masks``, (label, folder or glob) for each of several
            labels that may overlap; their files are black and white and each paired as
            masks are. Of an image that has files of some labels, the others are not
            annotated, which is weight 0.
        colors: the RGB colour of each class.
        label_names: the name of each class id, or of each plane; empty: made from the
            masks.
        channels: 1 or 3 converts every image, 0 keeps the files' channels; any other
            number is that of files which have as many (see `images.read_image`).
        ignore: the mask value that gets weight 0; -1: none.
        links: whether files may be links that lead out of the root.
        on_error: ``stop`` raises what is wrong with the first file that cannot be read
            or paired; ``skip`` leaves out those that are found at opening (of more than
            3000 mask files, only the values of some are looked at), and says so.

    Raises:
        InputError: nothing there, an image without mask, an unreadable file, an image
            and a mask of different sizes, masks whose values no rule explains, or
            options that contradict each other.
    """
    root = Path(root).expanduser()
    name, select = splits.parse(split)
    if mask not in KINDS:
        raise InputError(f"mask={mask!r} is not known: choose {', '.join(KINDS)}.")
    if colors and mask not in ("auto", "colors"):
        raise InputError(f"`colors` needs mask='colors', not {mask!r}: drop one.")
    table = _label_masks(label_masks)
    plain = mask in ("auto", "binary") and masks == "masks"
    if table and (not plain or colors or label_names):
        raise InputError(
            "`label_masks` names the labels and their black and white files: leave out "
            "`masks`, `mask`, `colors` and `label_names`."
        )
    faults = Faults(on_error, f"images of {root}")
    where: dict[str, Any] = {
        "images": images,
        "suffixes": image_files.SUFFIXES,
        "faults": faults,
        "links": links,
    }
    every_mask: list[Path] = []
    if table:
        entries = find_labels(root, name, label_masks=table, **where)
    elif mask == "objects":
        entries = find_objects(root, name, masks=masks, **where)
    else:
        pairs, every_mask = find_pairs(root, name, masks=masks, **where)
        entries = [Entry(pair.image, (pair.mask,)) for pair in pairs]
    entries = splits.take(entries, select(len(entries)))
    unreadable: dict[Path, InputError] = {}
    choose = functools.partial(
        mask_codings.choose, every_mask, read_mask, colors=colors, ignore=ignore
    )
    truth: Truth
    if table:
        truth = Labels(choose(mask="binary"), tuple(table))
    elif mask == "planes":
        names = tuple(label_names) or _plane_names(every_mask, faults)
        truth = Planes(choose(mask="binary"), names)
    elif mask == "objects":
        truth = Objects(choose(mask="binary", label_names=label_names))
    else:
        into = unreadable if faults.on_error == "skip" else None
        truth = One(choose(mask=mask, label_names=label_names, unreadable=into))
    sizes: dict[Path, Shape] = {}
    entries = _usable(entries, truth, channels, unreadable, faults, sizes)
    faults.report(len(entries))
    return Folder(entries, root, truth=truth, channels=channels, sizes=sizes)


def _label_masks(
    given: Mapping[str, str] | Sequence[tuple[str, str]],
) -> dict[str, str]:
    """Label -> folder or glob, in the order given."""
    items: Any = getattr(given, "items", lambda: given)()
    table: dict[str, str] = {}
    for item in items:
        if (
            not isinstance(item, tuple | list)
            or len(item) != 2
            or not all(isinstance(text, str) and text for text in item)
        ):
            raise InputError(
                f"{item!r} in `label_masks` is not a label and its folder or glob: "
                "write it like ('vessel', 'masks/vessel')."
            )
        label, pattern = item
        if label in table:
            raise InputError(
                f"`label_masks` names the label {label!r} twice: give each its own "
                "name."
            )
        table[label] = pattern
    return table


def _plane_names(paths: Sequence[Path], faults: Faults) -> tuple[str, ...]:
    """Names for the planes of masks, from the first mask that can be read."""
    for path in paths:
        try:
            count = image_files.read_planes(path).shape[-1]
        except InputError:
            # What is skipped is noted where each image is looked at.
            if faults.on_error == "stop":
                raise
            continue
        return tuple(f"label_{k}" for k in range(1, count + 1))
    raise InputError(
        f"No mask can be read, such as {paths[0]}: give `label_names` for their "
        "planes, or mend them."
    )


def _usable(
    entries: Sequence[Entry],
    truth: Truth,
    channels: int,
    unreadable: Mapping[Path, InputError],
    faults: Faults,
    sizes: dict[Path, Shape],
) -> Sequence[Entry]:
    """The entries whose files can be read and agree in size, as far as is looked at.

    ``sizes`` takes the sizes of the images that are found on the way.
    """
    compare = sum(len(entry.masks) for entry in entries) <= CHECK_AT_OPENING

    def check(entry: Entry) -> None:
        for mask in entry.masks:
            if mask is not None and mask in unreadable:
                raise unreadable[mask]
        if not compare:
            return
        size = image_files.image_size(entry.image, channels=channels)
        sizes[entry.image] = size
        for mask in entry.masks:
            if mask is not None:
                same_size(Pair(entry.image, mask), size, truth.size(mask))

    if not compare and not unreadable:
        return entries
    return passing(entries, check, faults)
