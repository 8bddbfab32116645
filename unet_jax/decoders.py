"""Decoders: a pyramid goes in, the maps that heads read come out.

`DECODERS` names them. A decoder is a module with the fields ``features``, ``blocks``,
``ups``, ``merges``, ``padding``, ``up_features`` and ``supervised``, and a class
attribute ``nested``: whether each of its levels ends in a map of full size, so that the
net can be cut off there.
"""

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn

from unet_jax.layers import Factory, align, crop
from unet_jax.types import Array


class Decoded(NamedTuple):
    """What a decoder answers.

    Attributes:
        outputs: Maps of full size that heads read, by the level they come from; the
            last is the deepest.
        aux: ``decoder``, the last map of each level, finest first; ``grid``, for UNet++
            all of a level's maps, ``grid[i][j]``; ``gates``, where there are any, as
            tuples by level (and column).
    """

    outputs: dict[int, Array]
    aux: dict[str, Any]


def fit(
    skips: tuple[Array, ...], up: Array, padding: str
) -> tuple[tuple[Array, ...], Array]:
    """Brings skips and an up-sampled map to one size.

    Args:
        skips: The maps of one level.
        up: What was up-sampled to it.
        padding: ``valid`` centre-crops the skips to the up-sampled map, as in the
            paper; otherwise the up-sampled map gets the size of the skips, with zeros.
    """
    if padding == "valid":
        return tuple(crop(skip, up.shape[1:-1]) for skip in skips), up
    return skips, align(up, skips[0].shape[1:-1])


class UNetDecoder(nn.Module):
    """The expanding path: up-sample, put the skip beside it, one block; level by level.

    Attributes:
        features: Channels of each level's block but the bottleneck's, finest first.
        blocks: Factory of each level's block, called with ``features`` and ``name``.
        ups: Of the up-sampling to each level, called with ``features`` and ``name``.
        merges: Of what joins skip and up-sampled map, called with ``name``.
        padding: See `fit`.
        up_features: Channels of a learnt up-sampling: ``level``, those of the level it
            goes to, or ``input``, those it gets (3-D U-Net).
        supervised: Not for this decoder: only its last map has full size.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    features: tuple[int, ...]
    blocks: tuple[Factory, ...]
    ups: tuple[Factory, ...]
    merges: tuple[Factory, ...]
    padding: str = "same"
    up_features: str = "level"
    supervised: bool = False
    nested: ClassVar[bool] = False

    @nn.compact
    def __call__(self, pyramid: tuple[Array, ...]) -> Decoded:
        """The encoder's maps, finest first -> `Decoded`."""
        decoded: list[Array] = []
        gates: list[tuple[Array, ...]] = []
        coarse = pyramid[-1]
        for level in reversed(range(len(pyramid) - 1)):
            features = self.features[level]
            width = coarse.shape[-1] if self.up_features == "input" else features
            up = self.ups[level](features=width, name=f"up{level}")(coarse)
            skips, up = fit((pyramid[level],), up, self.padding)
            merge = self.merges[level](name=f"merge{level}")
            x, used = merge(skips, up, coarse)
            coarse = self.blocks[level](features=features, name=f"level{level}")(x)
            decoded.append(coarse)
            gates.append(used)
        aux: dict[str, Any] = {"decoder": tuple(reversed(decoded))}
        if any(gates):
            aux["gates"] = tuple(reversed(gates))
        return Decoded({len(pyramid) - 1: coarse}, aux)


class UNetPlusPlusDecoder(nn.Module):
    """The nested grid with dense skips of UNet++.

    Node ``X[i, j]`` (row i of resolution, column j) is a block over all earlier nodes
    of its row and the up-sampled ``X[i + 1, j - 1]``; ``X[i, 0]`` is the encoder's.
    ``X[0, j]`` has the full size and needs only the triangle ``i + j <= level``: with a
    pyramid of fewer levels, fewer nodes run and the others do not change.

    Attributes:
        features: Channels of the last node of each row; the others have the encoder's.
        blocks, ups, merges: As for `UNetDecoder`, by row; called with the node's name.
        padding: See `fit`: with valid padding every earlier node is cropped.
        up_features: As for `UNetDecoder`.
        supervised: Whether every ``X[0, j]`` is read by a head, or the last only. Where
            the encoder has no features of full size (ResNet), only then do the earlier
            nodes of row 0 exist.

    Reference: Zhou et al. 2018, arXiv 1807.10165, section 2; 2019, arXiv 1912.05074.
    """

    features: tuple[int, ...]
    blocks: tuple[Factory, ...]
    ups: tuple[Factory, ...]
    merges: tuple[Factory, ...]
    padding: str = "same"
    up_features: str = "level"
    supervised: bool = False
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
        columns = range(1, depth + 1) if self.supervised else (depth,)
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
        if last or (not features and self.supervised):
            features = self.features[row]
        if not features:
            return earlier[0], ()
        width = coarse.shape[-1] if self.up_features == "input" else features
        up = self.ups[row](features=width, name=f"up{row}_{column}")(coarse)
        skips, up = fit(earlier, up, self.padding)
        x, used = self.merges[row](name=f"merge{row}_{column}")(skips, up, coarse)
        x = self.blocks[row](features=features, name=f"node{row}_{column}")(x)
        return x, used


DECODERS: dict[str, Factory] = {"unet": UNetDecoder, "unetpp": UNetPlusPlusDecoder}
