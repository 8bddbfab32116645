"""What a ``dataset.json`` says: channels, labels and cases, of three conventions.

==============================  ===========================  ========================
Medical Segmentation Decathlon  nnU-Net 1                    nnU-Net 2
==============================  ===========================  ========================
``modality`` {"0": "MRI"}       likewise                     ``channel_names``
``labels`` {"1": "liver"}       likewise                     {"liver": 1}, or lists
``training`` lists the files    lists CASE.nii.gz for        ``file_ending`` of all in
                                CASE_0000.nii.gz ...         imagesTr and labelsTr,
                                                             or ``dataset`` lists them
==============================  ===========================  ========================
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unet_jax.data import trust
from unet_jax.data.faults import Faults
from unet_jax.types import InputError, NumpyArray

FLAT = (".png", ".bmp", ".jpg", ".jpeg")
SUFFIXES = (".nii.gz", ".nii", ".tif", ".tiff", *FLAT)
MOST = 2**16 - 2  # the largest id; the table of ids has room for one more
NO_LABEL = 2**16 - 1


class Case(NamedTuple):
    """A case: a file of all channels or one for each, and the file of its label."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the numbers in the label files mean.

    ``names``: of the classes, the background first; of regions, without it.
    ``ids``: the stored numbers, in rising order.
    ``regions``: the ids of each region; () where every id is a class.
    ``ignore``: the stored number that means "not annotated"; -1: none.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    regions: tuple[tuple[int, ...], ...] = ()
    ignore: int = -1

    def places(self, mask: NumpyArray, name: str) -> NumpyArray:
        """``u16`` like the mask: the place of each number in ``ids``; ignored: after.

        Args:
            mask: any whole numbers.
            name: the label file, for messages.

        Raises:
            InputError: a number that is no label.
        """
        known = (*self.ids, *([self.ignore] if self.ignore >= 0 else []))
        table = np.full(max(known) + 1, NO_LABEL, np.uint16)
        table[list(known)] = np.arange(len(known))
        low, high = int(mask.min(initial=0)), int(mask.max(initial=0))
        if low < 0 or high > max(known):
            raise self._unknown(low if low < 0 else high, name)
        places = table[mask]
        bad = places == NO_LABEL
        if bad.any():
            raise self._unknown(int(mask[bad].flat[0]), name)
        return places

    def decode(self, places: NumpyArray) -> tuple[NumpyArray, NumpyArray | None]:
        """(label, weight) of what `places` gives.

        Returns:
            Class ids ``[*S]``, u8 or from 257 classes on u16, or regions ``u8[*S, K]``;
            and ``f32[*S]`` with 0 where nothing is annotated, None if nothing can be.
        """
        void = places == len(self.ids) if self.ignore >= 0 else None
        if self.regions:
            planes = np.asarray([np.isin(self.ids, ids) for ids in self.regions])
            # Where nothing is annotated there is no region.
            planes = np.pad(planes, ((0, 0), (0, 1))).astype(np.uint8)
            label = np.stack([plane[places] for plane in planes], -1)
        else:
            label = places if void is None else np.where(void, np.uint16(0), places)
            label = label.astype(np.uint8 if len(self.ids) <= 256 else np.uint16)
        return label, None if void is None else (~void).astype(np.float32)

    def _unknown(self, value: int, name: str) -> InputError:
        known = ", ".join(map(str, self.ids[:20]))
        known += ", ..." if len(self.ids) > 20 else ""
        ignored = f" and {self.ignore} for what to ignore" if self.ignore >= 0 else ""
        return InputError(
            f"{name} has the value {value}, but dataset.json names the labels {known}"
            f"{ignored}: mend the file, or add the label to dataset.json."
        )


def read_content(path: Path) -> dict[str, Any]:
    """The JSON, which must be an object.

    Raises:
        InputError: none, or what `trust.read_json` finds wrong.
    """
    content = trust.read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no object with `labels`: write it anew.")
    return content


