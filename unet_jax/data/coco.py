"""Images whose objects stand in a JSON file of COCO's format, as polygons or runs.

Layouts that are found without options, for a split called ``train``::

    root/train.json                            images in root/train, root/images ...
    root/annotations/instances_train2017.json  images in root/images/train ...
    root/train/_annotations.coco.json          images beside it (Roboflow)
    root/annotations.json                      one list, ``train`` or ``all`` of it

`polygons` says which pixels belong to an outline.

Reference: Lin et al. 2014, arXiv 1405.0312; "Data format" at cocodataset.org.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unet_jax.data import images as image_files
from unet_jax.data import polygons as shapes
from unet_jax.data import split as splits
from unet_jax.data import trust
from unet_jax.data.coco_json import (
    Entry,
    Frame,
    Region,
    by_image,
    find_annotations,
    find_images,
    read_content,
    read_entries,
    read_labels,
    read_region,
)
from unet_jax.data.faults import Faults
from unet_jax.data.folder import CHECK_AT_OPENING, relative
from unet_jax.types import Example, InputError, NumpyArray, Shape, size_text


class Coco:
    """A source of images with the objects of a JSON file; see `open`.

    Args:
        frames: in their order.
        root: what names are relative to.
        annotations: the JSON file, for messages.
        names: of the labels 1 .. K.
        overlap, channels: as for `open`.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        root: Path,
        annotations: Path,
        names: Sequence[str],
        *,
        overlap: bool,
        channels: int,
    ) -> None:
        self.frames, self.root, self.annotations = tuple(frames), root, annotations
        self.names, self.overlapping, self.channels = tuple(names), overlap, channels
        self._sizes: dict[int, Shape] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.names if self.overlapping else ("background", *self.names)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int, /) -> Example:
        frame = self.frames[i]
        image = image_files.read_image(frame.image, channels=self.channels)
        shape = image.shape[:2]
        _check(frame, shape, self.annotations)
        if self.overlapping:
            label, void = self._planes(frame, shape)
        else:
            numbers = self._numbers(frame, shape)
            kind = np.uint8 if len(self.names) < 256 else np.uint16
            table = np.asarray([0, *(r.label for r in frame.regions)], kind)
            label, void = table[numbers], self._crowds(frame, shape)
        if not any(region.crowd for region in frame.regions):
            return {"image": image, "label": label}
        weight = 1 - (void & (label == 0)).astype(np.float32)
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """The image's path below the root."""
        return relative(self.frames[i].image, self.root)

    def size(self, i: int, /) -> Shape:
        """(H, W), from the image's header."""
        if i not in self._sizes:
            self._sizes[i] = image_files.image_size(
                self.frames[i].image, channels=self.channels
            )
        return self._sizes[i]

    def instances(self, i: int, /) -> NumpyArray:
        """``i32[H, W]``: k for the image's k-th annotation, 0 where there is none.

        Annotations of categories that were left out are not counted. Where two lie on
        each other, the smaller is on top. Crowds are no objects.
        """
        frame = self.frames[i]
        _check(frame, self.size(i), self.annotations)
        return self._numbers(frame, self.size(i))

    def _patch(self, region: Region, shape: Shape) -> shapes.Patch:
        if region.runs is not None:
            return shapes.from_runs(region.runs[0], shape)
        where = _where(self.annotations, region)
        return shapes.union([shapes.fill(p, shape, where) for p in region.polygons])

    def _numbers(self, frame: Frame, shape: Shape) -> NumpyArray:
        """`instances` of a frame; one object after another, so that few are held."""
        trust.check_bytes(shape, 16, str(frame.image))
        numbers = np.zeros(shape, np.int32)
        least = np.full(shape, np.prod(shape), np.int64)  # area of what is on top
        for k, region in enumerate(frame.regions, 1):
            if region.crowd:
                continue
            rows, columns, inside = self._patch(region, shape)
            area, below = int(inside.sum()), least[rows, columns]
            on_top = inside & (area <= below)
            below[on_top] = area
            numbers[rows, columns][on_top] = k
        return numbers

    def _crowds(self, frame: Frame, shape: Shape) -> NumpyArray:
        """Where there are crowds, ``bool[H, W]``."""
        void = np.zeros(shape, bool)
        for region in frame.regions:
            if region.crowd:
                rows, columns, inside = self._patch(region, shape)
                void[rows, columns] |= inside
        return void

    def _planes(self, frame: Frame, shape: Shape) -> tuple[NumpyArray, NumpyArray]:
        """(label ``u8[H, W, K]``, crowds of each label ``bool[H, W, K]``)"""
        trust.check_bytes((*shape, len(self.names)), 6, str(frame.image))
        label = np.zeros((*shape, len(self.names)), np.uint8)
        void = np.zeros(label.shape, bool)
        for region in frame.regions:
            rows, columns, inside = self._patch(region, shape)
            into = void if region.crowd else label
            into[rows, columns, region.label - 1] |= inside
        return label, void


