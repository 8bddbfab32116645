"""Touching cells under a microscope, made from a seed: the built-in data set.

Pictures that no threshold solves and that a small U-Net learns within a few hundred
steps; ``scene`` says how they are drawn.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from unet_jax.data.border import separate
from unet_jax.data.scene import Scene
from unet_jax.data.split import parse, take
from unet_jax.types import Example, InputError, NumpyArray, Shape

_SIZES = {2: (128, 128), 3: (32, 64, 64)}
_RADII = {2: (8.0, 14.0), 3: (6.0, 9.0)}
_COUNTS = {"train": 200}
_COUNT = 32
"""Examples of any split that is not called train."""


def open(
    *,
    split: str,
    rank: int = 2,
    size: Shape = (),
    examples: int = 0,
    seed: int = 0,
    radius: tuple[float, ...] = (),
    crowding: float = 1.0,
    noise: float = 1.0,
    gap: bool = False,
) -> "Cells":
    """Opens the built-in data set.

    Args:
        split: ``train``, ``val``, ``test`` or any name, each its own pictures, and a
            part of it if wanted (``train[:50%]``).
        rank: 2 for images, 3 for volumes, whose first axis is the depth.
        size: pixels of each axis, 16 or more; () is 128 x 128 or 32 x 64 x 64.
        examples: how many the whole split has; 0 is 200 for ``train``, else 32.
        seed: another seed, other pictures.
        radius: smallest and largest mean radius of a cell in pixels; () is (8, 14) for
            images and (6, 9) for volumes.
        crowding: how much of the space cells fill; 1 is about half of an image
            and a quarter of a volume.
        noise: strength of the shot noise; 1 is a short exposure, 0 none.
        gap: whether a pixel between touching cells is background, so that the
            connected components of the label are the cells (`border.separate`).

    Returns:
        A source of grey ``u8`` images with the classes background and cell, and with
        ``instances(i)``.

    Raises:
        InputError: an option outside its range, or a split that cannot be read.
    """
    name, select = parse(split)
    if rank not in _SIZES:
        raise InputError(f"data.cells.rank is {rank}: choose 2 or 3.")
    size = tuple(size) or _SIZES[rank]
    radius = tuple(radius) or _RADII[rank]
    if len(size) != rank or min(size) < 16:
        raise InputError(
            f"data.cells.size is {size}: give {rank} numbers of 16 pixels or more."
        )
    if len(radius) != 2 or not 2 <= radius[0] <= radius[1]:
        raise InputError(
            f"data.cells.radius is {radius}: give the smallest and the largest, 2 "
            "pixels or more."
        )
    if examples < 0 or crowding < 0 or noise < 0:
        raise InputError(
            "data.cells.examples, crowding and noise must be 0 or more, not "
            f"{examples}, {crowding} and {noise}."
        )
    count = examples or _COUNTS.get(name, _COUNT)
    numbers = take(range(count), select(count))
    key = (seed % 2**64, zlib.crc32(name.encode()))
    scene = Scene(size, (radius[0], radius[1]), crowding, noise)
    return Cells(name, numbers, key, scene, gap)


class Cells:
    """The source that ``open`` returns; example i is a function of its seed alone."""

    label_names = ("background", "cell")

    def __init__(
        self,
        split: str,
        numbers: Sequence[int],
        key: tuple[int, int],
        scene: Scene,
        gap: bool,
    ) -> None:
        self._split, self._numbers = split, numbers
        self._key, self._scene, self._gap = key, scene, gap

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int, /) -> Example:
        image, instances = self._draw(i)
        return {"image": image[..., None], "label": (instances > 0).astype(np.uint8)}

    def instances(self, i: int, /) -> NumpyArray:
        """The number of the cell each pixel belongs to, from 1, or 0: ``i32[*S]``."""
        return self._draw(i)[1]

    def name(self, i: int, /) -> str:
        return f"cells-{self._split}-{self._numbers[i]:04d}"

    def size(self, i: int, /) -> Shape:
        return self._scene.size

    def _draw(self, i: int) -> tuple[NumpyArray, NumpyArray]:
        rng = np.random.default_rng([*self._key, self._numbers[i]])
        image, instances = self._scene.draw(rng)
        if self._gap:
            instances = np.where(separate(instances), 0, instances)
        return image, instances
