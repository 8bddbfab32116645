"""What the mask files of one image say: classes, objects, or labels that overlap.

`One` file of classes (`masks`), one file for each of the `Objects`, one file with a
plane for each label (`Planes`), or one file for each of the `Labels`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from unet_jax.data import formats, images
from unet_jax.data.masks import Coding
from unet_jax.data.pairs import Entry, Pair, same_size
from unet_jax.data.source import NoInstances
from unet_jax.types import InputError, NumpyArray, Shape

Read = tuple[NumpyArray, NumpyArray | None]
"""(label, weight or None)"""


class Truth(Protocol):
    """How the mask files of one data set are read.

    ``label_names``: of the classes, or of the K labels.
    ``overlapping``: whether a pixel may have several labels.
    """

    @property
    def label_names(self) -> tuple[str, ...]: ...

    @property
    def overlapping(self) -> bool: ...

    def read(self, entry: Entry, size: Shape) -> Read:
        """Label and weight of one image of a size, as a source gives them out."""
        ...

    def instances(self, entry: Entry, size: Shape) -> NumpyArray:
        """The numbers of objects, ``i32[*size]``, or NoInstances."""
        ...

    def size(self, path: Path) -> Shape:
        """(H, W) of one mask file, from its header."""
        ...


@dataclasses.dataclass(frozen=True)
class One:
    """One mask file an image, which ``coding`` reads."""

    coding: Coding
    overlapping = False

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.coding.label_names

    def read(self, entry: Entry, size: Shape) -> Read:
        ((_, path, mask),) = _masks(entry, size)
        return self.coding.decode(mask, str(path))

    def instances(self, entry: Entry, size: Shape) -> NumpyArray:
        ((_, path, mask),) = _masks(entry, size)
        return objects(mask, self.coding, str(path))

    def size(self, path: Path) -> Shape:
        return images.image_size(path)


@dataclasses.dataclass(frozen=True)
class Objects:
    """One mask file an object, black and white; of two on a pixel the first counts.

    Object k is the k-th file of the image. They are read one after another: there may
    be hundreds.
    """

    coding: Coding
    overlapping = False

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.coding.label_names

    def read(self, entry: Entry, size: Shape) -> Read:
        numbers, weight = self._numbers(entry, size)
        return (numbers > 0).astype(np.uint8), weight

    def instances(self, entry: Entry, size: Shape) -> NumpyArray:
        return self._numbers(entry, size)[0]

    def size(self, path: Path) -> Shape:
        return images.image_size(path)

    def _numbers(self, entry: Entry, size: Shape) -> Read:
        numbers = np.zeros(size, np.int32)
        weight = None if self.coding.ignore < 0 else np.ones(size, np.float32)
        for k, path, mask in _masks(entry, size):
            label, counted = self.coding.decode(mask, str(path))
            numbers[(label > 0) & (numbers == 0)] = k + 1
            if weight is not None and counted is not None:
                np.minimum(weight, counted, out=weight)
        return numbers, weight


@dataclasses.dataclass(frozen=True)
class Planes:
    """One file an image, with one black and white plane for each label."""

    coding: Coding
    label_names: tuple[str, ...]
    overlapping = True

    def read(self, entry: Entry, size: Shape) -> Read:
        (path,) = entry.masks
        assert path is not None
        planes = images.read_planes(path)
        same_size(Pair(entry.image, path), size, planes.shape[:2])
        if planes.shape[-1] != len(self.label_names):
            raise InputError(
                f"The mask {path} has {planes.shape[-1]} planes, but there are "
                f"{len(self.label_names)} labels, {', '.join(self.label_names)}: give "
                "every mask one plane for each label."
            )
        read = [
            self.coding.decode(planes[..., k], str(path))
            for k in range(planes.shape[-1])
        ]
        return _stacked(read)

    def instances(self, entry: Entry, size: Shape) -> NumpyArray:
        raise _overlapping(entry)

    def size(self, path: Path) -> Shape:
        return images.image_size(path, channels=-1)


@dataclasses.dataclass(frozen=True)
class Labels:
    """One black and white file a label; one that is not there is not annotated."""

    coding: Coding
    label_names: tuple[str, ...]
    overlapping = True

    def read(self, entry: Entry, size: Shape) -> Read:
        nothing = (np.zeros(size, np.uint8), np.zeros(size, np.float32))
        read: list[Read] = [nothing] * len(entry.masks)
        for k, path, mask in _masks(entry, size):
            read[k] = self.coding.decode(mask, str(path))
        return _stacked(read)

    def instances(self, entry: Entry, size: Shape) -> NumpyArray:
        raise _overlapping(entry)

    def size(self, path: Path) -> Shape:
        return images.image_size(path)


def read_mask(path: Path) -> NumpyArray:
    """`images.read_mask`, but not of one whose shape is in the transparency.

    Raises:
        InputError: what `images.read_mask` raises; or one colour everywhere under an
            alpha channel that is not.
    """
    mask = images.read_mask(path)
    if path.suffix.lower() == ".png" and mask.size and (mask == mask[0, 0]).all():
        from PIL import Image

        with formats.readable(str(path)), Image.open(path) as image:
            low = high = 0
            if image.mode in ("LA", "RGBA"):
                low, high = image.getchannel("A").getextrema()
        if low != high:
            raise InputError(
                f"The mask {path} has one colour everywhere and its shape in the "
                "transparency, which does not count: save it as black and white."
            )
    return mask


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


def _masks(entry: Entry, size: Shape) -> Iterator[tuple[int, Path, NumpyArray]]:
    """(place, file, mask) of the mask files there are, read when they are asked for."""
    for k, path in enumerate(entry.masks):
        if path is not None:
            mask = read_mask(path)
            same_size(Pair(entry.image, path), size, mask.shape[:2])
            yield k, path, mask


def _stacked(read: Sequence[Read]) -> Read:
    """Labels and weights ``[*S]`` of K labels as ``[*S, K]``; no weight if none has."""
    label = np.stack([label for label, _ in read], axis=-1)
    if all(weight is None for _, weight in read):
        return label, None
    ones = np.ones(label.shape[:-1], np.float32)
    weights = [ones if weight is None else weight for _, weight in read]
    return label, np.stack(weights, axis=-1)


def _overlapping(entry: Entry) -> NoInstances:
    return NoInstances(
        f"The labels of {entry.image} overlap and have no numbers of objects: give "
        "masks with one number an object (data.folder.mask=instances)."
    )
