"""How a picture of the built-in data set is drawn.

The way a microscope spoils it: a field of view lit unevenly, cells that crowd together,
each with its own brightness (some darker than what is around them), a bright outline
and a grainy inside, over smooth out-of-focus light as bright as any cell and small
debris; then the blur of the lens, shot noise and eight bits.
"""

import math

import numpy as np

from unet_jax.types import NumpyArray, Shape


class Scene:
    """How one picture is drawn; all lengths in pixels, light from 0 to about 1."""

    def __init__(
        self,
        size: Shape,
        radius: tuple[float, float],
        crowding: float,
        noise: float,
    ) -> None:
        self.size, self.radius = size, radius
        self.crowding, self.noise = crowding, noise

    def draw(self, rng: np.random.Generator) -> tuple[NumpyArray, NumpyArray]:
        """The image ``u8[*S]`` and the instances ``i32[*S]``."""
        from scipy import ndimage

        instances, depth, core = self._cells(rng)
        cells = int(instances.max())
        inside = instances > 0

        def each(low: float, high: float) -> NumpyArray:
            values = np.append(0.0, rng.uniform(low, high, cells))
            return values.astype(np.float32)[instances]

        grain = _unit(ndimage.gaussian_filter(self._white(rng), 0.8))
        cloud = _unit(ndimage.gaussian_filter(self._white(rng), 3.0))
        # Cells of both signs of contrast: no side of a threshold is theirs.
        contrast = each(-0.13, 0.2)
        light = 0.33 + 0.06 * self._smooth(rng, 3.0 * max(self.radius)) + 0.02 * cloud
        light += self._spots(rng, blurred=True)
        light += contrast + each(0.035, 0.06) * grain
        light += each(-0.08, 0.14) * np.clip(4 * (0.5 - core), 0, 1)
        light += each(0.18, 0.3) * np.exp(-((depth / 1.3) ** 2)) * inside
        light += self._spots(rng, blurred=False)
        uneven = 0.22 * self._smooth(rng, 1.2 * max(self.size))
        light *= np.exp(np.clip(uneven, -0.5, 0.35))
        light = np.clip(ndimage.gaussian_filter(light, 0.6), 0.0, None)
        shot = 0.05 * np.sqrt(light) + 0.008
        light += self.noise * shot * self._white(rng)
        image = np.clip(np.rint(255 * light), 0, 255).astype(np.uint8)
        return image, instances

    def _cells(
        self, rng: np.random.Generator
    ) -> tuple[NumpyArray, NumpyArray, NumpyArray]:
        """Who owns each pixel, how far in it lies, and where in the cell.

        Each pixel goes to the cell whose bent ellipsoid it is deepest in, so that cells
        which meet share a border and never overlap.

        Returns:
            ``(instances i32, depth f32, core f32)``, each ``[*S]``: the cell's number
            or 0; pixels to the nearest border, about; 0 at the centre of the cell and 1
            at its border.
        """
        bend = 0.14 * np.mean(self.radius)
        bends = [
            bend * self._smooth(rng, 3.5 * float(np.mean(self.radius)))
            for _ in self.size
        ]
        core = np.full(self.size, 9.0, np.float32)
        second = core.copy()
        instances = np.zeros(self.size, np.int32)
        radii = [0.0]
        for centre, radius in self._places(rng):
            turn = _turn(rng, len(self.size))
            stretch = rng.uniform(0.78, 1.25, len(self.size))
            window = self._window(centre, 1.9 * radius)
            if window is None:
                continue
            radii.append(radius)
            away = [
                grid - np.float32(c) + shift[window]
                for grid, c, shift in zip(
                    self._grid(window), centre, bends, strict=True
                )
            ]
            distance = np.zeros(away[0].shape, np.float32)
            for row, axis in zip(turn, stretch * radius, strict=True):
                along = sum(
                    np.float32(t / axis) * x for t, x in zip(row, away, strict=True)
                )
                distance += along**2
            distance = np.sqrt(distance)
            first = core[window]
            closer = distance < first
            second[window] = np.minimum(
                second[window], np.where(closer, first, distance)
            )
            core[window] = np.where(closer, distance, first)
            instances[window][closer & (distance < 1)] = len(radii) - 1
        depth = np.minimum(1 - core, (second - core) / 2)
        depth *= np.asarray(radii, np.float32)[instances]
        return _renumber(instances), np.maximum(depth, 0), core

    def _places(self, rng: np.random.Generator) -> list[tuple[NumpyArray, float]]:
        """Centres and mean radii; most cells grow at the side of another."""
        size = np.array(self.size, np.float64)
        wanted = 0.55 * self.crowding * rng.uniform(0.7, 1.2) * size.prod()
        places: list[tuple[NumpyArray, float]] = []
        covered = 0.0
        for _ in range(400):
            if covered >= wanted:
                break
            radius = float(rng.uniform(*self.radius))
            if places and rng.random() < 0.8:
                beside, other = places[rng.integers(len(places))]
                way = _turn(rng, len(size))[0]
                centre = beside + way * (radius + other) * rng.uniform(0.75, 0.9)
            else:
                centre = rng.uniform(0, size)
            if (centre < -0.5 * radius).any() or (centre > size + 0.5 * radius).any():
                continue
            if any(np.linalg.norm(centre - c) < 0.72 * (radius + r) for c, r in places):
                continue
            places.append((centre, radius))
            covered += (3.1 if len(size) == 2 else 4.2) * radius ** len(size)
        return places

    def _spots(self, rng: np.random.Generator, *, blurred: bool) -> NumpyArray:
        """Light that is no cell: out-of-focus glow, or bright and dark debris."""
        light = np.zeros(self.size, np.float32)
        rank, mean = len(self.size), float(np.mean(self.radius))
        area = float(np.prod(self.size)) / mean**rank
        for _ in range(rng.poisson(area * (0.04 if blurred else 0.12))):
            centre = rng.uniform(0, self.size)
            if blurred:
                widths = mean * rng.uniform(0.5, 1.1, rank)
                height = rng.uniform(0.1, 0.3)
            else:
                widths = rng.uniform(0.6, 1.2, rank)
                widths[0] *= rng.uniform(1, 3)
                height = rng.uniform(0.2, 0.6) * rng.choice([1, 1, -0.6])
            window = self._window(centre, 3 * widths.max())
            if window is None:
                continue
            grids = self._grid(window)
            square = np.zeros((1,) * rank, np.float32)
            for row, width in zip(_turn(rng, rank), widths, strict=True):
                along = sum(
                    np.float32(t / width) * (grid - np.float32(c))
                    for t, grid, c in zip(row, grids, centre, strict=True)
                )
                square = square + along**2
            light[window] += np.float32(height) * np.exp(-square / 2)
        return light

    def _smooth(self, rng: np.random.Generator, length: float) -> NumpyArray:
        """A random field of deviation 1 without detail finer than ``length`` pixels."""
        waves = [max(2, math.ceil(2 * n / length)) for n in self.size]
        field = rng.standard_normal(waves).astype(np.float32)
        field.flat[0] = 0
        for n, count in zip(self.size, waves, strict=True):
            angle = np.pi * np.outer((np.arange(n) + 0.5) / n, np.arange(count))
            # Contracts the first axis and puts the new one last: all have had a turn
            # at the end, and the order is the old one.
            field = np.tensordot(field, np.cos(angle).astype(np.float32), (0, 1))
        return _unit(field)

    def _white(self, rng: np.random.Generator) -> NumpyArray:
        return rng.standard_normal(self.size, np.float32)

    def _window(self, centre: NumpyArray, reach: float) -> tuple[slice, ...] | None:
        begins = np.maximum(np.floor(centre - reach), 0).astype(int)
        ends = np.minimum(np.ceil(centre + reach), self.size).astype(int)
        if (begins >= ends).any():
            return None
        return tuple(map(slice, begins.tolist(), ends.tolist()))

    def _grid(self, window: tuple[slice, ...]) -> list[NumpyArray]:
        grids = np.ogrid[window]
        return [grid.astype(np.float32) for grid in grids]


def _turn(rng: np.random.Generator, rank: int) -> NumpyArray:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((rank, rank)))[0]


def _unit(field: NumpyArray) -> NumpyArray:
    field = field - field.mean()
    return field / max(float(field.std()), 1e-6)


def _renumber(instances: NumpyArray) -> NumpyArray:
    """Numbers the cells that can be seen 1, 2, 3 ...; some grew over others."""
    seen = np.bincount(instances.ravel()) > 0
    seen[0] = False
    return np.where(seen, np.cumsum(seen), 0).astype(np.int32)[instances]
