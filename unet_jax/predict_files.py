"""Predicting files: which inputs there are, what is written for each, and how.

For an image ``a.png`` the label is ``a.png`` in the output folder, for a TIFF or npy
stack ``a.tif`` with as many pages, for a NIfTI volume ``a.nii.gz`` (or ``.nii``) with
the same affine and header; always of the size of the input. Values:

    several classes     class ids: u8, or u16 beyond 256 classes
    two classes         0 and 255, because 1 beside 0 looks black; 0 and 1 in NIfTI
    one label           0 and 255 likewise; 0 and 1 in NIfTI
    several labels      a file ``a_NAME`` for each label, as for one label
    ``instances``       instead of all these the numbers of objects, 0 for none: u16,
                        or u32 beyond 65535, then a .tif of what would be a .png
    ``probabilities``   ``a_probability.npy``, f32 ``[*S, K]``
    ``overlay``         ``a_overlay.png``, of a stack or volume ``a_overlay.tif``

Post-processing works on what is written: a page of a stack by itself, a volume as a
whole in its own voxels.
"""

import dataclasses
import glob
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unet_jax import overlay as overlays
from unet_jax import postprocess as post
from unet_jax.data import formats, images, stacks
from unet_jax.pictures import class_colours
from unet_jax.predict import Prediction, Predictor
from unet_jax.types import InputError, NumpyArray

_LOG = logging.getLogger("unet_jax")

SUFFIXES = tuple(dict.fromkeys(images.SUFFIXES + stacks.SUFFIXES))


@dataclasses.dataclass(frozen=True)
class Job:
    """One input file and the files that will be written for it.

    ``kind``: ``image`` (2-D), ``pages`` (a stack, page by page) or ``volume`` (3-D).
    ``labels``: one file, or one for each of several labels.
    """

    path: Path
    kind: Literal["image", "pages", "volume"]
    labels: tuple[Path, ...]
    probability: Path | None
    overlay: Path | None

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.labels, *(p for p in (self.probability, self.overlay) if p))


