"""Files that hold a volume or a stack: multi-page TIFF, NIfTI and 3-D npy.

Axes are those of the stored array. A TIFF stack has (pages, rows, columns), a NIfTI
volume (x, y, z) as nibabel gives it; both are (D, H, W) here. Nothing is turned to a
common orientation, so that a prediction lies on the voxels of its image.
"""

import dataclasses
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unet_jax.data import formats, images, tiff, trust
from unet_jax.types import InputError, NumpyArray, Shape

SUFFIXES = (".tif", ".tiff", ".nii", ".nii.gz", ".npy")
NIFTI = (".nii", ".nii.gz")
INFLATES = 1032  # bytes that deflate makes of one at most
MOST_BEFORE = 2**26  # bytes before the voxels: headers that others put there


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where the voxels of a NIfTI volume lie.

    ``spacing``: voxel size along (D, H, W), in the file's unit (mostly millimetres).
    ``affine``: ``f64[4, 4]`` from voxel numbers to positions.
    ``header``: nibabel's header of the image.
    """

    spacing: tuple[float, ...]
    affine: NumpyArray
    header: Any


def read_volume(
    path: str | Path, *, page: int | None = None, channels: int = 0
) -> tuple[NumpyArray, Geometry | None]:
    """Reads one stack or volume, or one page of it.

    Args:
        path: a .tif, .tiff, .nii, .nii.gz or .npy file.
        page: an index of the first axis; None: all.
        channels: 0 for those of the file, else see `images.to_channels`.

    Returns:
        ``([D, H, W, C], geometry)``, or ``[H, W, C]`` with ``page``: u8 or u16 as
        stored, any other number type as f32. NIfTI is f32 always: its numbers have no
        common unit, and among the files of one data set some are scaled and some are
        not. D is 1 for a single image. The geometry is None unless NIfTI.

    Raises:
        InputError: missing, damaged or cut short, not a stack, NaN or infinite voxels.
    """
    path, name = Path(path), str(path)
    array, palette, geometry = _load(path, page)
    if palette is not None:
        array = palette[array[..., 0]]
    if geometry is not None and array.dtype.kind in "biuf":
        with np.errstate(over="ignore", invalid="ignore"):  # `stored` tells of infinity
            array = array.astype(np.float32)
    image = images.stored(array, name)
    return images.to_channels(image, channels, name=name), geometry


def read_mask(path: str | Path, *, page: int | None = None) -> NumpyArray:
    """Reads one mask volume, or one page of it, as numbers.

    Args:
        path, page: as for `read_volume`.

    Returns:
        ``[D, H, W]`` whole numbers as stored, or ``[D, H, W, 3]`` colours; without D
        with ``page``.

    Raises:
        InputError: as `read_volume`, or numbers that are not whole.
    """
    array, _, _ = _load(Path(path), page)
    return images.as_mask(array, str(path))


def volume_size(path: str | Path) -> tuple[Shape, Geometry | None]:
    """((D, H, W), geometry) of what `read_volume` returns, from the file's header.

    Raises:
        InputError: missing, damaged or not a stack.
    """
    path, name = Path(path), str(path)
    with formats.readable(name):
        if path.name.lower().endswith(NIFTI):
            nifti, geometry = _open_nifti(path)
            return _four(nifti.shape)[:3], geometry
        if path.suffix.lower() == ".npy":
            return _npy_shape(formats.npy_header(path)[0], name)[:3], None
        return _stack_order(*tiff.header(path), name)[0][:3], None


def write_volume(
    path: str | Path, label: NumpyArray, geometry: Geometry | None = None
) -> None:
    """Writes the class ids of a volume.

    Args:
        path: .nii or .nii.gz, or what `images.write_label` writes.
        label: ``[D, H, W]`` whole numbers from 0 to 65535, u8 when all are below 256.
        geometry: of the image; a NIfTI label takes its affine, header and orientation.

    Raises:
        InputError: the file cannot be written, or its ending is another one.
    """
    path, label = Path(path), np.asarray(label)
    if not path.name.lower().endswith(NIFTI):
        images.write_label(path, label)
        return
    nibabel = _nibabel(str(path))
    label = images.as_ids(label, str(path))
    if geometry is None:
        nifti = nibabel.Nifti1Image(label, np.eye(4))
    else:
        header = geometry.header.copy()
        header.set_data_dtype(label.dtype)
        header.set_slope_inter(1, 0)
        # The image's display range would show every class as black.
        header["cal_min"], header["cal_max"] = 0, 0
        second = isinstance(header, nibabel.Nifti2Header)
        kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
        nifti = kind(label, geometry.affine, header)
    with formats.writable(str(path)):
        nibabel.save(nifti, path)


def resampled_shape(
    shape: Shape, from_spacing: Sequence[float], to_spacing: Sequence[float]
) -> Shape:
    """The spatial shape that covers the same extent with voxels of another size."""
    triples = zip(shape, from_spacing, to_spacing, strict=True)
    return tuple(max(1, round(n * old / new)) for n, old, new in triples)


def shape_at(
    path: Path,
    shape: Shape,
    geometry: Geometry | None,
    spacing: Sequence[float],
    *,
    option: str,
) -> Shape:
    """The shape of a file's volume when it is resampled to a voxel size.

    Args:
        path: the file, for messages.
        shape: of it, (D, H, W).
        geometry: of it.
        spacing: the voxel size asked for.
        option: the name of that, for messages.

    Raises:
        InputError: the file does not say its voxel size, or the result is more than
            this machine can hold.
    """
    if geometry is None or not all(0 < size < math.inf for size in geometry.spacing):
        raise InputError(
            f"{path} does not say its voxel size, which the option {option} needs: "
            f"leave {option} out, or save the volume as NIfTI."
        )
    found = resampled_shape(shape, geometry.spacing, spacing)
    trust.check_bytes(found, 4, f"{path}, resampled by {option} = {tuple(spacing)},")
    return found


def resample(
    array: NumpyArray,
    from_spacing: Sequence[float],
    to_spacing: Sequence[float],
    *,
    order: int,
) -> NumpyArray:
    """Resamples to another voxel size.

    Args:
        array: ``[*S]`` or ``[*S, C]``, any real dtype.
        from_spacing, to_spacing: the size of a voxel along each spatial axis, > 0.
        order: 1 linear (images), 0 nearest (labels).

    Returns:
        ``[*S']`` or ``[*S', C]`` of the same dtype, ``S' = resampled_shape(S, ...)``.
        `resample_to` with S is the way back for a label.
    """
    shape = array.shape[: len(to_spacing)]
    return resample_to(
        array, resampled_shape(shape, from_spacing, to_spacing), order=order
    )


def resample_to(array: NumpyArray, shape: Shape, *, order: int = 0) -> NumpyArray:
    """Resamples to another number of voxels over the same extent.

    The outer faces of the first and last voxel stay where they are, so there is no
    shift, and going there and back with `order` 0 loses only what is too fine.

    Args:
        array: ``[*S]`` or ``[*S, C]``, any real dtype.
        shape: the new spatial shape.
        order: 1 linear, 0 nearest.

    Returns:
        ``[*shape]`` or ``[*shape, C]`` of the same dtype; whole numbers are rounded.
    """
    dtype = array.dtype
    for axis, new in enumerate(shape):
        old = array.shape[axis]
        if old == new:
            continue
        centre = (np.arange(new) + 0.5) * old / new
        if order == 0:
            index = np.minimum(centre.astype(np.int64), old - 1)
            array = np.take(array, index, axis=axis)
            continue
        place = np.clip(centre - 0.5, 0, old - 1)
        low = place.astype(np.int64)
        part = (place - low).astype(np.float32)
        part = part.reshape(-1, *(1,) * (array.ndim - axis - 1))
        below = np.take(array, low, axis=axis).astype(np.float32)
        above = np.take(array, np.minimum(low + 1, old - 1), axis=axis)
        array = below + (above.astype(np.float32) - below) * part
    if array.dtype != dtype and dtype.kind in "iu":
        array = np.rint(array)
    return array.astype(dtype, copy=False)


def _load(
    path: Path, page: int | None
) -> tuple[NumpyArray, NumpyArray | None, Geometry | None]:
    """([D, H, W, C] or [H, W, C] as stored, palette, geometry)."""
    name = str(path)
    with formats.readable(name):
        if path.name.lower().endswith(NIFTI):
            nifti, geometry = _open_nifti(path)
            shape = _four(nifti.shape)
            if page is None:
                return np.asanyarray(nifti.dataobj).reshape(shape), None, geometry
            return np.asanyarray(nifti.dataobj[page]).reshape(shape[1:]), None, geometry
        if path.suffix.lower() == ".npy":
            shape = _npy_shape(formats.npy_header(path)[0], name)
            array = formats.load_npy(path, page)
            return array.reshape(shape if page is None else shape[1:]), None, None
        stack = tiff.load(path, page)
        array, axes, palette = stack.without_alpha(), stack.axes, stack.palette
        shape, order = _stack_order(array.shape, axes, name)
        array = array.transpose(order).reshape(shape)
        if page is not None:
            # The reader may already have picked the page.
            array = array[page if len(array) > 1 else 0]
        return array, palette, None


def _stack_order(
    shape: Shape, axes: str, name: str
) -> tuple[tuple[int, int, int, int], tuple[int, ...]]:
    """((D, H, W, C), order of axes that leads there) of a TIFF series.

    Some programs call the pages of a plain stack channels: without other pages they are
    taken for D.
    """
    if "C" in axes and all(shape[axes.index(a)] == 1 for a in axes if a not in "YXSC"):
        axes = axes.replace("C", "Q")
    long = [i for i, n in enumerate(shape) if axes[i] not in "YXSC" and n > 1]
    if len(long) > 1:
        raise InputError(
            f"{name} has {' x '.join(str(shape[i]) for i in long)} pages (axes "
            f"{axes}): save one stack a file."
        )
    order = sorted(range(len(axes)), key=lambda i: "YXCS".find(axes[i]))
    length = dict(zip(axes, shape, strict=True))
    depth = shape[long[0]] if long else 1
    channels = length.get("C", 1) * length.get("S", 1)
    return (depth, length["Y"], length["X"], channels), tuple(order)


def _npy_shape(shape: Shape, name: str) -> Shape:
    if len(shape) not in (3, 4) or 0 in shape:
        raise InputError(
            f"{name} holds an array of the shape {shape}: a volume is depth x height x "
            "width, or depth x height x width x channels."
        )
    return shape if len(shape) == 4 else (*shape, 1)


def _four(shape: Shape) -> Shape:
    """A NIfTI shape as (D, H, W, C)."""
    three = (*shape, 1, 1)[:3]
    return (*three, int(np.prod(shape[3:])))


def _open_nifti(path: Path) -> tuple[Any, Geometry]:
    """The image in nibabel's hands, and its geometry.

    Raises:
        InputError: not NIfTI, or more voxels than the file or the memory can hold.
    """
    nibabel, name = _nibabel(str(path)), str(path)
    size = formats.file_size(path)
    second = _check_nifti(path, name)
    nifti = (nibabel.Nifti2Image if second else nibabel.Nifti1Image).from_filename(path)
    shape, dtype = nifti.shape, nifti.get_data_dtype()
    # Scaled voxels are made of eight bytes.
    trust.check_bytes(_four(shape), max(dtype.itemsize, 8), name)
    need = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if not need or need > size * (INFLATES if name.lower().endswith(".gz") else 1):
        raise InputError(
            f"{name} cannot be read ({need} bytes of voxels in a file of {size}): it "
            "may be damaged or cut short, so copy or save it anew, or leave it out."
        )
    zooms = tuple(float(z) for z in (*nifti.header.get_zooms(), 1.0, 1.0)[:3])
    return nifti, Geometry(zooms, nifti.affine, nifti.header)


def _check_nifti(path: Path, name: str) -> bool:
    """Whether a file is NIfTI-2, after reading what lies before its voxels.

    nibabel believes the lengths of header extensions, and inflates a file up to where
    its voxels are said to begin, however far that is.
    """
    import gzip

    compressed = name.lower().endswith(".gz")
    with gzip.open(path) if compressed else path.open("rb") as file:
        head = file.read(544)
        for order in "<>":
            (length,) = struct.unpack(order + "I", head[:4].ljust(4, b"\0"))
            magic = head[344:347] if length == 348 else head[4:7]
            if (length, magic[:1], magic[2:]) in ((348, b"n", b"1"), (540, b"n", b"2")):
                break
        else:
            raise InputError(f"{name} cannot be read (not a NIfTI file): leave it out.")
        at, letter = (108, "f") if length == 348 else (168, "q")
        (begin,) = struct.unpack_from(order + letter, head, at)
        # Not-a-number is no number of bytes either.
        if not 0 <= begin <= MOST_BEFORE:
            raise InputError(
                f"{name} cannot be read (its voxels begin at byte {begin:g}): it may "
                "be damaged, so copy or save it anew, or leave it out."
            )
        file.seek(length)
        more = file.read(4)
        place = length + 4
        extended = more[:1] not in (b"", b"\0")
        while extended and (place + 16 <= begin or place > begin):
            (extent,) = struct.unpack(order + "i", file.read(8)[:4])
            if not 8 <= extent <= begin - place:
                raise InputError(
                    f"{name} cannot be read (a header extension of {extent} bytes): it "
                    "may be damaged, so copy or save it anew, or leave it out."
                )
            place += extent
            file.seek(place)
    return length == 540


def _nibabel(name: str) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise InputError(
            f"{name} needs the package nibabel: pip install nibabel."
        ) from error
    formats.silence("nibabel.global")
    return nibabel
