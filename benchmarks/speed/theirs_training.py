"""PyTorch's training with a `DataLoader` that augments, in a process of its own.

Each worker rotates, bends and crops by one call of `scipy.ndimage.map_coordinates`, and
changes grey values, in NumPy: what a good user writes without a library for it.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.speed import machine, peers, theirs
from benchmarks.speed.cases import WHITE, Case
from benchmarks.speed.end_to_end import SETTINGS, Setup, serve
from unet_jax.types import NumpyArray


class Augmented(Dataset[tuple[NumpyArray, NumpyArray]]):
    """Random crops, rotated, bent, brighter or darker, with noise."""

    def __init__(self, path: Path, crop: tuple[int, ...]) -> None:
        with np.load(path) as arrays:
            self.image, self.label = arrays["image"], arrays["label"]
        self.crop = crop

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, i: int) -> tuple[NumpyArray, NumpyArray]:
        """Image ``f32[C, *crop]`` and label ``i64[*crop]``."""
        # A worker seeds PyTorch by its number, and not NumPy.
        rng = np.random.default_rng(int(torch.randint(2**62, ()).item()))
        image, label = self.image[i], self.label[i]
        at = places(rng, label.shape, self.crop)
        channels = [
            ndimage.map_coordinates(
                image[..., c].astype(np.float32), at, order=1, mode="mirror"
            )
            for c in range(image.shape[-1])
        ]
        x = np.stack(channels).astype(np.float32) / np.float32(WHITE)
        x += np.float32(rng.uniform(-SETTINGS.brightness, SETTINGS.brightness))
        x += np.float32(SETTINGS.noise) * rng.standard_normal(x.shape, np.float32)
        y = ndimage.map_coordinates(label, at, order=0, mode="mirror")
        return x, y.astype(np.int64)


def places(
    rng: np.random.Generator, size: tuple[int, ...], crop: tuple[int, ...]
) -> NumpyArray:
    """Where in the image each pixel of an augmented crop is read: ``f64[2, *crop]``."""
    begin = [rng.integers(n - m + 1) for n, m in zip(size, crop, strict=True)]
    angle = math.radians(rng.uniform(-SETTINGS.rotate, SETTINGS.rotate))
    middle = [(m - 1) / 2 for m in crop]
    y, x = np.mgrid[: crop[0], : crop[1]].astype(np.float64)
    y, x = y - middle[0], x - middle[1]
    nodes = rng.normal(0, SETTINGS.elastic, (2, 3, 3))
    bent = [
        ndimage.zoom(n, [m / 3 for m in crop], order=3, grid_mode=True, mode="nearest")
        for n in nodes
    ]
    cos, sin = math.cos(angle), math.sin(angle)
    rows = cos * y - sin * x + middle[0] + begin[0] + bent[0]
    columns = sin * y + cos * x + middle[1] + begin[1] + bent[1]
    return np.stack([rows, columns])


def loader(setup: Setup, data: Path) -> DataLoader[Any]:
    """Batches without end, from one worker a core."""
    dataset = Augmented(data, setup.crop)
    return DataLoader(
        dataset,
        batch_size=setup.batch,
        sampler=RandomSampler(dataset, replacement=True, num_samples=10**9),
        num_workers=machine.cores(),
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def main(setup: Setup, data: Path, name: str, device: str) -> None:
    """Trains as long as it is told; see `end_to_end.serve`."""
    theirs.prepare(device, machine.cores())
    setting = theirs.SETTINGS[name]
    batches: Iterator[Any] = iter(loader(setup, data))
    case = Case(
        "", "unet", setup.features, setup.crop, setup.channels, dtype=setup.dtype
    )
    net = theirs.place(peers.build(case), case, setting, device).train()
    optimizer = torch.optim.SGD(
        net.parameters(), SETTINGS.rate, SETTINGS.momentum, fused=True
    )
    layout = theirs.layout(case, setting)

    def call() -> int:
        image, label = next(batches)
        image = image.to(device, non_blocking=True, memory_format=layout)
        label = label.to(device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with theirs.cast(case, device):
            loss = F.cross_entropy(net(image), label)
        loss.backward()
        optimizer.step()
        return setup.batch

    serve(call, lambda: theirs.wait(device)(None), setup)
