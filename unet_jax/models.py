"""The nets: encoder + bottleneck + decoder + head, and the sizes they work on.

Every net is called in one way and answers in one way:

    logits, aux = model.apply(variables, image, train=False)

``image`` is the normalised ``f32[B, *S, C]``, ``logits`` is ``f32[B, *S', K]`` and
``aux`` holds the feature pyramids (``aux["encoder"]``, ``aux["decoder"]``, finest
first), and where a net has them ``aux["heads"]`` (the logits of deep supervision),
``aux["grid"]`` (the nodes of UNet++) and ``aux["gates"]`` (attention). Under ``jit``
what is not returned from ``aux`` costs nothing: take ``[0]`` inside the jit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax.blocks import BLOCKS, EXCITES, excite_factory
from unet_jax.bottlenecks import BOTTLENECKS
from unet_jax.checks import check, chosen, class_of, has_field
from unet_jax.decoders import DECODERS
from unet_jax.encoders import ENCODERS
from unet_jax.geometry import Ascent, Axis
from unet_jax.layers import (
    INITIALISERS,
    Factory,
    Kit,
    act_factory,
    conv_factory,
    crop,
    per_axis,
)
from unet_jax.merges import MERGES
from unet_jax.norms import at_least_float32, norm_factory
from unet_jax.resample import DOWNS, UPS, nearest, up_convolution
from unet_jax.types import (
    Array,
    InputError,
    Pads,
    PyTree,
    Shape,
    choose,
)

Sizes = tuple[int | tuple[int, ...], ...]


class UNet(nn.Module):
    """The U-Net family in two or three dimensions, by the rank of the image.

    A part is named (a key of the table in brackets) or given: any factory that keeps
    the contract in its file's first lines.

    Attributes:
        num_classes: K, the channels of the logits.
        features: Channels of each level, finest first; the last is the bottleneck.
        decoder_features: Channels of the decoder's levels, finest first; None: the
            encoder's.
        encoder: ``plain``, ``resnet18`` ... [`encoders.ENCODERS`].
        bottleneck: ``none`` or ``transformer`` [`bottlenecks.BOTTLENECKS`].
        decoder: ``unet`` or ``unetpp`` [`decoders.DECODERS`].
        block: ``plain``, ``residual``, ``recurrent`` ... [`blocks.BLOCKS`].
        decoder_block: Likewise, for the decoder; None: the same.
        down: ``max`` | ``average`` | ``strided`` [`resample.DOWNS`].
        up: ``transpose`` | ``bilinear`` | ``nearest`` ... [`resample.UPS`].
        up_features: Channels of a learnt up-sampling: ``level``, those of the level it
            goes to, ``input``, those it gets, or a number for each level.
        up_bias: Whether up-convolutions own a bias.
        fit: How an up-sampled map and a skip of another size (from an odd one) become
            one size [`decoders.FITS`]; None: ``crop`` with valid padding, else
            ``zeros``.
        merge: ``concat`` | ``sum`` | ``gated`` | ``none`` ... [`merges.MERGES`].
        padding: ``same``: any size in, the same size out. ``reflect``: likewise, every
            convolution seeing its input mirrored beyond the border instead of zeros.
            ``valid``: unpadded convolutions and cropped skips as in the paper; 572 in,
            388 out.
        kernels: Kernel size of each level, a number or one for each axis, all odd; ():
            3 everywhere.
        decoder_kernels: Likewise of the decoder's levels, all but the coarsest; ():
            those of `kernels`.
        strides: From each level to the next, likewise; (): 2 everywhere.
        units: How many convolutions (or residual units) the block of each level has,
            where the block has a choice; (): the block's own number.
        decoder_units: Likewise of the decoder's levels, all but the coarsest.
        norm: ``batch`` | ``instance`` | ``group`` | ``none``; ``batch_unbiased`` and
            ``instance_plain`` are PyTorch's (`unet_jax.norms.norm_factory`).
        norm_groups: Groups of ``norm="group"``.
        order: In what order a block applies ``c``\\ onvolution, ``n``\\ orm and
            ``a``\\ ctivation.
        act: ``relu`` | ``leaky_relu`` | ``prelu`` | ``elu`` | ``gelu`` | ``silu``.
        act_slope: For negative inputs, of ``leaky_relu`` and ``prelu``.
        excite: ``none`` | ``se`` | ``scse``: what re-weighs the channels of a block
            [`blocks.EXCITES`].
        dropout: Rate of dropout after the coarsest levels of the encoder.
        dropout_levels: How many levels those are.
        conv_bias: Whether convolutions own a bias; None: unless a norm follows at once.
        kernel_init: How kernels start [`layers.INITIALISERS`].
        head_kernel: Kernel size of the head; 1 in the paper. 0: there is none, the
            decoder's finest level ends in the logits (decoder ``late_up``).
        head_bias: Whether heads own a bias.
        deep_supervision: UNet++: a head on every map of full size. The loss is the mean
            of the heads' losses, the logits the mean of their logits. Other decoders:
            a head on every level, coarser ones in the level's size. Their losses weigh
            less, as 1 / stride; the logits are the finest head's.
        heads: How many levels then have one, finest first; None: all of the decoder's.
        level: UNet++: cut off after this level, 1 to the depth, whose head alone then
            gives the logits. Nothing beyond it is run; the variables of the whole net
            fit. Less than the depth needs ``deep_supervision``.
        remat: How many levels, finest first, are computed again in the backward pass
            instead of being kept.
        dtype: ``float32`` or ``bfloat16`` for convolutions; parameters, statistics,
            the head and the logits are float32 always. (``float64`` is for tests, with
            x64 and parameters of that type.)
        axis_name: The axis of a `jax.pmap` over whose devices batch statistics are
            taken. `unet_jax.training.make_pmap_train_step` sets it; under ``jit`` on a
            mesh they are those of the whole batch without it.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597; `MODELS` has the others.
    """

    num_classes: int
    features: tuple[int, ...] = (64, 128, 256, 512, 1024)
    decoder_features: tuple[int, ...] | None = None
    encoder: str | Factory = "plain"
    bottleneck: str | Factory = "none"
    decoder: str | Factory = "unet"
    block: str | Factory = "plain"
    decoder_block: str | Factory | None = None
    down: str | Factory = "max"
    up: str | Factory = "transpose"
    up_features: str | tuple[int, ...] = "level"
    up_bias: bool = True
    fit: str | None = None
    merge: str | Factory = "concat"
    padding: str = "same"
    kernels: Sizes = ()
    decoder_kernels: Sizes = ()
    strides: Sizes = ()
    units: tuple[int, ...] = ()
    decoder_units: tuple[int, ...] = ()
    norm: str = "batch"
    norm_groups: int = 8
    order: str = "cna"
    act: str = "relu"
    act_slope: float | None = None
    excite: str | Factory = "none"
    dropout: float = 0.0
    dropout_levels: int = 2
    conv_bias: bool | None = None
    kernel_init: str = "he_normal"
    head_kernel: int = 1
    head_bias: bool = True
    deep_supervision: bool = False
    heads: int | None = None
    level: int | None = None
    remat: int = 0
    dtype: str = "float32"
    axis_name: str | None = None

    @property
    def depth(self) -> int:
        """How often the size is halved: as deep as the net is, or is cut off."""
        return len(self.features) - 1 if self.level is None else self.level

    @property
    def nested(self) -> bool:
        """Whether each level of the decoder ends in a map of full size (UNet++)."""
        return class_of(chosen(DECODERS, self.decoder, "decoder")).nested

    @nn.compact
    def __call__(
        self, image: Array, *, train: bool = False
    ) -> tuple[Array, dict[str, Any]]:
        """Runs the net.

        Args:
            image: ``f32[B, *S, C]``, normalised.
            train: Batch statistics and dropout of training.

        Returns:
            ``(logits f32[B, *S', K], aux)``.

        Raises:
            InputError: ``padding="valid"`` and a size that does not work, or fields
                that no net can have.
        """
        rank = image.ndim - 2
        if rank not in (2, 3):
            raise ValueError(f"image must be [B, *S, C] in 2-D or 3-D: {image.shape}")
        check(self)
        output_size(self, image.shape[1:-1])
        parts = _parts(self, rank, train=train)
        x = image.astype(jnp.dtype(self.dtype))
        pyramid = parts.encoder(name="encoder")(x)
        if parts.bottleneck is not None:
            deepest = parts.bottleneck(kit=parts.kit, name="bottleneck")(pyramid[-1])
            pyramid = (*pyramid[:-1], deepest)
        outputs, aux = parts.decoder(name="decoder")(pyramid)
        aux = {"encoder": pyramid, **aux}
        if not self.deep_supervision:
            return self._head("head", outputs[self.depth if self.nested else 0]), aux
        if not self.nested:
            heads = tuple(self._head(f"head{i}", x) for i, x in outputs.items())
            return heads[0], {**aux, "heads": heads}
        levels = outputs if self.level is None else (self.level,)
        heads = tuple(self._head(f"head{level}", outputs[level]) for level in levels)
        # With valid padding the deeper a head, the smaller: their mean is of the last.
        size = heads[-1].shape[1:-1]
        logits = jnp.mean(jnp.stack([crop(head, size) for head in heads]), axis=0)
        return logits, {**aux, "heads": heads}

    @nn.nowrap  # no scope of its own in the table of FLOPs
    def _head(self, name: str, x: Array) -> Array:
        init = choose(INITIALISERS, self.kernel_init, "model.kernel_init =")
        x = at_least_float32(x)
        if self.head_kernel == 0:
            return x
        if self.head_kernel == 1:
            # A 1x1 convolution as a product over the last axis: the same parameters
            # without the spatial axes, and right under vmap and sharding.
            return nn.Dense(
                self.num_classes, use_bias=self.head_bias, kernel_init=init, name=name
            )(x)
        rank = x.ndim - 2
        conv = conv_factory(
            padding=self.padding, use_bias=self.head_bias, init=init, dtype=x.dtype
        )
        kernel, stride = (self.head_kernel,) * rank, (1,) * rank
        module = conv(
            features=self.num_classes, kernel=kernel, stride=stride, name=name
        )
        return module(x)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The factories that a net's fields name, wired."""

    kit: Kit
    encoder: Factory
    bottleneck: Factory | None
    decoder: Factory


def _again(block: Factory) -> Factory:
    """A block that is computed again in the backward pass; its names stay."""
    if isinstance(block, partial):
        return partial(_again(block.func), *block.args, **block.keywords)
    return nn.remat(block)  # pyright: ignore[reportArgumentType]


def _parts(model: UNet, rank: int, *, train: bool) -> _Parts:
    depth = model.depth
    dtype = jnp.dtype(model.dtype)
    follows = "cn" in model.order and model.norm != "none"
    bias = not follows if model.conv_bias is None else model.conv_bias
    init = choose(INITIALISERS, model.kernel_init, "model.kernel_init =")
    dense = partial(nn.Dense, use_bias=bias, kernel_init=init, dtype=dtype)
    kit = Kit(
        conv=conv_factory(padding=model.padding, use_bias=bias, init=init, dtype=dtype),
        dense=dense,
        norm=norm_factory(
            model.norm,
            train=train,
            groups=model.norm_groups,
            axis_name=model.axis_name,
        ),
        act=act_factory(model.act, slope=model.act_slope),
        excite=excite_factory(chosen(EXCITES, model.excite, "excite"), dense),
        up_conv=partial(
            up_convolution, use_bias=model.up_bias, kernel_init=init, dtype=dtype
        ),
        order=model.order,
        padding=model.padding,
    )
    kernels = [per_axis(k, rank, "model.kernels") for k in model.kernels]
    kernels = kernels or [(3,) * rank] * len(model.features)
    beside = [per_axis(k, rank, "model.decoder_kernels") for k in model.decoder_kernels]
    beside = beside or kernels
    strides = [per_axis(s, rank, "model.strides") for s in model.strides]
    strides = strides or [(2,) * rank] * (len(model.features) - 1)

    def blocks(
        value: Any,
        field: str,
        kernels: Sequence[Shape],
        units: Sequence[int],
        levels: int,
    ) -> tuple[Factory, ...]:
        block = chosen(BLOCKS, value, field)
        skipless = field == "decoder_block" and has_field(block, "skipless")
        made = []
        for level in range(levels):
            options: dict[str, Any] = {"units": units[level]} if units else {}
            if skipless:
                options["skipless"] = not model.features[level]
            again = _again(block) if level < model.remat else block
            made.append(partial(again, kernel=kernels[level], kit=kit, **options))
        return tuple(made)

    supervised = model.deep_supervision
    up = chosen(UPS, model.up, "up")
    merge = chosen(MERGES, model.merge, "merge")
    dropout = partial(nn.Dropout, model.dropout, deterministic=not train)
    bottleneck = chosen(BOTTLENECKS, model.bottleneck, "bottleneck")
    whole = depth == len(model.features) - 1
    encoder = partial(
        chosen(ENCODERS, model.encoder, "encoder"),
        features=model.features[: depth + 1],
        kit=kit,
        blocks=blocks(model.block, "block", kernels, model.units, depth + 1),
        strides=tuple(strides[:depth]),
        pool=chosen(DOWNS, model.down, "down"),
        dropout=dropout if model.dropout else None,
        dropout_from=len(model.features) - model.dropout_levels,
    )
    decoder = chosen(DECODERS, model.decoder, "decoder")
    if model.head_kernel == 0:
        decoder = partial(decoder, bare=True)
    heads = (depth if model.heads is None else model.heads) if supervised else 1
    decoder = partial(
        decoder,
        features=model.decoder_features or model.features[:-1],
        blocks=blocks(
            model.decoder_block or model.block,
            "decoder_block",
            beside,
            model.decoder_units,
            depth,
        ),
        ups=tuple(
            partial(up, stride=strides[i], kernel=beside[i], kit=kit)
            for i in range(depth)
        ),
        merges=tuple(
            partial(merge, level=i, stride=strides[i], kit=kit) for i in range(depth)
        ),
        fit=model.fit or ("crop" if model.padding == "valid" else "zeros"),
        up_features=model.up_features,
        supervised=heads,
    )
    return _Parts(kit, encoder, bottleneck if whole else None, decoder)


# --- Sizes ---------------------------------------------------------------------------


def axis(model: UNet, index: int, rank: int) -> Axis:
    """A net along one of its spatial axes.

    Args:
        model: The net.
        index: Of the axis, from 0.
        rank: Spatial axes.
    """
    parts = _parts(model, rank, train=False)
    decoder = parts.decoder(parent=None)
    ups = []
    for level in range(model.depth):
        up = decoder.ups[level](features=1, parent=None)
        coarse, fine = up.taps(index)
        block = decoder.blocks[level](features=1, parent=None).taps(index)
        merge = decoder.merges[level](parent=None)
        method = getattr(up, "method", nearest).__name__
        gated = getattr(merge, "on_coarse_grid", False)
        ups.append(Ascent(up.stride[index], coarse, fine, block, method, gated))
    down = parts.encoder(parent=None).steps(index)
    valid = model.padding == "valid"
    return Axis(down, tuple(ups), model.head_kernel, valid, decoder.nested)


def axes(model: UNet, rank: int) -> tuple[Axis, ...]:
    """A net along each of its spatial axes."""
    return tuple(axis(model, index, rank) for index in range(rank))


def check_joins(model: UNet) -> None:
    """Refuses to follow pixels through a net that joins skips after up-sampling late.

    Raises:
        InputError: The decoder is ``late_up``, of which no fields are computed.
    """
    if class_of(chosen(DECODERS, model.decoder, "decoder")) is DECODERS["late_up"]:
        raise InputError(
            "model.decoder = 'late_up' joins a skip before it up-samples, and cannot be"
            " drawn or followed pixel by pixel: use it to predict, train and convert."
        )


def output_size(model: UNet, size: Sequence[int]) -> Shape:
    """The spatial size of the logits for an image of spatial size ``size``.

    Raises:
        InputError: A valid net does not work at this size; names the nearest that do.
    """
    if model.padding != "valid":
        return tuple(size)
    out = []
    for n, along in zip(size, axes(model, len(size)), strict=True):
        along.sizes(n)  # refuses what does not work
        out.append(along.out(n) or 0)
    return tuple(out)


def margin(model: UNet, rank: int) -> Shape:
    """Pixels that a valid net loses at each side of each axis, 0 for the others.

    92 for the paper's net.
    """
    return tuple(along.margin for along in axes(model, rank))


def covering_axes(model: UNet, rank: int, *, space: int = 1) -> tuple[Axis, ...]:
    """The axes by which whole images are padded: those of the net.

    But of the whole net, if one with padded convolutions is cut off at a level: then
    its output is that of the whole net's head also at the border.

    Args:
        model: The net.
        rank: Spatial axes.
        space: How many devices share the first axis.
    """
    whole = model if model.padding == "valid" else model.clone(level=None)
    first, *others = axes(whole, rank)
    parts = space * coarsest_rows(model) if space > 1 else 1
    return first._replace(parts=parts), *others


def coarsest_rows(model: UNet) -> int:
    """The fewest rows of the coarsest map that a device of several can work on.

    One, and twice half a kernel where convolutions see their map mirrored: for the
    gradient of a kernel, XLA gathers all rows where a device has fewer to mirror from.
    """
    if model.padding != "reflect":
        return 1
    kernels = (*model.kernels, *model.decoder_kernels) or (3,)
    kernels = [k if isinstance(k, int) else k[0] for k in kernels]
    return 2 * max(1, *(k // 2 for k in kernels))


def fitting_rows(model: UNet, rows: int, rank: int) -> int:
    """The largest size up to ``rows`` that a net works at along its first axis.

    Args:
        model: The net.
        rows: A size.
        rank: Spatial axes.
    """
    return axis(model, 0, rank).fitting(rows)


def pads(model: UNet, size: Sequence[int], *, space: int = 1) -> Pads:
    """The mirror padding with which the net's output covers an image of any size.

    Everything that runs a net on whole images (evaluate, predict, export) pads by this,
    runs, and keeps the first ``size`` pixels of the output: so their numbers agree, and
    few shapes compile, because the padded size is a multiple of the strides' product
    (plus a constant, for valid padding).

    Args:
        model: The net.
        size: The image's spatial size, at least 1 along each axis. May be symbolic
            dimensions of `jax.export` unless ``padding="valid"``.
        space: How many devices share the first axis, see `unet_jax.geometry.Axis`.

    Returns:
        Pixels to mirror (before, after) along each axis.
    """
    along = covering_axes(model, len(size), space=space)
    return tuple(a.pads(n) for a, n in zip(along, size, strict=True))


# --- Cutting off ---------------------------------------------------------------------


def prune(
    model: UNet, variables: PyTree, level: int, *, channels: int, rank: int
) -> tuple[UNet, PyTree]:
    """The net cut off at a level, with the variables that it still needs.

    Args:
        model: A net with deep supervision.
        variables: Of the whole net.
        level: 1 to the depth.
        channels: Of the image.
        rank: Spatial axes of the image.

    Returns:
        The smaller net and its variables: the same arrays, fewer of them.

    Raises:
        InputError: No such level, or no head there.
    """
    small = model.clone(level=level)
    check(small)
    size = [1 + sum(pad) for pad in pads(small, (1,) * rank)]
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    needed = jax.eval_shape(small.init, jax.random.key(0), image)

    def keep(needed: Any, owned: Any) -> Any:
        if not isinstance(needed, Mapping):
            return owned
        return {key: keep(value, owned[key]) for key, value in needed.items()}

    return small, keep(needed, variables)


# --- Named nets ----------------------------------------------------------------------

UNetPlusPlus = partial(UNet, decoder="unetpp", deep_supervision=True)
"""UNet++ with deep supervision: a U-Net with another decoder."""

_RESNET = {"decoder_features": (16, 32, 64, 128, 256), "up": "nearest"}
_RESNET |= {"merge": "concat_up_first", "head_kernel": 3}
_RESNET18 = (0, 64, 64, 128, 256, 512)  # and of ResNet-34
_RESNET50 = (0, 64, 256, 512, 1024, 2048)

MODELS: dict[str, Callable[..., UNet]] = {
    # The U-Net that PyTorch users know: same padding, batch norm.
    "unet": UNet,
    # Ronneberger et al. 2015, arXiv 1505.04597: 31,030,658 parameters for one channel
    # in and two classes out. The dropout rate is not in the paper; 0.5 is Caffe's.
    "unet_2015": partial(UNet, padding="valid", norm="none", dropout=0.5),
    # Without up-convolutions: the bottleneck keeps its channels, and the decoder's
    # first convolutions halve what the interpolation does not.
    "unet_bilinear": partial(
        UNet,
        features=(64, 128, 256, 512, 512),
        decoder_features=(64, 64, 128, 256),
        decoder_block="narrowing",
        up="bilinear_aligned",
    ),
    "unet_shallow": partial(UNet, features=(32, 64, 128), conv_bias=True),
    # The two that arXiv 1807.10165, table 2, compares UNet++ with.
    "unet_32": partial(UNet, features=(32, 64, 128, 256, 512), norm="none"),
    "unet_wide": partial(UNet, features=(35, 70, 140, 280, 560), norm="none"),
    "unetpp": UNetPlusPlus,
    # Zhou et al. 2018, arXiv 1807.10165: no norm; dropout 0.5 as in the authors' code.
    "unetpp_2018": partial(
        UNetPlusPlus, features=(32, 64, 128, 256, 512), norm="none", dropout=0.5
    ),
    # Oktay et al. 2018, arXiv 1804.03999: gates on the grid of the coarse map.
    "attention_unet": partial(UNet, merge="gated"),
    # The form of most 2-D implementations: gates at full resolution.
    "attention_unet_full": partial(
        UNet, merge="gated_full", up="nearest_conv", conv_bias=True
    ),
    # Zhang et al. 2017, arXiv 1711.10684: seven levels in all, no pooling.
    "resunet": partial(
        UNet,
        features=(64, 128, 256, 512),
        block="preactivation",
        down="strided",
        up="nearest",
    ),
    # Alom et al. 2018, arXiv 1802.06955, and the same with attention gates.
    "r2unet": partial(UNet, block="recurrent", up="nearest_conv", conv_bias=True),
    "r2attention_unet": partial(
        UNet,
        block="recurrent",
        up="nearest_conv",
        merge="gated_full",
        conv_bias=True,
    ),
    # Cicek et al. 2016, arXiv 1606.06650: for volumes, but any rank will do.
    "unet_3d": partial(
        UNet,
        features=(64, 128, 256, 512),
        padding="valid",
        block="widening",
        decoder_block="plain",
        up_features="input",
        up_bias=False,
        conv_bias=True,
    ),
    # Chen et al. 2021, arXiv 2102.04306: self-attention at the coarsest level.
    "unet_transformer": partial(
        UNet, features=(32, 64, 128, 256, 512), bottleneck="transformer"
    ),
    # He et al. 2015, arXiv 1512.03385, as encoder.
    "unet_resnet18": partial(UNet, encoder="resnet18", features=_RESNET18, **_RESNET),
    "unet_resnet34": partial(UNet, encoder="resnet34", features=_RESNET18, **_RESNET),
    "unet_resnet50": partial(UNet, encoder="resnet50", features=_RESNET50, **_RESNET),
    "unetpp_resnet34": partial(
        UNet, encoder="resnet34", decoder="unetpp", features=_RESNET18, **_RESNET
    ),
}


def _tuples(value: Any) -> Any:
    """Lists, as JSON gives them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def build(name: str, **fields: Any) -> UNet:
    """A named net with some of its fields set.

    Args:
        name: A key of `MODELS`.
        **fields: Fields of the net; lists, as JSON gives them, become tuples.

    Returns:
        The module.

    Raises:
        InputError: No net of that name, or fields that no net can have.
        TypeError: No field of that name.
    """
    factory = choose(MODELS, name, "model.name =")
    model = factory(**{key: _tuples(value) for key, value in fields.items()})
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
