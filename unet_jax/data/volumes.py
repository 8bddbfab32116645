"""Stacks and volumes with their masks, as whole 3-D examples or slice by slice.

`stacks` reads and writes the files and says which array axis is which.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unet_jax.data import masks as mask_codings
from unet_jax.data import split as splits
from unet_jax.data.faults import Faults
from unet_jax.data.masks import Coding
from unet_jax.data.pairs import Pair, find_pairs, passing, relative, same_size
from unet_jax.data.stacks import (
    SUFFIXES,
    Geometry,
    read_mask,
    read_volume,
    resample,
    resample_to,
    resampled_shape,
    shape_at,
    volume_size,
    write_volume,
)
from unet_jax.data.truth import objects
from unet_jax.types import Example, InputError, NumpyArray, Shape

__all__ = [
    "Geometry",
    "Volumes",
    "open",
    "read_mask",
    "read_volume",
    "resample",
    "resample_to",
    "resampled_shape",
    "volume_size",
    "write_volume",
]

_LOG = logging.getLogger("unet_jax")


class Volumes:
    """A source of volumes, or of the slices of volumes; see `open`.

    Args:
        items: (pair, page) of each example; page None is the whole volume.
        root: what names are relative to.
        coding: of the masks, with the rank of an example.
        spacing: voxel size to resample to, or ().
        channels: as for `open`.
    """

    def __init__(
        self,
        items: Sequence[tuple[Pair, int | None]],
        root: Path,
        *,
        coding: Coding,
        spacing: tuple[float, ...] = (),
        channels: int = 0,
    ) -> None:
        self.items, self.root, self.coding = tuple(items), root, coding
        self.spacing, self.channels = spacing, channels
        self._shapes: dict[Path, Shape] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.coding.label_names

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int, /) -> Example:
        pair, page = self.items[i]
        image, _ = read_volume(pair.image, page=page, channels=self.channels)
        mask = read_mask(pair.mask, page=page)
        rank = self.coding.rank
        same_size(pair, image.shape[:rank], mask.shape[:rank])
        label, weight = self.coding.decode(mask, str(pair.mask))
        if self.spacing:
            image = resample_to(image, self.size(i), order=1)
            label = resample_to(label, self.size(i), order=0)
            if weight is not None:
                weight = resample_to(weight, self.size(i), order=0)
        if weight is None:
            return {"image": image, "label": label}
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """The image's path below the root; ``[page]`` follows for a slice."""
        pair, page = self.items[i]
        return relative(pair.image, self.root) + ("" if page is None else f"[{page}]")

    def size(self, i: int, /) -> Shape:
        """(D, H, W) after resampling, or (H, W) of a slice, from the file's header."""
        pair, page = self.items[i]
        if pair.image not in self._shapes:
            shape, geometry = volume_size(pair.image)
            if self.spacing:
                shape = shape_at(
                    pair.image,
                    shape,
                    geometry,
                    self.spacing,
                    option="data.volumes.spacing",
                )
            self._shapes[pair.image] = shape
        shape = self._shapes[pair.image]
        return shape if page is None else shape[1:]

    def instances(self, i: int, /) -> NumpyArray:
        """The `objects` of a mask, ``i32[*S]``; there are with mask="instances"."""
        pair, page = self.items[i]
        mask = read_mask(pair.mask, page=page)
        return resample_to(objects(mask, self.coding, str(pair.mask)), self.size(i))


def open(
    *,
    root: str | Path,
    split: str,
    images: str = "train-volume.tif",
    masks: str = "train-labels.tif",
    slices: bool = True,
    mask: str = "auto",
    colors: Sequence[Sequence[int]] = (),
    label_names: Sequence[str] = (),
    ignore: int = -1,
    spacing: Sequence[float] = (),
    channels: int = 0,
    links: bool = False,
    on_error: str = "stop",
) -> Volumes:
    """Opens TIFF stacks, NIfTI volumes or 3-D npy arrays with their masks.

    Args:
        root: the folder everything is under.
        split: a name, and if wanted a part of the list (`split.parse`) of
            volumes sorted by stem, or of all their slices in that order. As in
            `folder`, the split's name picks ``root/<name>/`` where that is a folder.
        images, masks: one file each, or a folder or a glob each, paired by stem;
            ``{split}`` in them stands for the split's name, as for `folder.open`.
        slices: each index of the first array axis is one 2-D example (a page of a
            TIFF stack); otherwise each file is one 3-D example.
        mask, colors, label_names, ignore: as for `folder.open`.
        spacing: voxel size along the three array axes that volumes are resampled to,
            image linear, label nearest; empty: as stored. For NIfTI in 3-D.
        channels: 1 or 3 converts every image, 0 keeps the files' channels.
        links, on_error: as for `folder.open`.

    Raises:
        InputError: nothing there, an image without mask, an unreadable file, an image
            and a mask of different sizes, masks whose values no rule explains, or
            ``spacing`` where the voxel size is not known.
    """
    root = Path(root).expanduser()
    name, select = splits.parse(split)
    to = tuple(float(size) for size in spacing)
    if to and (slices or len(to) != 3 or min(to) <= 0):
        raise InputError(
            f"spacing={to} needs slices=False and three positive sizes, one for each "
            "array axis: mend it or leave it out."
        )
    faults = Faults(on_error, f"volumes of {root}")
    pairs, every_mask = find_pairs(
        root,
        name,
        images=images,
        masks=masks,
        suffixes=SUFFIXES,
        faults=faults,
        links=links,
    )
    pages: dict[Pair, int] = {}

    def check(pair: Pair) -> None:
        pages[pair] = _shape(pair, to)[0]

    items: list[tuple[Pair, int | None]] = [(pair, None) for pair in pairs]
    if slices:
        pairs = passing(pairs, check, faults)
        items = [(pair, page) for pair in pairs for page in range(pages[pair])]
        if not items:
            faults.report(0)
    items = list(splits.take(items, select(len(items))))
    if not slices:
        pairs = passing([pair for pair, _ in items], check, faults)
    unreadable: dict[Path, InputError] = {}
    coding = mask_codings.choose(
        every_mask,
        read_mask,
        mask=mask,
        colors=colors,
        label_names=label_names,
        ignore=ignore,
        rank=3,
        unreadable=unreadable if on_error == "skip" else None,
    )
    for pair in pairs:
        if pair.mask in unreadable:
            faults.add(unreadable[pair.mask])
    usable = {pair for pair in pairs if pair.mask not in unreadable}
    items = [item for item in items if item[0] in usable]
    faults.report(len(items))
    coding = dataclasses.replace(coding, rank=2 if slices else 3)
    return Volumes(items, root, coding=coding, spacing=to, channels=channels)


def _shape(pair: Pair, spacing: tuple[float, ...]) -> Shape:
    """(D, H, W) as stored, after comparing the headers of image and mask."""
    shape, geometry = volume_size(pair.image)
    mask_shape, mask_geometry = volume_size(pair.mask)
    same_size(pair, shape, mask_shape)
    if spacing:
        shape_at(pair.image, shape, geometry, spacing, option="data.volumes.spacing")
    if geometry is not None and mask_geometry is not None:
        # A tenth of a voxel: headers are written with few digits.
        near = 0.1 * min(geometry.spacing)
        if not np.allclose(geometry.affine, mask_geometry.affine, atol=near):
            _LOG.warning(
                "%s and its mask %s lie at different places by their headers; voxels "
                "are paired by their numbers",
                pair.image,
                pair.mask,
            )
    return shape
