"""Folders of the Cell Tracking Challenge: frames of which some cells are annotated.

::

    root/01/t000.tif ...               the frames, 2-D, or volumes of several pages
    root/01_GT/SEG/man_seg007.tif      gold truth of a whole frame
    root/01_GT/SEG/man_seg_003_012.tif gold truth of page 12 (from 0) of frame 3
    root/01_GT/TRA/man_track000.tif    a marker for each cell
    root/01_ST/SEG/man_seg000.tif ...  silver truth: what programs agree on
    root/02 ...                        the second sequence, likewise

By the challenge's conventions a gold frame has all of its cells, a gold page may have
only some, silver truth may lack what is hard to find, and markers are complete unless a
data set says otherwise. So a cell without a mask is told by its marker, and is nowhere
taken for background.

Reference: Maska et al. 2023, doi 10.1038/s41592-023-01879-y; "Naming and file content
conventions" at celltrackingchallenge.net.
"""

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unet_jax.data import split as splits
from unet_jax.data import trust
from unet_jax.data.faults import Faults
from unet_jax.data.folder import CHECK_AT_OPENING
from unet_jax.data.pairs import WHOLE, Pair, passing, relative, same_size
from unet_jax.data.stacks import read_mask, read_volume, volume_size
from unet_jax.types import Example, InputError, NumpyArray, Shape, choose

_LOG = logging.getLogger("unet_jax")

TRUTHS = ("GT", "ST")


class Frame(NamedTuple):
    """An annotated frame and what there is of it; ``pages`` counts from 0."""

    image: Path
    whole: Path | None  # a mask of all pages
    pages: tuple[tuple[int, Path], ...]  # else: masks of some
    markers: Path | None

    def files(self) -> list[Path]:
        """All of them."""
        masks = [self.whole, *(path for _, path in self.pages), self.markers]
        return [self.image, *(path for path in masks if path is not None)]


class Ctc:
    """A source of annotated frames; see `open`.

    Args:
        frames: in their order.
        root: what names are relative to.
        shapes: (D, H, W) of each.
        truth, label_names, complete, unknown, spacing, channels: as for `open`.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        root: Path,
        *,
        shapes: Sequence[Shape],
        truth: str,
        label_names: tuple[str, ...],
        complete: bool,
        unknown: float,
        spacing: tuple[float, ...],
        channels: int,
    ) -> None:
        self.frames, self.root = tuple(frames), root
        self.label_names = label_names
        self.truth, self.complete, self.unknown = truth, complete, unknown
        self.channels = channels
        self._shapes = tuple(shapes)
        # Of volumes there may be one whose other pages are empty and left out.
        self.rank = 3 if any(shape[0] > 1 for shape in shapes) else 2
        self.spacing = spacing or (1.0,) * self.rank
        if len(self.spacing) != self.rank or not min(self.spacing) > 0:
            raise InputError(
                f"data.ctc.spacing is {spacing}, but the frames have {self.rank} axes: "
                f"give {self.rank} numbers above 0."
            )

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int, /) -> Example:
        frame = self.frames[i]
        image, _ = read_volume(frame.image, channels=self.channels)
        instances, annotated = self._annotation(i)
        weight = np.zeros(instances.shape, np.float32)
        weight[annotated] = 1
        if not self.complete:
            weight[self._unknown(frame, instances) & (instances == 0)] = 0
        label = (instances > 0).astype(np.uint8)
        if self.rank == 2:
            image, label, weight = image[0], label[0], weight[0]
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """The frame's path below the root."""
        return relative(self.frames[i].image, self.root)

    def size(self, i: int, /) -> Shape:
        """(H, W) or (D, H, W), from the frame's header."""
        return self._shapes[i][3 - self.rank :]

    def instances(self, i: int, /) -> NumpyArray:
        """``i32[*S]`` the numbers of the annotated cells, 0 elsewhere.

        Masks of pages keep their numbers: one number on two pages may be two cells.
        """
        instances, _ = self._annotation(i)
        return instances[0] if self.rank == 2 else instances

    def _annotation(self, i: int) -> tuple[NumpyArray, NumpyArray]:
        """(numbers of cells ``i32[D, H, W]``, which pages are annotated ``bool[D]``)"""
        frame, shape = self.frames[i], self._shapes[i]
        if frame.whole is not None:
            return _numbers(frame.whole), np.ones(shape[0], bool)
        instances, annotated = np.zeros(shape, np.int32), np.zeros(shape[0], bool)
        for page, path in frame.pages:
            instances[page], annotated[page] = _numbers(path)[0], True
        return instances, annotated

    def _unknown(self, frame: Frame, instances: NumpyArray) -> NumpyArray:
        """Where a cell without a mask may be, ``bool[D, H, W]``."""
        from scipy import ndimage

        if frame.markers is None:
            return np.full(instances.shape, not _whole(frame, self.truth))
        markers = _numbers(frame.markers)
        found = np.unique(markers[instances > 0])
        missing = (markers > 0) & ~np.isin(markers, found)
        if not missing.any():
            return missing
        spacing = (1.0, *self.spacing)[-3:]
        reach = self.unknown or _extent(instances, spacing)
        away = ndimage.distance_transform_edt(~missing, sampling=spacing)
        return np.asarray(away) <= reach


