"""A label drawn on its image, as large as the image."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unet_jax.data import formats
from unet_jax.pictures import class_colours
from unet_jax.types import NumpyArray, Task


def draw(
    image: NumpyArray, label: NumpyArray, *, task: Task, label_names: Sequence[str]
) -> NumpyArray:
    """The image in grey or colour with the label as tint and outline.

    Args:
        image: ``[*S, C]`` of any dtype, shown from its least to its greatest value;
            three channels in colour, of any other number the first.
        label: As in `unet_jax.predict.Prediction`.
        task: ``classes`` or ``labels``; labels lie over one another in their order.
        label_names: Of the classes or labels. ``background`` is left clear, the others
            have their `unet_jax.pictures.class_colours`.

    Returns:
        ``u8[*S, 3]``.
    """
    shown = image if image.shape[-1] == 3 else image[..., :1]
    shown = shown.astype(np.float32)
    low, high = float(shown.min()), float(shown.max())
    shown = (shown - low) * np.float32(255 / max(high - low, 1e-20))
    picture = np.broadcast_to(shown, (*image.shape[:-1], 3)).copy()
    planes = label if label.ndim == image.ndim else label[..., None]
    for k, name in enumerate(label_names):
        if name == "background":
            continue
        inside = label == k if task == "classes" else planes[..., k] > 0
        part = np.where(_outline(inside), np.float32(1), np.float32(0.35)) * inside
        part = part.astype(np.float32)[..., None]
        colour = class_colours(label_names)[k].astype(np.float32)
        picture = picture * (1 - part) + colour * part
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _outline(inside: NumpyArray) -> NumpyArray:
    """Where a pixel and one of its four neighbours in the last two axes differ."""
    edge = np.zeros(inside.shape, bool)
    for axis in (-1, -2):
        differs = np.moveaxis(np.diff(inside, axis=axis), axis, 0)
        along = np.moveaxis(edge, axis, 0)
        along[:-1] |= differs
        along[1:] |= differs
    return edge


def write(path: str | os.PathLike[str], picture: NumpyArray) -> None:
    """Writes a picture.

    Args:
        path: .png, or .tif with a page for each index of the first axis of a volume.
        picture: ``u8[H, W, 3]`` or ``u8[D, H, W, 3]``.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path)
    with formats.writable(str(path)):
        if path.suffix == ".png":
            from PIL import Image

            Image.fromarray(picture).save(path)
        else:
            import tifffile

            tifffile.imwrite(path, picture, photometric="rgb", compression="zlib")
