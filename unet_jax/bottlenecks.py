"""What may stand between encoder and decoder, at the coarsest level.

`BOTTLENECKS` names them. A bottleneck is a module with the field ``kit`` that takes
``[B, *S, C]`` to ``[B, *S, C]``.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.layers import Factory, Kit
from unet_jax.norms import at_least_float32
from unet_jax.types import Array, Shape


def rotate(x: Array, size: Shape) -> Array:
    """Turns queries or keys by angles that grow with the pixel's place.

    The product of a query and a key then depends on how far apart they are and not on
    where, so that no table of positions limits the size. The channels are dealt out to
    the axes; an axis turns pairs of them, the first pair by 1 radian a pixel, the last
    by about 1/100; channels that make no pair stay.

    Args:
        x: ``[B, N, heads, C]``, N = prod(size) pixels in row-major order.
        size: The spatial size.

    Reference: Su et al. 2021, arXiv 2104.09864 (rotary embedding); Heo et al. 2024,
    arXiv 2403.13298 (along the axes of an image).
    """
    pairs = x.shape[-1] // (2 * len(size))
    speeds = 100.0 ** -(np.arange(pairs) / max(pairs, 1))
    places = np.indices(size).reshape(len(size), -1)
    angles = (
        (places[..., None] * speeds).transpose(1, 0, 2).reshape(places.shape[1], -1)
    )
    cos, sin = (
        jnp.asarray(f(angles), x.dtype)[None, :, None, :] for f in (np.cos, np.sin)
    )
    turned = angles.shape[-1]
    a, b, rest = x[..., :turned], x[..., turned : 2 * turned], x[..., 2 * turned :]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


class TransformerLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each after a norm and added.

    Reference: Dosovitskiy et al. 2020, arXiv 2010.11929, equations 2 and 3.
    """

    heads: int
    size: Shape
    kit: Kit

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]

        def norm(name: str, x: Array) -> Array:
            layer = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)
            return layer(at_least_float32(x)).astype(x.dtype)

        def dense(name: str, features: int, x: Array) -> Any:
            return self.kit.dense(features=features, use_bias=True, name=name)(x)

        y = norm("norm0", x)
        split = (*y.shape[:2], self.heads, channels // self.heads)
        query, key, value = (
            dense(name, channels, y).reshape(split)
            for name in ("query", "key", "value")
        )
        query, key = rotate(query, self.size), rotate(key, self.size)
        # In float32: jax's own gradient mixes bfloat16 with it, which strict dtype
        # promotion refuses, and the coarsest level is small.
        query, key, value = map(at_least_float32, (query, key, value))
        y = jax.nn.dot_product_attention(query, key, value)
        y = y.reshape(x.shape).astype(x.dtype)
        x = x + dense("out", channels, y)
        y = nn.gelu(dense("widen", 4 * channels, norm("norm1", x)))
        return x + dense("narrow", channels, y)


class Transformer(nn.Module):
    """Self-attention over the pixels of the coarsest level, for any size.

    Memory and time grow with the square of the number of pixels there. Positions enter
    by rotation (`rotate`), so that no size is fixed, unlike in the paper.

    Attributes:
        kit: What to build with.
        layers: How many; 12 in the paper, with 768 channels.
        head_features: Channels of a head, as far as they divide the features.

    Reference: Chen et al. 2021, arXiv 2102.04306 (TransUNet), section 3.
    """

    kit: Kit
    layers: int = 4
    head_features: int = 64

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, *size, channels = x.shape
        heads = max(channels // self.head_features, 1)
        while channels % heads:
            heads -= 1
        y = x.reshape(batch, -1, channels)
        for i in range(self.layers):
            layer = TransformerLayer(heads, tuple(size), self.kit, name=f"layer{i}")
            y = layer(y)
        layer = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="norm")
        return layer(at_least_float32(y)).astype(x.dtype).reshape(x.shape)


BOTTLENECKS: dict[str, Factory | None] = {"none": None, "transformer": Transformer}
