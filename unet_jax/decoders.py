"""Decoders: a pyramid goes in, the maps that heads read come out.

`DECODERS` names them. A decoder is a module with the fields ``features``, ``blocks``,
``ups``, ``merges``, ``fit``, ``up_features`` and ``supervised``, and a class
attribute ``nested``: whether each of its levels ends in a map of full size, so that the
net can be cut off there.
"""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from unet_jax.layers import Factory, align, crop
from unet_jax.resample import to_size
from unet_jax.types import Array


class Decoded(NamedTuple):
    """What a decoder answers.

    Attributes:
        outputs: Maps that heads read. Of a nested decoder all have full size, by the
            level they come from, the last being the deepest; otherwise by the level
            that they are, the first (0) being the full size.
        aux: ``decoder``, the last map of each level, finest first; ``grid``, for UNet++
            all of a level's maps, ``grid[i][j]``; ``gates``, where there are any, as
            tuples by level (and column).
    """

    outputs: dict[int, Array]
    aux: dict[str, Any]


def fit(
    skips: tuple[Array, ...], up: Array, how: str
) -> tuple[tuple[Array, ...], Array]:
    """Brings skips and an up-sampled map to one size.

    Args:
        skips: The maps of one level.
        up: What was up-sampled to it.
        how: A name of `FITS`.
    """
    size = up.shape[1:-1]
    if how == "crop":
        return tuple(crop(skip, size) for skip in skips), up
    if how == "crop_before":
        return tuple(_crop_before(skip, size) for skip in skips), up
    size = skips[0].shape[1:-1]
    if how == "resize":
        return skips, to_size(up, size) if up.shape[1:-1] != size else up
    if how == "edge":
        ends = [(0, max(n - m, 0)) for n, m in zip(size, up.shape[1:-1], strict=True)]
        up = jnp.pad(up, [(0, 0), *ends, (0, 0)], mode="edge") if any(ends) else up
    return skips, align(up, size)


