"""Data sets with a ``dataset.json``: the Medical Segmentation Decathlon and nnU-Net's.

::

    root/dataset.json
    root/imagesTr/liver_001_0000.nii.gz, liver_001_0001.nii.gz    a file a channel
    root/labelsTr/liver_001.nii.gz

`nnunet_json` says which forms of it there are. Files are NIfTI or TIFF volumes, or
flat images.

Reference: Isensee et al. 2021, doi 10.1038/s41592-020-01008-z; Antonelli et al. 2022,
doi 10.1038/s41467-022-30695-9.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from unet_jax.data import images as image_files
from unet_jax.data import split as splits
from unet_jax.data import trust
from unet_jax.data.faults import Faults
from unet_jax.data.folder import CHECK_AT_OPENING, WHOLE, Pair, relative, same_size
from unet_jax.data.nnunet_json import (
    FLAT,
    Case,
    Labels,
    find_cases,
    read_channels,
    read_content,
    read_labels,
)
from unet_jax.data.stacks import (
    Geometry,
    read_mask,
    read_volume,
    resample_to,
    shape_at,
    volume_size,
)
from unet_jax.types import Example, InputError, NumpyArray, Shape, size_text

_LOG = logging.getLogger("unet_jax")


class NnUNet:
    """A source of cases, or of their slices; see `open`.

    Args:
        items: (case, page) of each example; page None is the whole case.
        root: what names are relative to.
        labels: what the numbers in label files mean.
        channels_named: the names of the channels.
        flat: whether the files are 2-D images.
        spacing: voxel size to resample to, or ().

    Attributes:
        channels_named: as the file says: ``CT`` is measured in one unit, ``MRI`` not.
        overlapping: whether labels are regions.
    """

    def __init__(
        self,
        items: Sequence[tuple[Case, int | None]],
        root: Path,
        labels: Labels,
        channels_named: tuple[str, ...],
        *,
        flat: bool,
        spacing: tuple[float, ...] = (),
    ) -> None:
        self.items, self.root, self.labels = tuple(items), root, labels
        self.channels_named, self.flat, self.spacing = channels_named, flat, spacing
        self.overlapping = bool(labels.regions)
        self._shapes: dict[Path, Shape] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.labels.names

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int, /) -> Example:
        case, page = self.items[i]
        image, mask = self._image(case, page), self._mask(case, page)
        same_size(Pair(case.images[0], case.label), image.shape[:-1], mask.shape)
        places = self.labels.places(mask, str(case.label))
        if self.spacing:
            image = resample_to(image, self.size(i), order=1)
            places = resample_to(places, self.size(i), order=0)
        label, weight = self.labels.decode(places)
        if weight is None:
            return {"image": image, "label": label}
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """The path of the first channel below the root; ``[page]`` for a slice."""
        case, page = self.items[i]
        name = relative(case.images[0], self.root)
        return name + ("" if page is None else f"[{page}]")

    def size(self, i: int, /) -> Shape:
        """The spatial shape after resampling, from the file's header."""
        case, page = self.items[i]
        image = case.images[0]
        if image not in self._shapes:
            shape, geometry = _header(image, self.flat)
            if self.spacing:
                shape = shape_at(
                    image, shape, geometry, self.spacing, option="data.nnunet.spacing"
                )
            self._shapes[image] = shape
        shape = self._shapes[image]
        return shape if page is None else shape[1:]

    def _image(self, case: Case, page: int | None) -> NumpyArray:
        """``[*S, C]``, the channels' files one after another."""
        parts = [
            image_files.read_image(path)
            if self.flat
            else read_volume(path, page=page)[0]
            for path in case.images
        ]
        for path, part in zip(case.images, parts, strict=True):
            _same_channels(case.images[0], parts[0].shape[:-1], path, part.shape[:-1])
        image = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
        if image.shape[-1] != len(self.channels_named):
            raise InputError(
                f"{case.images[0]} has {image.shape[-1]} channels, but dataset.json "
                f"names {len(self.channels_named)}, {', '.join(self.channels_named)}: "
                "mend the names there, or the file."
            )
        return image

    def _mask(self, case: Case, page: int | None) -> NumpyArray:
        if self.flat:
            mask = image_files.read_mask(case.label)
        else:
            mask = read_mask(case.label, page=page)
        rank = 2 if self.flat or page is not None else 3
        if mask.ndim != rank:
            raise InputError(
                f"{case.label} is coloured: save one number a pixel, the label's."
            )
        return mask


