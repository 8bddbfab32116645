"""The nets: encoder + decoder + head, and the sizes they work on.

Every net is called in one way and answers in one way:

    logits, aux = model.apply(variables, image, train=False)

``image`` is the normalised ``f32[B, *S, C]``, ``logits`` is ``f32[B, *S', K]`` and
``aux`` holds the feature pyramids (``aux["encoder"]``, ``aux["decoder"]``, finest
first). Under ``jit`` what is not returned from ``aux`` costs nothing: take ``[0]``
inside the jit.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from unet_jax.decoders import UNetDecoder
from unet_jax.encoders import PlainEncoder
from unet_jax.layers import (
    ACTIVATIONS,
    INITIALISERS,
    ConvBlock,
    Factory,
    UpConv,
    Upsample,
    conv_factory,
    norm_factory,
)
from unet_jax.types import Array, InputError, Pads, Shape, choose, size_text


class UNet(nn.Module):
    """U-Net in two or three dimensions, by the rank of the image.

    Attributes:
        num_classes: K, the channels of the logits.
        features: Channels of each level, finest first; the last is the bottleneck.
        padding: ``same``: any size in, the same size out. ``valid``: unpadded
            convolutions and cropped skips as in the paper; 572 in, 388 out.
        norm: ``batch`` | ``instance`` | ``group`` | ``none``.
        norm_groups: Groups of ``norm="group"``.
        act: ``relu`` | ``leaky_relu`` | ``elu`` | ``gelu`` | ``silu``.
        up: ``transpose`` (learnt up-convolution) | ``bilinear`` | ``nearest``.
        align_corners: For ``up="bilinear"``: keep the corner pixels in place.
        dropout: Rate of dropout after the coarsest levels of the encoder.
        dropout_levels: How many levels those are.
        conv_bias: Whether 3x3 convolutions own a bias; None: unless a norm follows.
        kernel_init: How kernels start, a name of `unet_jax.layers.INITIALISERS`.
        dtype: ``float32`` or ``bfloat16`` for convolutions; parameters, statistics,
            the head and the logits are float32 always.
        encoder: Factory of the encoder.
        decoder: Factory of the decoder.
        block: Factory of the blocks of both.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597.
    """

    num_classes: int
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    padding: str = "same"
    norm: str = "batch"
    norm_groups: int = 8
    act: str = "relu"
    up: str = "transpose"
    align_corners: bool = False
    dropout: float = 0.0
    dropout_levels: int = 2
    conv_bias: bool | None = None
    kernel_init: str = "he_normal"
    dtype: str = "float32"
    encoder: Factory = PlainEncoder
    decoder: Factory = UNetDecoder
    block: Factory = ConvBlock

    @property
    def depth(self) -> int:
        """How often the size is halved."""
        return len(self.features) - 1

    @nn.compact
    def __call__(
        self, image: Array, *, train: bool = False
    ) -> tuple[Array, dict[str, tuple[Array, ...]]]:
        """Runs the net.

        Args:
            image: ``f32[B, *S, C]``, normalised.
            train: Batch statistics and dropout of training.

        Returns:
            ``(logits f32[B, *S', K], aux)``.

        Raises:
            InputError: ``padding="valid"`` and a size that does not work.
        """
        rank = image.ndim - 2
        if rank not in (2, 3):
            raise ValueError(f"image must be [B, *S, C] in 2-D or 3-D: {image.shape}")
        check(self)
        output_size(self, image.shape[1:-1])
        dtype = jnp.dtype(self.dtype)
        bias = self.norm == "none" if self.conv_bias is None else self.conv_bias
        init = choose(INITIALISERS, self.kernel_init, "kernel_init =")
        conv = conv_factory(
            rank=rank, padding=self.padding, use_bias=bias, init=init, dtype=dtype
        )
        block = partial(
            self.block,
            conv=conv,
            norm=norm_factory(self.norm, train=train, groups=self.norm_groups),
            act=choose(ACTIVATIONS, self.act, "act ="),
        )
        up_conv = partial(UpConv, kernel_init=init, dtype=dtype)
        up = partial(
            Upsample, method=self.up, align_corners=self.align_corners, up_conv=up_conv
        )
        dropout = partial(nn.Dropout, self.dropout, deterministic=not train)
        pyramid = self.encoder(
            features=self.features,
            block=block,
            dropout=dropout if self.dropout else None,
            dropout_levels=self.dropout_levels,
            name="encoder",
        )(image.astype(dtype))
        decoded = self.decoder(
            block=block, up=up, padding=self.padding, name="decoder"
        )(pyramid)
        # A 1x1 convolution as a product over the last axis: the same parameters without
        # the spatial axes, and right under vmap and sharding.
        head = nn.Dense(self.num_classes, kernel_init=init, name="head")
        logits = head(decoded[0].astype(jnp.float32))
        return logits, {"encoder": pyramid, "decoder": decoded}


def check(model: UNet) -> None:
    """Refuses fields that no net can have.

    Raises:
        InputError: Names the field and what it may be.
    """
    features = model.features
    if len(features) < 2 or not all(isinstance(n, int) and n > 0 for n in features):
        raise InputError(
            f"model.features = {features} must be two or more whole numbers above 0,"
            " finest level first, such as (16,32,64,128)."
        )
    if model.norm == "group" and any(n % model.norm_groups for n in features):
        raise InputError(
            f"model.norm_groups = {model.norm_groups} does not divide each of"
            f" model.features = {features}: use {math.gcd(*features)}, or a divisor of"
            " it."
        )
    if not 0.0 <= model.dropout < 1.0:
        raise InputError(f"model.dropout = {model.dropout} must be in [0, 1).")
    choose(("float32", "bfloat16"), model.dtype, "model.dtype =")
    choose(("same", "valid"), model.padding, "model.padding =")


# --- Sizes ---------------------------------------------------------------------------


def _valid_out(size: int, depth: int) -> int | None:
    """The output of a valid net of two 3x3 convolutions a block, None if it has none.

    Every max-pooling must see an even size (the paper, section 3), else the skip and
    the up-sampled map are half a pixel apart.
    """
    for _ in range(depth):
        size -= 4
        if size < 2 or size % 2:
            return None
        size //= 2
    size -= 4
    if size < 1:
        return None
    for _ in range(depth):
        size = 2 * size - 4
    return size if size > 0 else None


def output_size(model: UNet, size: Sequence[int]) -> Shape:
    """The spatial size of the logits for an image of spatial size ``size``.

    Raises:
        InputError: A valid net does not work at this size; names the nearest that do.
    """
    if model.padding != "valid":
        return tuple(size)
    out = []
    for n in size:
        result = _valid_out(n, model.depth)
        if result is None:
            step = 2**model.depth
            reach = range(max(n, 0), n + 200 * step)
            above = next(m for m in reach if _valid_out(m, model.depth))
            below = next(
                (m for m in range(n, 0, -1) if _valid_out(m, model.depth)), None
            )
            nearest = f"{below} or {above}" if below else f"{above}, the smallest"
            raise InputError(
                f"an image of {size_text(size)} does not work with padding = 'valid'"
                f" and {model.depth} halvings, because {n} does not stay even at each"
                f" of them: use {nearest} (572 gives 388 in the paper's net)."
            )
        out.append(result)
    return tuple(out)


def margin(model: UNet) -> int:
    """Pixels that a valid net loses at each side (92 for the paper's), 0 for same."""
    if model.padding != "valid":
        return 0
    # d halvings: two convolutions a level on the way down and up, each losing 2 pixels
    # of 2^level; 4 (2^d - 1) + 4 * 2^d + 4 (2^d - 1), halved for one side.
    return 6 * 2**model.depth - 4


def pads(model: UNet, size: Sequence[int]) -> Pads:
    """The mirror padding with which the net's output covers an image of any size.

    Everything that runs a net on whole images (evaluate, predict, export) pads by this,
    runs, and keeps the first ``size`` pixels of the output: so their numbers agree, and
    few shapes compile, because the padded size is a multiple of ``2^depth`` (plus a
    constant, for valid padding).

    Args:
        model: The net.
        size: The image's spatial size, at least 1 along each axis. May be symbolic
            dimensions of `jax.export` for ``padding="same"``.

    Returns:
        Pixels to mirror (before, after) along each axis.
    """
    step = 2**model.depth
    if model.padding != "valid":
        return tuple((0, (n + step - 1) // step * step - n) for n in size)
    edge = margin(model)
    result = []
    for n in size:
        # Outputs that exist are those congruent to one of them modulo 2^depth.
        smallest = next(m for m in range(1, 99 * step) if _valid_out(m, model.depth))
        first = smallest - 2 * edge
        out = first + max((n - first + step - 1) // step, 0) * step
        result.append((edge, edge + out - n))
    return tuple(result)


# --- Named nets ----------------------------------------------------------------------

MODELS: dict[str, Callable[..., UNet]] = {
    "unet": UNet,
    # Ronneberger et al. 2015, arXiv 1505.04597: 31,030,658 parameters for one channel
    # in and two classes out. The dropout rate is not in the paper; 0.5 is Caffe's.
    "unet_2015": partial(
        UNet,
        features=(64, 128, 256, 512, 1024),
        padding="valid",
        norm="none",
        up="transpose",
        dropout=0.5,
    ),
}


def build(name: str, **fields: Any) -> UNet:
    """A named net with some of its fields set.

    Args:
        name: A key of `MODELS`.
        **fields: Fields of the net; lists, as JSON gives them, become tuples.

    Returns:
        The module.

    Raises:
        InputError: No net of that name.
        TypeError: No field of that name.
    """
    factory = choose(MODELS, name, "model.name =")
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    model = factory(**tuples)
    check(model)
    return model


def fields(model: UNet) -> dict[str, Any]:
    """Every field of a net that JSON can hold, set or default.

    Stored with a checkpoint, they build the same net again even if a default changes.
    """
    plain = (str, int, float, bool, tuple, type(None))
    values = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("name", "parent")
    }
    return {k: v for k, v in values.items() if isinstance(v, plain)}