def predict_files(
    predictor: Predictor,
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    probabilities: bool = False,
    overlay: bool = False,
    postprocess: str = "",
    instances: str | None = None,
    done: Callable[[Job], None] | None = None,
) -> list[Job]:
    """Predicts files and writes what comes out; see the module for names and values.

    Args:
        predictor: The net.
        inputs: Files, folders (the images directly in them) and globs. A 2-D net takes
            png, jpg, tif, npy, bmp and gif images, and stacks and NIfTI volumes slice
            by slice along their first array axis; a 3-D net takes TIFF stacks, 3-D npy
            and NIfTI. Where the run resampled to a voxel size, so is the volume, and
            the label goes back to the volume's own grid.
        out: The folder to write to; made where it is not there.
        probabilities: Write them as well.
        overlay: Write a picture of the label, or of the objects, on the image as well.
        postprocess: What is done to a label, such as ``"largest,fill,small=30"``
            (`unet_jax.postprocess`).
        instances: Write the numbers of objects instead, found by this method:
            ``components``, ``watershed`` or ``distance``.
        done: Called after each input.

    Returns:
        What was written for which input.

    Raises:
        InputError: No such input, one that cannot be read or does not fit the net, a
            disk that cannot be written, an output that would overwrite an input or
            another output, or post-processing that is not known. Names are settled
            before the first file is written.
    """
    out, meta = Path(out), predictor.meta
    process = post.build(
        task=meta.task,
        label_names=meta.label_names,
        steps=postprocess,
        instances=instances,
    )
    jobs = [
        _plan(predictor, path, out, probabilities=probabilities, overlay=overlay)
        for path in find_inputs(inputs)
    ]
    _check_outputs(jobs)
    with formats.writable(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    written = []
    for job in jobs:
        written.append(_predict(predictor, job, process, instances))
        if done is not None:
            done(written[-1])
    return written


def find_inputs(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that files, folders and globs stand for, each once.

    Raises:
        InputError: Nothing there, or no file of a known format.
    """
    known = ", ".join(s.removeprefix(".") for s in SUFFIXES)
    found: dict[Path, Path] = {}
    for given in [os.fspath(name) for name in inputs]:
        path = Path(given).expanduser()
        # Unlike pathlib's, these do not fail on a name that no file can have.
        if os.path.isdir(path):
            paths = [p for p in sorted(path.iterdir()) if _is_image(p)]
        elif os.path.exists(path) or not glob.has_magic(given):
            if not os.path.exists(path):
                raise InputError(f"{given} does not exist: check the path.")
            if not _is_image(path):
                raise InputError(f"{given} is no image: use one of {known}.")
            paths = [path]
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            paths = [Path(p) for p in matches if _is_image(Path(p))]
        if not paths:
            raise InputError(
                f"{given} holds no image: give files ({known}), a folder that has them"
                " directly in it, or a glob such as 'images/*/*.png'."
            )
        for p in paths:
            found.setdefault(p.resolve(), p)
    return list(found.values())


def _is_image(path: Path) -> bool:
    name = path.name.lower()
    return path.is_file() and name.endswith(SUFFIXES) and not name.startswith(".")


def _plan(
    predictor: Predictor, path: Path, out: Path, *, probabilities: bool, overlay: bool
) -> Job:
    meta = predictor.meta
    kind = _kind(path, meta.rank, meta.channels)
    stem, suffix = path.stem, ".png" if kind == "image" else ".tif"
    for ending in stacks.NIFTI:
        if path.name.lower().endswith(ending):
            stem, suffix = path.name[: -len(ending)], ending
    names = [stem]
    if meta.task == "labels" and len(meta.label_names) > 1:
        plain = [re.sub(r"[^\w-]+", "_", name) for name in meta.label_names]
        names = [f"{stem}_{name}" for name in plain]
    picture = "png" if kind == "image" else "tif"
    return Job(
        path=path,
        kind=kind,
        labels=tuple(out / (name + suffix) for name in names),
        probability=out / f"{stem}_probability.npy" if probabilities else None,
        overlay=out / f"{stem}_overlay.{picture}" if overlay else None,
    )


def _kind(path: Path, rank: int, channels: int) -> Literal["image", "pages", "volume"]:
    """How a net of this rank reads the file, by its header."""
    name = path.name.lower()
    if rank == 3:
        if not name.endswith(stacks.SUFFIXES):
            raise InputError(
                f"{path} is a 2-D image and this net takes volumes: give a TIFF stack,"
                " a NIfTI volume or a 3-D npy array."
            )
        return "volume"
    if name.endswith(stacks.NIFTI):
        return "pages"
    if name.endswith(".npy"):
        with formats.readable(str(path)):
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        image = len(shape) < 3 or (
            len(shape) == 3 and shape[-1] in (*range(5), channels)
        )
        return "image" if image else "pages"
    if name.endswith((".tif", ".tiff")):
        return "pages" if stacks.volume_size(path)[0][0] > 1 else "image"
    return "image"


def _check_outputs(jobs: Sequence[Job]) -> None:
    read = {job.path.resolve(): job.path for job in jobs}
    written: dict[Path, Path] = {}
    for job in jobs:
        for path in map(Path.resolve, job.outputs):
            if path in read:
                raise InputError(
                    f"the prediction of {job.path} would overwrite the input"
                    f" {read[path]}: choose another --out folder."
                )
            if path in written:
                raise InputError(
                    f"{written[path]} and {job.path} would both be written to {path}:"
                    " predict them into two --out folders."
                )
            written[path] = job.path


# --- One file ------------------------------------------------------------------------


Process = Callable[[Prediction], NumpyArray]


def _predict(
    predictor: Predictor, job: Job, process: Process, instances: str | None
) -> Job:
    """Predicts one file and writes what comes out; returns what was written."""
    needed = job.probability is not None or instances == "watershed"
    name, geometry = str(job.path), None
    if job.kind == "image":
        image = images.read_image(job.path)
        prediction = predictor(image, name=name, probabilities=needed)
        label = process(prediction)
    else:
        image, geometry = stacks.read_volume(job.path)
        if job.kind == "volume":
            prediction = _volume(predictor, image, geometry, name, needed)
            label = process(prediction)
        else:
            prediction, label = _pages(predictor, image, name, needed, process)
    task, names = predictor.meta.task, predictor.meta.label_names
    several = task == "labels" and len(names) > 1
    planes = list(np.moveaxis(label, -1, 0)) if several else [label]
    if instances is not None:
        pairs = zip(job.labels, planes, strict=True)
        paths = [_write_objects(path, plane, geometry) for path, plane in pairs]
        job = dataclasses.replace(job, labels=tuple(paths))
    else:
        two = task == "labels" or len(names) == 2
        white = 255 if geometry is None and two else 1
        for path, plane in zip(job.labels, planes, strict=True):
            stacks.write_volume(path, plane * plane.dtype.type(white), geometry)
    if job.probability is not None:
        with formats.writable(str(job.probability)):
            np.save(job.probability, np.asarray(prediction.probability))
    if job.overlay is not None:
        if instances is not None and not several:
            picture = _picture_of_objects(image, label)
        else:
            shown = (label > 0).astype(np.uint8) if several else label
            picture = overlays.draw(image, shown, task=task, label_names=names)
        overlays.write(job.overlay, picture)
    return job


def _write_objects(path: Path, objects: NumpyArray, geometry: Any) -> Path:
    """Writes the numbers of objects, and where."""
    ids = post.as_ids(objects)
    if geometry is not None:  # in the smallest type that holds them
        stacks.write_volume(path, ids, geometry)
        return path
    if ids.dtype == np.uint32:
        path = path.with_suffix(".tif")
        _LOG.warning("%s has %d objects, and so 32 bits a pixel.", path, ids.max())
    with formats.writable(str(path)):
        if path.suffix == ".png":
            from PIL import Image

            Image.fromarray(ids).save(path)
        else:
            import tifffile

            tifffile.imwrite(path, ids, photometric="minisblack", compression="zlib")
    return path


def _picture_of_objects(image: NumpyArray, objects: NumpyArray) -> NumpyArray:
    """The image with each object as tint and outline, in seven colours by turns."""
    names = ("background", *"1234567")
    shown = np.where(objects > 0, (objects - 1) % 7 + 1, 0)
    picture = overlays.draw(image, shown, task="classes", label_names=names)
    # Also between two objects whose colour happens to be the same.
    edge = np.zeros(objects.shape, bool)
    for axis in (-1, -2):
        differs = np.moveaxis(np.diff(objects, axis=axis) != 0, axis, 0)
        along = np.moveaxis(edge, axis, 0)
        along[:-1] |= differs
        along[1:] |= differs
    edge &= objects > 0
    picture[edge] = class_colours(names)[shown[edge]]
    return picture


def _pages(
    predictor: Predictor,
    image: NumpyArray,
    name: str,
    needed: bool,
    process: Process,
) -> tuple[Prediction, NumpyArray]:
    """A stack by a 2-D net, page by page: its prediction and what is made of it."""
    pages = [
        predictor(page, name=f"{name}, page {i}", probabilities=needed)
        for i, page in enumerate(image)
    ]
    label = np.stack([process(page) for page in pages])
    maps = [page.probability for page in pages if page.probability is not None]
    whole = np.stack([page.label for page in pages])
    return Prediction(whole, np.stack(maps) if maps else None), label


def _volume(
    predictor: Predictor, image: NumpyArray, geometry: Any, name: str, needed: bool
) -> Prediction:
    """A volume by a 3-D net, in the voxel size that the run was trained on."""
    spacing, shape = predictor.meta.spacing, image.shape[:3]
    if not spacing:
        return predictor(image, name=name, probabilities=needed)
    if geometry is None or min(geometry.spacing) <= 0:
        raise InputError(
            f"{name} does not say its voxel size, and this run resamples volumes to"
            f" {tuple(spacing)}: save the volume as NIfTI."
        )
    # Channels before the grid, as in training, because both round whole numbers.
    image = images.to_channels(image, predictor.meta.channels, name=name)
    image = stacks.resample(image, geometry.spacing, spacing, order=1)
    label, probability = predictor(image, name=name, probabilities=needed)
    # Both by the nearest voxel, so that the label stays what the probabilities say.
    label = stacks.resample_to(label, shape, order=0)
    if probability is not None:
        probability = stacks.resample_to(probability, shape, order=0)
    return Prediction(label, probability)