def open(
    *,
    root: str | Path,
    split: str,
    annotations: str = "",
    images: str = "",
    label_names: Sequence[str] = (),
    overlap: bool = False,
    channels: int = 0,
    links: bool = False,
    on_error: str = "stop",
) -> Coco:
    """Opens images with the annotations of a COCO JSON file.

    Each object is a polygon, several polygons, or runs (RLE, packed or not). Everything
    else is background, also all of an image that has no annotation. A crowd
    (``iscrowd`` of 1) has weight 0 where no other object lies.

    Args:
        root: the folder everything is under.
        split: a name, and if wanted a part of its images sorted by name
            (`split.parse`). ``all`` and ``train`` also mean the one list of a root
            with one file.
        annotations: the JSON file below the root, ``{split}`` standing for the split's
            name; empty: found as the module says.
        images: the folder that ``file_name`` is relative to, likewise; empty: of
            ``{split}``, ``images/{split}``, ``images``, the root and the JSON's own
            folder, the first that holds them.
        label_names: categories, in the order of their class ids from 1 on; those left
            out are background. Empty: all of ``categories``, by id.
        overlap: False gives class ids, and of two objects on each other the one of the
            smaller area; True one plane of zeros and ones for each category, label
            ``u8[H, W, K]``, for data.task=labels.
        channels: 1 or 3 converts every image, 0 keeps the files' channels; any other
            number is that of files which have as many (see `images.read_image`).
        links: whether files may be links that lead out of the root.
        on_error: ``stop``, or ``skip`` to leave out images that are missing, damaged or
            of another size than the JSON says, or have an annotation that cannot be
            read (without it they would be wrong), and annotations of no image.

    Raises:
        InputError: no file or several that could be meant, and, unless skipped, an
            entry that is wrong, which it names.
    """
    root = Path(root).expanduser()
    name, select = splits.parse(split)
    path = find_annotations(root, name, annotations)
    trust.check_links(root, [path], links=links)
    faults = Faults(on_error, f"images or annotations of {path}")
    content = read_content(path)
    labels, names = read_labels(content["categories"], label_names, path)
    if not overlap and "background" in names:
        raise InputError(
            f"{path} has a category called background, which is the name of what no "
            "object covers: give the others in data.coco.label_names."
        )
    entries, ids = read_entries(content["images"], path, faults)
    folder = find_images(root, name, images, path, [e.file for e in entries])
    placed = [(trust.named(folder, e.file, e.where), e) for e in entries]
    placed.sort(key=lambda item: item[0])
    placed = splits.take(placed, select(len(placed)))
    trust.check_links(root, [place for place, _ in placed], links=links)
    of_image = by_image(content["annotations"], path, ids, faults)
    # What is parsed takes many times the room of what is kept of it.
    del content

    def read(item: tuple[Path, Entry]) -> Frame | InputError:
        place, entry = item
        try:
            regions = [
                read_region(annotation, number, labels, path)
                for number, annotation in of_image.pop(entry.id, ())
            ]
            frame = Frame(place, entry.size, tuple(r for r in regions if r))
            if len(placed) <= CHECK_AT_OPENING:
                size = image_files.image_size(place, channels=channels)
                _check(frame, size, path)
            # Unlike pathlib's, this does not fail on a name that is too long.
            elif not os.path.isfile(place):
                raise InputError(f"{place} does not exist, but {entry.where} names it.")
        except InputError as error:
            return error
        return frame

    frames: list[Frame] = []
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(read, placed):
            if isinstance(answer, Frame):
                frames.append(answer)
            else:
                faults.add(answer)
    faults.report(len(frames))
    return Coco(frames, root, path, names, overlap=overlap, channels=channels)


def _check(frame: Frame, shape: Shape, annotations: Path) -> None:
    """Compares an image with what the JSON says of it.

    Args:
        frame: the image and its annotations.
        shape: (H, W) of the image.
        annotations: the JSON file.

    Raises:
        InputError: another size, or an annotation that was not made on an image of
            this size.
    """
    if frame.size is not None and frame.size != shape:
        raise InputError(
            f"{frame.image} has the size {size_text(shape)}, but {annotations} says "
            f"{size_text(frame.size)} (rows first): give the image that the objects "
            "were drawn on."
        )
    for region in frame.regions:
        where = _where(annotations, region)
        for polygon in region.polygons:
            shapes.check_polygon(polygon, shape, where)
        if region.runs is not None and region.runs[1] != shape:
            raise InputError(
                f"{where} has an RLE of the size {size_text(region.runs[1])}, but "
                f"{frame.image} has {size_text(shape)} (rows first): mend or remove it."
            )


def _where(annotations: Path, region: Region) -> str:
    return f"{annotations}: annotations[{region.number}]"