def read_channels(content: dict[str, Any], path: Path) -> tuple[str, ...]:
    """The names of the channels, ``channel_names`` or ``modality``, in their order.

    Raises:
        InputError: none of them, or keys that are not 0, 1, 2 ...
    """
    names = content.get("channel_names", content.get("modality"))
    if isinstance(names, list):
        names = {str(k): name for k, name in enumerate(names)}
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"{path} names no channels: write such as "
            '"channel_names": {"0": "CT"}, or "modality" of the same form.'
        )
    wanted = {str(k) for k in range(len(names))}
    if names.keys() != wanted or not all(isinstance(n, str) for n in names.values()):
        raise InputError(
            f"{path} has channel names that are not numbered from 0 on: write such as "
            '{"0": "T1", "1": "T2"}.'
        )
    return tuple(names[str(k)] for k in range(len(names)))


def read_labels(content: dict[str, Any], regions: bool | None, path: Path) -> Labels:
    """What ``labels`` says.

    Args:
        content: of the file.
        regions: whether labels may overlap; None: if one is a list of several ids.
        path: the file, for messages.

    Raises:
        InputError: not of the form of one of the conventions, an id or a name twice,
            or nothing but background.
    """
    named = _named(content.get("labels"), path)
    ignore, *more = named.pop("ignore", (-1,))
    several = any(len(ids) > 1 for ids in named.values())
    background = next((n for n, ids in named.items() if ids == (0,)), "background")
    named.pop(background, None)
    every = sorted({0, *(i for ids in named.values() for i in ids)})
    if not named or more or ignore in every:
        raise InputError(
            f"{path} has no label beside the background, or an `ignore` that is not "
            "one number of its own: mend `labels`."
        )
    if several if regions is None else regions:
        return Labels(tuple(named), tuple(every), tuple(named.values()), ignore)
    of_id = {0: background}
    for name, ids in named.items():
        if len(ids) == 1:
            if ids[0] in of_id:
                raise InputError(
                    f"{path} calls the label {ids[0]} both {of_id[ids[0]]!r} and "
                    f"{name!r}: give each its own number."
                )
            of_id[ids[0]] = name
    names = tuple(of_id.get(i, f"class_{i}") for i in every)
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two labels of one name: rename one of them.")
    return Labels(names, tuple(every), (), ignore)


