"""Encoders: an image goes in, a pyramid of feature maps comes out, finest first."""

import flax.linen as nn

from unet_jax.layers import Factory, max_pool
from unet_jax.types import Array


class PlainEncoder(nn.Module):
    """The contracting path: a block a level, 2x2 max-pooling between them.

    The last entry of the pyramid is the bottleneck.

    Attributes:
        features: Channels of each level, finest first.
        block: Factory of blocks, called with ``features`` and ``name``.
        dropout: Factory of dropout layers, called with ``name``, or None.
        dropout_levels: How many of the coarsest levels end in dropout; 2 in the
            authors' own network ("drop-out layers at the end of the contracting path").

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, section 2 and 3.1.
    """

    features: tuple[int, ...]
    block: Factory
    dropout: Factory | None = None
    dropout_levels: int = 2

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        """``[B, *S, C]`` -> ``([B, *S, f0], [B, *(S/2), f1], ...)``."""
        pyramid = []
        for level, features in enumerate(self.features):
            if level:
                x = max_pool(x)
            x = self.block(features=features, name=f"level{level}")(x)
            if self.dropout and level >= len(self.features) - self.dropout_levels:
                x = self.dropout(name=f"dropout{level}")(x)
            pyramid.append(x)
        return tuple(pyramid)
