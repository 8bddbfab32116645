"""From stored pixels to what the net sees: the first operation of every compiled step.

A run's normalisation is JSON-able and stored in its checkpoint: ``{"kind": ...,
"dtype": ..., "shift": (...), "scale": (...)}``, a number a channel, applied as
``(x - shift) * scale`` to pixels of that dtype.

Kinds:
    ``range``     integers by the range of their type, so that white is 1; floats as is
    ``standard``  zero mean and unit deviation over the training split
    ``example``   each image or volume by its own mean and deviation, when it is loaded
                  (for MR intensities without a unit, or brightness that means nothing)
    ``auto``      ``range`` for 8 bits, whose white is known, else ``standard``: 12 bits
                  of a camera fill 6 % of 16, and floats have any unit

A net from elsewhere (`stated`) was not trained on pixels of one dtype: instead of it
there is ``"unit": "range"``, and shift and scale apply to pixels that the range of
their own type has brought to 0..1 (floats as is).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

from unet_jax.types import Array, InputError, NumpyArray, choose

KINDS = ("auto", "range", "standard", "example")
Stats = Mapping[str, Any]
MEASURED = 2000  # images of which the mean and the deviation are taken, at most


def measure(kind: str, images: Iterable[NumpyArray]) -> dict[str, Any]:
    """The statistics of a data set.

    Args:
        kind: One of `KINDS`.
        images: The training images ``[*S, C]``; ``range`` and ``example`` read the
            first one only.

    Returns:
        ``{"kind", "dtype", "shift", "scale"}``, JSON-able; ``kind`` is what ``auto``
        stands for, ``dtype`` the name of the images' type as stored.

    Raises:
        InputError: An unknown kind.
    """
    choose(KINDS, kind, "data.normalisation =")
    images = iter(images)
    first = next(images, None)
    if first is None:
        raise InputError(
            "no image of the training data has a pixel that counts, so that there is"
            " nothing to learn: look at the masks with unet-jax inspect."
        )
    channels, dtype = first.shape[-1], first.dtype.name
    if kind == "auto":
        kind = "range" if first.dtype == np.uint8 else "standard"
    if kind != "standard":
        whole = kind == "range" and np.issubdtype(first.dtype, np.integer)
        scale = 1.0 / float(np.iinfo(first.dtype).max) if whole else 1.0
        return {
            "kind": kind,
            "dtype": dtype,
            "shift": (0.0,) * channels,
            "scale": (scale,) * channels,
        }
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for image in (first, *images):
        flat = image.reshape(-1, channels).astype(np.float64)
        count += len(flat)
        total += flat.sum(0)
        squares += (flat**2).sum(0)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return {
        "kind": kind,
        "dtype": dtype,
        "shift": tuple(float(m) for m in mean),
        "scale": tuple(float(1 / d) for d in deviation),
    }


def spread(source: Any) -> Iterator[NumpyArray]:
    """Images of a data set for `measure`, of a large one `MEASURED`, evenly spread.

    Args:
        source: Examples with ``image`` and ``weight``; those of which nothing counts
            are left out. Four are read at a time.
    """
    count = min(len(source), MEASURED)
    numbers = np.linspace(0, len(source) - 1, count).astype(int).tolist()
    with ThreadPoolExecutor(4) as pool:
        for begin in range(0, count, 4):
            for example in pool.map(source.__getitem__, numbers[begin : begin + 4]):
                if example["weight"].any():
                    yield example["image"]


def stated(
    kind: str | None,
    channels: int,
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> dict[str, Any]:
    """The normalisation of a net whose training data are not at hand.

    Args:
        kind: One of `KINDS` but ``auto``; None for ``range``, or ``standard`` if there
            is a mean.
        channels: Of the image.
        mean: Of pixels in 0..1, a number for each channel or one for all.
        std: Their deviation, likewise.

    Returns:
        ``{"kind", "unit", "shift", "scale"}``, for pixels of any type.

    Raises:
        InputError: An unknown kind, a mean without a deviation, one that does not go
            with the kind, or another number of numbers.
    """
    if kind is not None:
        choose(KINDS[1:], kind, "--normalisation =")
    if bool(mean) != bool(std):
        raise InputError("--mean and --std go together: give both, or neither.")
    if mean and kind == "example":
        raise InputError(
            "--mean and --std do not go with --normalisation=example, which takes each"
            " image's own: leave them out, or use standard."
        )
    if kind == "standard" and not mean:
        raise InputError(
            "--normalisation=standard needs the mean and the deviation that the net was"
            " trained with: give --mean and --std, in 0..1 for white = 1."
        )
    for name, values in (("mean", mean), ("std", std)):
        if values and len(values) not in (1, channels):
            raise InputError(
                f"--{name} has {len(values)} numbers and the image {channels}"
                " channel(s): give one for each, or one for all."
            )
    if std and min(std) <= 0:
        raise InputError(f"--std = {tuple(std)} must be above 0.")
    shift = tuple(mean) * (channels if len(mean) == 1 else 1) or (0.0,) * channels
    spread = tuple(std) * (channels if len(std) == 1 else 1) or (1.0,) * channels
    return {
        "kind": "standard" if mean else kind or "range",
        "unit": "range",
        "shift": tuple(map(float, shift)),
        "scale": tuple(1 / float(s) for s in spread),
    }


def advice(stats: Stats, images: Iterable[NumpyArray]) -> str:
    """A sentence where ``range`` leaves little of the pixels' differences, else "".

    A 12-bit camera in 16-bit files fills 6 % of their range; a net that is given
    differences so small learns slowly or, with noise added, nothing.

    Args:
        stats: What `measure` returned.
        images: Some training images ``[*S, C]``.
    """
    dtype = np.dtype(stats["dtype"])
    if stats["kind"] != "range" or dtype.kind != "u":
        return ""
    images = list(images)
    low = min(int(image.min()) for image in images)
    high = max(int(image.max()) for image in images)
    part = (high - low) / np.iinfo(dtype).max
    if part >= 0.2:
        return ""
    return (
        f"the images have values from {low} to {high}, {part:.1%} of the range of"
        f" {dtype}: --config.data.normalisation=standard is likely to learn better"
    )


def standardise(image: NumpyArray) -> NumpyArray:
    """One image by its own mean and deviation, per channel: the kind ``example``.

    Args:
        image: ``[*S, C]`` of any dtype.

    Returns:
        ``f32[*S, C]`` of mean 0 and deviation 1; a constant channel becomes 0.
    """
    axes = tuple(range(image.ndim - 1))
    image = image.astype(np.float64)
    mean = image.mean(axes, keepdims=True)
    deviation = image.std(axes, keepdims=True)
    return ((image - mean) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def normalise(image: Array, stats: Stats) -> Array:
    """Stored pixels to the net's input; runs inside the compiled function.

    Args:
        image: ``[B, *S, C]`` as stored.
        stats: What `measure` or `stated` returned.

    Returns:
        ``f32[B, *S, C]``.
    """
    shape = (1,) * (image.ndim - 1) + (-1,)
    shift = jnp.asarray(stats["shift"], jnp.float32).reshape(shape)
    scale = jnp.asarray(stats["scale"], jnp.float32).reshape(shape)
    pixels = image.astype(jnp.float32)
    if stats.get("unit") == "range" and jnp.issubdtype(image.dtype, jnp.integer):
        pixels = pixels * (1.0 / float(np.iinfo(image.dtype).max))
    return (pixels - shift) * scale