def _named(labels: Any, path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> ids."""
    if not isinstance(labels, dict):
        labels = {}
    pairs: Iterable[tuple[Any, Any]] = labels.items()
    if all(key.isascii() and key.isdecimal() for key in labels):
        pairs = [(name, int(key[:9])) for key, name in labels.items()]
    named: dict[str, tuple[int, ...]] = {}
    for name, ids in pairs:
        ids = tuple(ids) if isinstance(ids, list) else (ids,)
        if not isinstance(name, str) or not name or name in named:
            raise InputError(
                f"{path} has the label name {name!r:.60}, which is none or there "
                "twice: give each label a name of its own."
            )
        if not ids or not all(type(i) is int and 0 <= i <= MOST for i in ids):
            raise InputError(
                f"{path} gives the label {name!r:.60} the number {ids!r:.60}: use whole"
                f" numbers from 0 to {MOST}."
            )
        named[name] = ids
    if not named:
        raise InputError(
            f"{path} has no `labels`: write such as "
            '"labels": {"background": 0, "liver": 1}.'
        )
    return named


def find_cases(
    content: dict[str, Any], path: Path, channels: int, faults: Faults
) -> list[Case]:
    """The training cases, sorted by name.

    Args:
        content: of the file.
        path: the file; names are relative to its folder.
        channels: how many there are.
        faults: takes what is wrong with a case.

    Raises:
        InputError: no cases, or a list or folder that is not there.
    """
    listed, training = content.get("dataset"), content.get("training")
    if isinstance(listed, dict) and listed:
        rows = [(f"{path}: dataset[{k!r:.60}]", row) for k, row in listed.items()]
        cases = _listed(rows, "images", path, channels, faults)
    elif isinstance(training, list) and training:
        rows = [(f"{path}: training[{k}]", row) for k, row in enumerate(training)]
        cases = _listed(rows, "image", path, channels, faults)
    else:
        cases = _in_folders(content.get("file_ending"), path, channels, faults)
    answer: dict[str, Case] = {}
    for case in sorted(cases):
        if case.name in answer:
            faults.add(
                InputError(f"{path} has the case {case.name} twice: remove one.")
            )
        answer.setdefault(case.name, case)
    if not answer:
        faults.report(0)
        raise InputError(
            f"{path} has no training cases: list them in `training`, or put them in "
            "imagesTr and labelsTr and name their `file_ending`."
        )
    return list(answer.values())


def _listed(
    rows: Sequence[tuple[str, Any]],
    key: str,
    path: Path,
    channels: int,
    faults: Faults,
) -> list[Case]:
    cases = []
    for where, row in rows:
        try:
            images, label = (
                (row.get(key), row.get("label"))
                if isinstance(row, dict)
                else (None, None)
            )
            images = images if isinstance(images, list) and images else [images]
            places = [trust.named(path.parent, image, where) for image in images]
            for place in places:
                _ending(place)
            if len(places) == 1 and not os.path.isfile(places[0]):
                places = _numbered(places[0], channels) or places
            _check_count(where, places, channels)
            mask = trust.named(path.parent, label, where)
            cases.append(Case(_stem(mask.name, _ending(mask)), tuple(places), mask))
        except InputError as error:
            faults.add(error)
    return cases


def _in_folders(ending: Any, path: Path, channels: int, faults: Faults) -> list[Case]:
    if ending not in SUFFIXES:
        raise InputError(
            f"{path} has file_ending={ending!r:.60} and no list of files: name the "
            f"ending of those in imagesTr, one of {', '.join(SUFFIXES)}."
        )
    images, labels = path.parent / "imagesTr", path.parent / "labelsTr"
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"{folder} does not exist: put the training files there.")
    files: dict[str, list[tuple[int, Path]]] = {}
    for place in sorted(images.iterdir()):
        match = re.fullmatch(rf"([^.].*)_(\d{{4}}){re.escape(ending)}", place.name)
        if match:
            files.setdefault(match[1], []).append((int(match[2]), place))
    if not files:
        raise InputError(
            f"{images} holds no files such as CASE_0000{ending}, the four digits being "
            "the number of the channel: rename them."
        )
    cases = []
    for name, numbered in files.items():
        mask = labels / f"{name}{ending}"
        try:
            if [k for k, _ in numbered] != list(range(len(numbered))):
                raise InputError(
                    f"{numbered[-1][1]} has no other channel before it: the channels "
                    "of a case are numbered from 0000 on without a gap."
                )
            places = [place for _, place in numbered]
            _check_count(str(places[0]), places, channels)
            if not mask.is_file():
                raise InputError(
                    f"{places[0]} has no label {mask}: add it, or move the image to "
                    "imagesTs."
                )
            cases.append(Case(name, tuple(places), mask))
        except InputError as error:
            faults.add(error)
    return cases


def _numbered(place: Path, channels: int) -> list[Path]:
    """CASE_0000.nii.gz and so on for CASE.nii.gz, as nnU-Net 1 lists its files."""
    ending = _ending(place)
    stem = _stem(place.name, ending)
    files = (place.with_name(f"{stem}_{k:04}{ending}") for k in range(channels))
    return [file for file in files if os.path.isfile(file)]


def _check_count(where: str, places: Sequence[Path], channels: int) -> None:
    if len(places) not in (1, channels):
        raise InputError(
            f"{where} has {len(places)} files, but dataset.json names {channels} "
            "channels: give one file for each, or one of all."
        )


def _ending(place: Path) -> str:
    for suffix in SUFFIXES:
        if place.name.lower().endswith(suffix):
            return place.name[-len(suffix) :]
    raise InputError(
        f"{place} is of no format that can be read: convert it to one of "
        f"{', '.join(SUFFIXES)}."
    )


def _stem(name: str, ending: str) -> str:
    return name[: -len(ending)]