def _crop_before(x: Array, size: tuple[int, ...]) -> Array:
    """The centre, but one pixel nearer to the first."""
    index = [slice(None)]
    for old, new in zip(x.shape[1:-1], size, strict=True):
        begin = max((old - new) // 2 - 1, 0)
        index.append(slice(begin, begin + new))
    return x[tuple(index)]


FITS = {
    "zeros": "the up-sampled map gets the size of the skips, with zeros around it",
    "edge": "likewise, its last row and column repeated at the end",
    "resize": "the up-sampling goes to the size of the skips, by interpolation",
    "crop": "the skips are centre-cropped to the up-sampled map, as in the paper",
    "crop_before": "likewise, one pixel before the centre (a known slip)",
}


class UNetDecoder(nn.Module):
    """The expanding path: up-sample, put the skip beside it, one block; level by level.

    Attributes:
        features: Channels of each level's block but the bottleneck's, finest first.
        blocks: Factory of each level's block, called with ``features`` and ``name``.
        ups: Of the up-sampling to each level, called with ``features`` and ``name``.
        merges: Of what joins skip and up-sampled map, called with ``name``.
        fit: How sizes are made equal [`FITS`].
        up_features: Channels of a learnt up-sampling: ``level``, those of the level it
            goes to, ``input``, those it gets (3-D U-Net), or a number for each level.
        supervised: How many levels, finest first, heads read; the coarser a level, the
            smaller its map.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    features: tuple[int, ...]
    blocks: tuple[Factory, ...]
    ups: tuple[Factory, ...]
    merges: tuple[Factory, ...]
    fit: str = "zeros"
    up_features: str | tuple[int, ...] = "level"
    supervised: int = 1
    nested: ClassVar[bool] = False

    @nn.compact
    def __call__(self, pyramid: tuple[Array, ...]) -> Decoded:
        """The encoder's maps, finest first -> `Decoded`."""
        decoded: list[Array] = []
        gates: list[tuple[Array, ...]] = []
        coarse = pyramid[-1]
        for level in reversed(range(len(pyramid) - 1)):
            features = self.features[level]
            width = up_width(self.up_features, level, features, coarse)
            size = pyramid[level].shape[1:-1] if self.fit == "resize" else None
            up = self.ups[level](features=width, name=f"up{level}")(coarse, size)
            skips, up = fit((pyramid[level],), up, self.fit)
            merge = self.merges[level](name=f"merge{level}")
            x, used = merge(skips, up, coarse)
            coarse = self.blocks[level](features=features, name=f"level{level}")(x)
            decoded.append(coarse)
            gates.append(used)
        aux: dict[str, Any] = {"decoder": tuple(reversed(decoded))}
        if any(gates):
            aux["gates"] = tuple(reversed(gates))
        return Decoded(dict(enumerate(aux["decoder"][: self.supervised])), aux)


def up_width(
    up_features: str | tuple[int, ...], level: int, features: int, coarse: Array
) -> int:
    """The channels of the up-sampling to a level.

    Args:
        up_features: As for `UNetDecoder`.
        level: The one it goes to.
        features: Of that level.
        coarse: What is up-sampled.
    """
    if isinstance(up_features, tuple):
        return up_features[level]
    return coarse.shape[-1] if up_features == "input" else features


class LateUpDecoder(nn.Module):
    """An expanding path that joins the skip first and up-samples then.

    At each level but the full size: the skip beside the coarser map, up-sampling to the
    next level, one block there. So the full size has no skip, and what comes from the
    coarsest level, which the encoder reached by a stride of 1, is not up-sampled; its
    entry of ``features`` is not read. As MONAI's ``UNet`` has it; for same padding.

    Attributes:
        features: Channels of each level's block but the coarsest, finest first.
        blocks, ups, merges, fit, up_features, supervised: As for `UNetDecoder`;
            ``ups`` and ``up_features`` by the level the up-sampling goes to.
        bare: Whether the finest level ends in logits: its last convolution then stands
            alone.
    """

    features: tuple[int, ...]
    blocks: tuple[Factory, ...]
    ups: tuple[Factory, ...]
    merges: tuple[Factory, ...]
    fit: str = "zeros"
    up_features: str | tuple[int, ...] = "level"
    supervised: int = 1
    bare: bool = False
    nested: ClassVar[bool] = False

    @nn.compact
    def __call__(self, pyramid: tuple[Array, ...]) -> Decoded:
        """The encoder's maps, finest first -> `Decoded`."""
        decoded: list[Array] = []
        x = pyramid[-1]
        for level in reversed(range(len(pyramid) - 2)):
            above = pyramid[level + 1]
            merge = self.merges[level + 1](name=f"merge{level + 1}")
            x, _ = merge((above,), align(x, above.shape[1:-1]), x)
            features = self.features[level]
            width = up_width(self.up_features, level, features, x)
            up, block = self.ups[level], self.blocks[level]
            if self.bare and level == 0:
                # A block without convolutions leaves the up-sampling as the last one.
                empty = not block(features=features, parent=None).taps(0)
                up = partial(up, bare=True) if empty else up
                block = block if empty else partial(block, bare=True)
            x = up(features=width, name=f"up{level}")(x)
            x = align(x, pyramid[level].shape[1:-1])
            x = block(features=features, name=f"level{level}")(x)
            decoded.append(x)
        aux: dict[str, Any] = {"decoder": tuple(reversed(decoded))}
        return Decoded(dict(enumerate(aux["decoder"][: self.supervised])), aux)


class UNetPlusPlusDecoder(nn.Module):
    """The nested grid with dense skips of UNet++.

    Node ``X[i, j]`` (row i of resolution, column j) is a block over all earlier nodes
    of its row and the up-sampled ``X[i + 1, j - 1]``; ``X[i, 0]`` is the encoder's.
    ``X[0, j]`` has the full size and needs only the triangle ``i + j <= level``: with a
    pyramid of fewer levels, fewer nodes run and the others do not change.

    Attributes:
        features: Channels of the last node of each row; the others have the encoder's.
        blocks, ups, merges: As for `UNetDecoder`, by row; called with the node's name.
        fit: As for `UNetDecoder`; what is cropped is every earlier node.
        up_features: As for `UNetDecoder`, by row.
        supervised: How many of the ``X[0, j]`` heads read: all, or 1, the last only.
            Where the encoder has no features of full size (ResNet), only then do the
            earlier nodes of row 0 exist.

    Reference: Zhou et al. 2018, arXiv 1807.10165, section 2; 2019, arXiv 1912.05074.
    """

    features: tuple[int, ...]
    blocks: tuple[Factory, ...]
    ups: tuple[Factory, ...]
    merges: tuple[Factory, ...]
    fit: str = "zeros"
    up_features: str | tuple[int, ...] = "level"
    supervised: int = 1
    nested: ClassVar[bool] = True

    @nn.compact
    def __call__(self, pyramid: tuple[Array, ...]) -> Decoded:
        """The encoder's maps, finest first -> `Decoded`."""
        depth = len(pyramid) - 1
        grid: list[list[Array]] = [[x] for x in pyramid]
        gates: list[list[tuple[Array, ...]]] = [[()] for _ in pyramid]
        for column in range(1, depth + 1):
            for row in range(depth + 1 - column):
                x, used = self._node(grid, row, column)
                grid[row].append(x)
                gates[row].append(used)
        columns = range(1, depth + 1) if self.supervised > 1 else (depth,)
        aux: dict[str, Any] = {
            "decoder": tuple(row[-1] for row in grid[:-1]),
            "grid": tuple(tuple(row) for row in grid),
        }
        if any(used for row in gates for used in row):
            aux["gates"] = tuple(tuple(row) for row in gates)
        return Decoded({j: grid[0][j] for j in columns}, aux)

    @nn.nowrap  # no scope of its own in the table of FLOPs
    def _node(
        self, grid: list[list[Array]], row: int, column: int
    ) -> tuple[Array, tuple[Array, ...]]:
        """The node, and the gates on the way to it."""
        coarse, earlier = grid[row + 1][-1], tuple(grid[row])
        # len(features) and not the pyramid's: a cut-off net keeps the nodes' widths.
        last = row + column == len(self.features)
        features = earlier[0].shape[-1]
        if last or (not features and self.supervised > 1):
            features = self.features[row]
        if not features:
            return earlier[0], ()
        width = up_width(self.up_features, row, features, coarse)
        size = earlier[0].shape[1:-1] if self.fit == "resize" else None
        up = self.ups[row](features=width, name=f"up{row}_{column}")(coarse, size)
        skips, up = fit(earlier, up, self.fit)
        x, used = self.merges[row](name=f"merge{row}_{column}")(skips, up, coarse)
        x = self.blocks[row](features=features, name=f"node{row}_{column}")(x)
        return x, used


DECODERS: dict[str, Factory] = {
    "unet": UNetDecoder,
    "unetpp": UNetPlusPlusDecoder,
    "late_up": LateUpDecoder,
}
