"""Decoders: a pyramid goes in, the features that the head reads come out."""

import flax.linen as nn
import jax.numpy as jnp

from unet_jax.layers import Factory, align, crop
from unet_jax.types import Array


class UNetDecoder(nn.Module):
    """The expanding path: up-sample, put the skip beside it, one block; level by level.

    Attributes:
        block: Factory of blocks, called with ``features`` and ``name``.
        up: Factory of up-samplings, called with ``features`` and ``name``.
        padding: ``valid`` centre-crops the skip to the up-sampled map, as in the paper;
            ``same`` pads the up-sampled map to the skip's size with zeros.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2.
    """

    block: Factory
    up: Factory
    padding: str = "same"

    @nn.compact
    def __call__(self, pyramid: tuple[Array, ...]) -> tuple[Array, ...]:
        """Decodes.

        Args:
            pyramid: The encoder's maps, finest first.

        Returns:
            A decoded map for each level but the bottleneck, finest first, each with the
            channels of its skip. The head reads the first.
        """
        decoded: list[Array] = []
        x = pyramid[-1]
        for level in reversed(range(len(pyramid) - 1)):
            skip = pyramid[level]
            features = skip.shape[-1]
            x = self.up(features=features, name=f"up{level}")(x)
            if self.padding == "valid":
                skip = crop(skip, x.shape[1:-1])
            else:
                x = align(x, skip.shape[1:-1])
            x = jnp.concatenate([skip, x], axis=-1)
            x = self.block(features=features, name=f"level{level}")(x)
            decoded.append(x)
        return tuple(reversed(decoded))