def open(
    *,
    root: str | Path,
    split: str,
    slices: bool = False,
    spacing: Sequence[float] = (),
    regions: bool | None = None,
    links: bool = False,
    on_error: str = "stop",
) -> NnUNet:
    """Opens the training cases of a data set with a ``dataset.json``.

    Classes are numbered in the order of the labels' numbers, which may have gaps. What
    the label ``ignore`` covers has weight 0.

    Args:
        root: the folder with dataset.json.
        split: ``train`` or ``all``, and if wanted a part of the cases sorted by name
            (`split.parse`). Slices of one case stay together.
        slices: each index of the first array axis is one 2-D example.
        spacing: voxel size along the three array axes that volumes are resampled to,
            image linear, label nearest; empty: as stored. For NIfTI in 3-D.
        regions: True gives one plane of zeros and ones for each label but the
            background, label ``u8[*S, K]``, for data.task=labels; False a class for
            each number. None: regions where a label has several numbers, as nnU-Net
            does.
        links: whether files may be links that lead out of the root.
        on_error: ``stop``, or ``skip`` to leave out cases that lack a file, have a
            damaged one, or files of different sizes.

    Raises:
        InputError: no dataset.json or a faulty one, another split, and, unless
            skipped, a case that is wrong, which it names.
    """
    root = Path(root).expanduser()
    name, select = splits.parse(split)
    to = tuple(float(size) for size in spacing)
    if to and (slices or len(to) != 3 or not min(to) > 0):
        raise InputError(
            f"spacing={to} needs slices=False and three positive sizes, one for each "
            "array axis: mend it or leave it out."
        )
    path = _dataset_json(root, name)
    trust.check_links(root, [path], links=links)
    content, faults = read_content(path), Faults(on_error, f"cases of {root}")
    channels, labels = read_channels(content, path), read_labels(content, regions, path)
    cases = find_cases(content, path, len(channels), faults)
    said = content.get("numTraining")
    if type(said) is int and said != len(cases) + faults.count:
        _LOG.warning("%s says %d cases, but there are %d", path, said, len(cases))
    cases = list(splits.take(cases, select(len(cases))))
    trust.check_links(
        root, [p for c in cases for p in (*c.images, c.label)], links=links
    )
    flat = _flat(cases)
    if flat and slices:
        raise InputError(
            f"{cases[0].images[0]} is a flat image and has no slices: leave "
            "data.nnunet.slices out."
        )
    shapes = _check(cases, flat, to, slices, faults)
    faults.report(len(shapes))
    items: list[tuple[Case, int | None]] = [(case, None) for case in shapes]
    if slices:
        items = [(case, p) for case, shape in shapes.items() for p in range(shape[0])]
    return NnUNet(items, root, labels, channels, flat=flat, spacing=to)


def _dataset_json(root: Path, name: str) -> Path:
    path = root / "dataset.json"
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: set data.root to the folder that has it, such as "
            "Task04_Hippocampus or Dataset004_Hippocampus."
        )
    if name not in WHOLE:
        tests = "its test cases have no labels; " if name in ("test", "Ts") else ""
        raise InputError(
            f"{root} has no split {name!r}: {tests}name a part of its training cases "
            "such as train[:80%] and train[80%:], or all[not fold 1/5]."
        )
    return path


def _flat(cases: Sequence[Case]) -> bool:
    """Whether the images are 2-D; a TIFF file may be either."""
    for case in cases:
        image = case.images[0]
        if image.suffix.lower() not in (".tif", ".tiff"):
            return image.suffix.lower() in FLAT
        # What is wrong with a file is told where all are looked at.
        with contextlib.suppress(InputError):
            return volume_size(image)[0][0] == 1
    return True


def _check(
    cases: Sequence[Case],
    flat: bool,
    spacing: tuple[float, ...],
    slices: bool,
    faults: Faults,
) -> dict[Case, Shape]:
    """The sound cases with their shapes, by the headers of their files.

    Of many cases only the files are looked for, unless their slices must be counted.
    """
    quick = len(cases) > CHECK_AT_OPENING and not slices
    elsewhere: list[Case] = []

    def look(case: Case) -> Shape | InputError:
        try:
            for path in (*case.images, case.label):
                # Unlike pathlib's, this does not fail on a name that is too long.
                if not os.path.isfile(path):
                    raise InputError(
                        f"{path} does not exist, but the case {case.name} needs it: "
                        "add it, or remove the case from dataset.json."
                    )
            if quick:
                return ()
            shape, aligned = _compare(case, flat, spacing)
        except InputError as error:
            return error
        if not aligned:
            elsewhere.append(case)
        return shape

    shapes: dict[Case, Shape] = {}
    with ThreadPoolExecutor(4) as pool:
        for case, answer in zip(cases, pool.map(look, cases), strict=True):
            if isinstance(answer, InputError):
                faults.add(answer)
            else:
                shapes[case] = answer
    if elsewhere:
        _LOG.warning(
            "%d cases, such as %s, lie elsewhere than their labels by the headers; "
            "voxels are paired by their numbers",
            len(elsewhere),
            min(elsewhere).name,
        )
    return shapes


def _compare(case: Case, flat: bool, spacing: tuple[float, ...]) -> tuple[Shape, bool]:
    """(the shape of a case, whether image and label lie at one place)"""
    first = case.images[0]
    shape, geometry = _header(first, flat)
    if spacing:
        shape_at(first, shape, geometry, spacing, option="data.nnunet.spacing")
    for other in case.images[1:]:
        other_shape, other_geometry = _header(other, flat)
        _same_channels(first, shape, other, other_shape)
        if not _near(geometry, other_geometry):
            raise InputError(
                f"{first} and {other} lie at different places by their headers: "
                "resample the channels of a case to one grid."
            )
    label_shape, label_geometry = _header(case.label, flat)
    same_size(Pair(first, case.label), shape, label_shape)
    return shape, _near(geometry, label_geometry)


def _header(path: Path, flat: bool) -> tuple[Shape, Geometry | None]:
    return (image_files.image_size(path), None) if flat else volume_size(path)


def _near(one: Geometry | None, other: Geometry | None) -> bool:
    if one is None or other is None:
        return True
    # A tenth of a voxel: headers are written with few digits.
    return np.allclose(one.affine, other.affine, atol=0.1 * min(one.spacing))


def _same_channels(one: Path, shape: Shape, other: Path, other_shape: Shape) -> None:
    if shape != other_shape:
        raise InputError(
            f"{one} has the size {size_text(shape)}, but the channel {other} "
            f"{size_text(other_shape)}: resample the channels of a case to one grid."
        )