def open(
    *,
    root: str | Path,
    split: str,
    sequences: Sequence[str] = (),
    truth: str = "GT",
    label_names: Sequence[str] = ("background", "cell"),
    complete: bool = False,
    unknown: float = 0.0,
    spacing: Sequence[float] = (),
    channels: int = 0,
    links: bool = False,
    on_error: str = "stop",
) -> Ctc:
    """Opens the annotated frames of Cell Tracking Challenge sequences.

    Frames without an annotation are left out. Of a volume of which only pages are
    annotated, the other pages have weight 0.

    Args:
        root: the folder of one data set, with 01 and 01_GT in it.
        split: a sequence's name such as ``01``, or ``all`` (or ``train``) for those of
            ``sequences`` one after another; and if wanted a part of its annotated
            frames in their order (`split.parse`).
        sequences: names of folders; () is every one that has the truth asked for.
        truth: GT, gold: by people; or ST, silver: by programs.
        label_names: of the background and of the cells.
        complete: whether every cell of every annotated frame or page has a mask, so
            that all else is background. Otherwise a marker that overlaps no mask is a
            cell without one, and the weight is 0 within ``unknown`` of it, but never
            on a mask. Where a frame has no marker file, a gold frame counts whole, as
            the conventions have it; of a gold page and of silver truth only the masks
            count, for nothing says where there is background.
        unknown: how far from its marker such a cell may reach, in the unit of
            ``spacing``; 0 is the longest side of the frame's annotated cells (of their
            boxes), and no background at all in a frame that has none.
        spacing: size of a pixel along each axis; () is 1. Volumes mostly have thicker
            pages than pixels are wide.
        channels: 1 or 3 converts every frame, 0 keeps the files' channels.
        links, on_error: as for `folder.open`.

    Raises:
        InputError: a folder that is not there, a mask without its frame, files of
            different sizes, or an option outside its range.
    """
    root = Path(root).expanduser()
    name, select = splits.parse(split)
    choose(TRUTHS, truth, "data.ctc.truth =")
    names = tuple(label_names)
    if len(names) != 2 or not unknown >= 0:
        raise InputError(
            f"data.ctc.label_names = {names} must be two names and data.ctc.unknown = "
            f"{unknown} 0 or more: mend what is not, or leave it out."
        )
    faults = Faults(on_error, f"frames of {root}")
    frames: list[Frame] = []
    skipped = 0
    for sequence in _sequences(root, name, sequences, truth):
        annotated, others = _frames(root, sequence, truth, faults)
        frames += annotated
        skipped += others
    if skipped:
        _LOG.warning("%d frames in %s have no mask and are left out", skipped, root)
    if not frames:
        faults.report(0)
    frames = list(splits.take(frames, select(len(frames))))
    trust.check_links(root, (p for frame in frames for p in frame.files()), links=links)
    compare = len(frames) <= CHECK_AT_OPENING
    shapes: dict[Frame, Shape] = {}

    def check(frame: Frame) -> None:
        shapes[frame] = _shape(frame, compare=compare)

    frames = passing(frames, check, faults)
    faults.report(len(frames))
    bare = [f for f in frames if not (complete or f.markers or _whole(f, truth))]
    if bare:
        _LOG.warning(
            "%d frames have no markers to tell cells without a mask from background, "
            "such as %s: nothing but their masks counts; set data.ctc.complete=True if "
            "all of their cells have one",
            len(bare),
            bare[0].image,
        )
    return Ctc(
        frames,
        root,
        shapes=[shapes[frame] for frame in frames],
        truth=truth,
        label_names=names,
        complete=complete,
        unknown=float(unknown),
        spacing=tuple(map(float, spacing)),
        channels=channels,
    )


