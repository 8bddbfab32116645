"""Pictures of a label on its image, in colours that everybody can tell apart."""

from pathlib import Path

import numpy as np

from unet_jax.data import formats
from unet_jax.types import NumpyArray, Task

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


def draw(image: NumpyArray, label: NumpyArray, *, task: Task) -> NumpyArray:
    """The image in grey or colour with the label as tint and outline.

    Args:
        image: ``[*S, C]`` of any dtype, shown from its least to its greatest value;
            three channels in colour, of any other number the first.
        label: As in `unet_jax.predict.Prediction`. Class 0 is left clear; labels lie
            over one another in their order.
        task: ``classes`` or ``labels``.

    Returns:
        ``u8[*S, 3]``.
    """
    shown = image if image.shape[-1] == 3 else image[..., :1]
    shown = shown.astype(np.float32)
    low, high = float(shown.min()), float(shown.max())
    shown = (shown - low) * np.float32(255 / max(high - low, 1e-20))
    picture = np.broadcast_to(shown, (*image.shape[:-1], 3)).copy()
    if task == "classes" or label.ndim == image.ndim - 1:
        # Of one plane the ids are the colours; of several each plane has its own.
        layers = [label]
    else:
        layers = [plane * (k + 1) for k, plane in enumerate(np.moveaxis(label, -1, 0))]
    table = np.asarray(COLOURS, np.float32)
    for ids in layers:
        colour = table[(ids.astype(np.int64) - 1) % len(COLOURS)]
        part = np.where(_outline(ids), 1.0, 0.35) * (ids > 0)
        part = part.astype(np.float32)[..., None]
        picture = picture * (1 - part) + colour * part
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _outline(ids: NumpyArray) -> NumpyArray:
    """Where a pixel differs from one of its four neighbours in the last two axes."""
    edge = np.zeros(ids.shape, bool)
    for axis in (-1, -2):
        differs = np.moveaxis(np.diff(ids.astype(np.int64), axis=axis) != 0, axis, 0)
        along = np.moveaxis(edge, axis, 0)
        along[:-1] |= differs
        along[1:] |= differs
    return edge


def write(path: str | Path, picture: NumpyArray) -> None:
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