def _sequences(
    root: Path, name: str, sequences: Sequence[str], truth: str
) -> Sequence[str]:
    """The names of the sequences of a split."""
    if not root.is_dir():
        raise InputError(f"The folder {root} does not exist: check `data.root`.")
    found = sorted(
        place.name
        for place in root.iterdir()
        if place.is_dir() and (root / f"{place.name}_{truth}" / "SEG").is_dir()
    )
    if not found:
        raise InputError(
            f"{root} holds no sequence with masks: there must be a folder such as 01 "
            f"with t000.tif beside 01_{truth}/SEG with man_seg000.tif."
        )
    asked = (tuple(sequences) or tuple(found)) if name in WHOLE else (name,)
    for sequence in asked:
        if sequence not in found:
            raise InputError(
                f"{root} has no sequence {sequence!r} with a folder "
                f"{sequence}_{truth}/SEG: choose from {', '.join(found)}, or all."
            )
    return asked


def _frames(
    root: Path, sequence: str, truth: str, faults: Faults
) -> tuple[list[Frame], int]:
    """(the annotated frames of a sequence, how many others there are)."""
    images = _files(root / sequence, r"t(\d+)\.tif")
    place = root / f"{sequence}_{truth}" / "SEG"
    whole = _files(place, r"man_seg(\d+)\.tif")
    pages = _files(place, r"man_seg_(\d+)_(\d+)\.tif")
    markers = _files(root / f"{sequence}_GT" / "TRA", r"man_track(\d+)\.tif")
    if not whole and not pages:
        raise InputError(
            f"{place} holds no masks: they must be called like man_seg000.tif, or "
            "man_seg_000_012.tif for a page of a volume."
        )
    of_frame: dict[int, list[tuple[int, Path]]] = {}
    for (number, page), path in pages.items():
        of_frame.setdefault(number, []).append((page, path))
    numbers = sorted({number for (number,) in whole} | of_frame.keys())
    for number in numbers:
        if (number,) not in images:
            path = whole.get((number,)) or of_frame[number][0][1]
            error = InputError(
                f"The mask {path} has no frame {root / sequence}/t{number:03}.tif: add "
                "the frame, or take the mask away."
            )
            faults.add(error)
    frames = [
        Frame(
            images[(number,)],
            whole.get((number,)),
            # A mask of the whole frame says all that masks of its pages say.
            () if (number,) in whole else tuple(sorted(of_frame[number])),
            markers.get((number,)),
        )
        for number in numbers
        if (number,) in images
    ]
    return frames, len(images) - len(frames)


def _files(place: Path, rule: str) -> dict[tuple[int, ...], Path]:
    """The numbers in a file's name -> the file; of any number of digits."""
    if not place.is_dir():
        return {}
    matches = ((re.fullmatch(rule, path.name), path) for path in place.iterdir())
    return {tuple(map(int, m.groups())): path for m, path in matches if m}


def _shape(frame: Frame, *, compare: bool) -> Shape:
    """(D, H, W) of a frame's header, compared with those of its masks and markers."""
    shape = volume_size(frame.image)[0]
    if not compare:
        return shape
    for path in (frame.whole, frame.markers):
        if path is not None:
            _same_size(frame.image, path, shape)
    for page, path in frame.pages:
        if page >= shape[0]:
            raise InputError(
                f"{path} is the mask of page {page}, but {frame.image} has {shape[0]} "
                "pages, counted from 0: mend the mask's name."
            )
        _same_size(frame.image, path, (1, *shape[1:]))
    return shape


def _same_size(image: Path, mask: Path, shape: Shape) -> None:
    """Raises InputError if the mask's header says another size than ``shape``."""
    other = volume_size(mask)[0]
    flat = int(shape[0] == other[0] == 1)  # of images, people say (H, W)
    same_size(Pair(image, mask), shape[flat:], other[flat:])


def _whole(frame: Frame, truth: str) -> bool:
    """Whether all cells of a frame have a mask, by the challenge's conventions."""
    return frame.whole is not None and truth == "GT"


def _numbers(path: Path) -> NumpyArray:
    """The numbers of a mask or of markers, ``i32[D, H, W]``."""
    mask = read_mask(path)
    if mask.ndim != 3:
        raise InputError(f"The mask {path} is coloured: save one number for each cell.")
    return mask.astype(np.int32)


def _extent(instances: NumpyArray, spacing: tuple[float, ...]) -> float:
    """The longest side of the boxes around objects; of none, infinity."""
    from scipy import ndimage

    sides = [
        (b.stop - b.start) * s
        for box in ndimage.find_objects(instances)
        if box is not None
        for b, s in zip(box, spacing, strict=True)
    ]
    return max(sides, default=math.inf)
