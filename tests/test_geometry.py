"""Sizes against real convolutions, and receptive fields against real gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import models
from unet_jax.encoders import ResNetEncoder
from unet_jax.geometry import conv_size, conv_transpose_size
from unet_jax.types import InputError

# --- Convolutions --------------------------------------------------------------------


def convolved(size, kernel, **options):
    """The size that XLA gives a convolution along one axis."""
    out = jax.eval_shape(
        functools.partial(
            jax.lax.conv_general_dilated,
            dimension_numbers=("NWC", "WIO", "NWC"),
            **options,
        ),
        jax.ShapeDtypeStruct((1, size, 1), jnp.float32),
        jax.ShapeDtypeStruct((kernel, 1, 1), jnp.float32),
    )
    return out.shape[1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 40),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.integers(1, 3),
)
def test_conv_size_is_xlas(size, kernel, stride, padding, dilation):
    real = convolved(
        size,
        kernel,
        window_strides=(stride,),
        padding=[padding],
        rhs_dilation=(dilation,),
    )
    ours = conv_size(
        size, kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )
    assert ours == real


@pytest.mark.parametrize(
    ("size", "options", "out"),
    [
        (572, {"kernel": 3}, 570),
        (568, {"kernel": 2, "stride": 2}, 284),
        (7, {"kernel": 3, "stride": 2, "padding": 1}, 4),
        (224, {"kernel": 7, "stride": 2, "padding": 3}, 112),
        (10, {"kernel": 3, "dilation": 2}, 6),
        (2, {"kernel": 3}, 0),
    ],
)
def test_conv_size_by_hand(size, options, out):
    assert conv_size(size, **options) == out


@pytest.mark.parametrize(
    ("options", "out"),
    [
        ({"kernel": 2, "stride": 2}, lambda n: 2 * n),
        (
            {"kernel": 3, "stride": 2, "padding": 1, "output_padding": 1},
            lambda n: 2 * n,
        ),
        ({"kernel": 4, "stride": 2, "padding": 1}, lambda n: 2 * n),
        ({"kernel": 3, "stride": 2, "padding": 1}, lambda n: 2 * n - 1),
        ({"kernel": 3, "stride": 1}, lambda n: n + 2),
        ({"kernel": 3, "stride": 2, "dilation": 2}, lambda n: 2 * n + 3),
    ],
)
def test_conv_transpose_size_is_pytorchs(options, out):
    for n in (1, 2, 7, 28):
        assert conv_transpose_size(n, **options) == out(n)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 20),
    kernel=st.integers(1, 6),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    output_padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
)
def test_conv_transpose_size_is_xlas(
    size, kernel, stride, padding, output_padding, dilation
):
    # PyTorch defines it as the gradient of a convolution: the input spread out by the
    # stride, the kernel run over it with its reach less the padding around it.
    reach = dilation * (kernel - 1) - padding
    ours = conv_transpose_size(
        size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
    )
    real = convolved(
        size,
        kernel,
        window_strides=(1,),
        padding=[(reach, reach + output_padding)],
        lhs_dilation=(stride,),
        rhs_dilation=(dilation,),
    )
    assert ours == real


# --- Sizes ---------------------------------------------------------------------------


def column(**fields):
    """A net that works along one axis only, on images as narrow as its head."""
    features = fields.setdefault("features", (1, 2, 1))
    kernels = fields.pop("kernels", (3,) * len(features))
    strides = fields.pop("strides", (2,) * (len(features) - 1))
    fields["kernels"] = tuple((k, 1) for k in kernels)
    fields["strides"] = tuple((s, 1) for s in strides)
    return models.UNet(num_classes=1, norm="none", **fields)


def run(model, size, channels=1):
    """Shapes of ``(logits, aux)`` and of the variables."""
    image = jax.ShapeDtypeStruct((1, size, model.head_kernel, channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"down": "strided", "kernels": (5, 3, 3), "strides": (3, 2)},
        {"down": "strided", "block": "recurrent"},
        {"padding": "valid"},
        {"padding": "valid", "up": "nearest_conv", "strides": (3, 2)},
        {"padding": "valid", "up": "pixel_shuffle", "head_kernel": 3},
        {"decoder": "unetpp", "padding": "valid", "head_kernel": 5},
    ],
)
def test_sizes_are_those_of_the_maps(fields):
    model = column(**fields)
    along = models.axis(model, 0, 2)
    sizes = range(1, 12)
    if model.padding == "valid":
        sizes = [n for n in range(30, 90) if along.out(n)][:3]
    for size in sizes:
        (logits, aux), _ = run(model, size)
        found = [[x.shape[1] for x in aux[k]] for k in ("encoder", "decoder")]
        assert list(along.sizes(size)) == found
        assert along.out(size) == logits.shape[1]


def test_sizes_and_cells_of_the_paper():
    along = models.axis(models.build("unet_2015", num_classes=2), 0, 2)
    assert along.sizes(572) == ([568, 280, 136, 64, 28], [388, 196, 100, 52])
    # The middle stays the middle; the border is lost, and its nearest cell taken.
    assert along.cell_down(572, 286) == [284, 140, 68, 32, 14]
    assert along.cell_up(572, 286) == [194, 98, 50, 26]
    assert along.cell_up(572, 0) == [0, 0, 0, 0]
    assert along.cell_down(572, 571) == [567, 279, 135, 63, 27]
    with pytest.raises(InputError, match=r"571 .* use 556 or 572"):
        along.sizes(571)
    with pytest.raises(InputError, match="use 188, the smallest"):
        along.field(7, 0)
    with pytest.raises(ValueError, match="no cell 388"):
        along.field(572, 388)


def test_cells_of_a_padded_net_cover_their_pixel():
    along = models.axis(models.UNet(num_classes=2, features=(2, 2, 2)), 0, 2)
    assert along.sizes(7) == ([7, 3, 1], [7, 3])
    assert along.cell_down(7, 5) == [5, 2, 0]
    assert along.cell_up(7, 6) == [6, 2]  # the last row is not pooled: its neighbour
    assert along.cell_down(1, 0) == [0, 0, 0]


@pytest.mark.parametrize("name", ["unet", "unet_2015", "unet_3d", "resunet", "unetpp"])
def test_a_cell_sees_the_pixel_it_lies_over(name):
    along = models.axis(models.build(name, num_classes=2), 0, 2)
    size = next(along.working_sizes(230))
    down, up = along.sizes(size)
    pixels = range(60, 170, 7)
    if along.valid:  # elsewhere no cell lies over the pixel
        pixels = range(along.margin, size - along.margin, 7)
    for pixel in pixels:
        for level, cell in enumerate(along.cell_down(size, pixel)):
            assert 0 <= cell < down[level]
            first, last = along.field_down(size, level, cell)
            assert first <= pixel <= last
        for level, cell in enumerate(along.cell_up(size, pixel)):
            assert 0 <= cell < up[level]
            first, last = along.field_up(size, level, cell)
            assert first <= pixel <= last
            if first > 0 and last < size - 1:  # about as far to both sides
                assert abs(2 * pixel - first - last) <= 2 * along.step


# --- Receptive fields ----------------------------------------------------------------


def supports(model, size):
    """The first and last pixel that each cell of each map depends on, and the holes.

    Weights and pixels are positive, so that no gradient vanishes by chance. Yields
    (kind, level, cell, (first, last), whether all between are seen).
    """
    rng = np.random.default_rng(0)

    def positive(shape):
        return rng.uniform(0.5, 1.0, shape).astype(np.float32)

    image = positive((size, model.head_kernel, 1))
    _, shapes = run(model, size)
    variables = jax.tree.map(lambda leaf: positive(leaf.shape), shapes)

    def profiles(rows):
        logits, aux = model.apply(variables, (image * rows[:, None, None])[None])
        maps = {("head", 0): logits}
        for kind in ("encoder", "decoder"):
            maps |= {(kind, i): x for i, x in enumerate(aux[kind]) if x.size}
        return {k: jnp.sum(x, (0, 2, 3)) for k, x in maps.items()}

    # Compiling is all that takes time here.
    fast = {"xla_backend_optimization_level": 0}
    jacobian = jax.jit(jax.jacfwd(profiles), compiler_options=fast)(jnp.ones(size))
    for (kind, level), matrix in jacobian.items():
        for cell, row in enumerate(np.asarray(matrix)):
            seen = np.flatnonzero(row)
            span = int(seen[0]), int(seen[-1])
            yield kind, level, cell, span, len(seen) == span[1] - span[0] + 1


def check_fields(model, size, *, exact=True, holes=False):
    along = models.axis(model, 0, 2)
    fields = {
        "encoder": along.field_down,
        "decoder": along.field_up,
        "head": lambda size, _, cell: along.field(size, cell),
    }
    for kind, level, cell, span, whole in supports(model, size):
        first, last = fields[kind](size, level, cell)
        where = (kind, level, cell, span)
        if exact:
            assert (first, last) == span, where
            assert whole or holes, where
        else:
            assert first <= span[0] and span[1] <= last, where


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 21),
        ({"kernels": (1, 3, 5), "up": "nearest", "head_kernel": 3}, 23),
        ({"kernels": (5, 1, 1), "strides": (3, 2)}, 26),
        ({"features": (1, 1), "up": "nearest_conv", "strides": (3,)}, 14),
        ({"up": "pixel_shuffle", "block": "residual"}, 19),
        ({"features": (1, 1), "block": "recurrent", "padding": "reflect"}, 31),
        ({"down": "strided", "block": "preactivation", "up": "nearest"}, 23),
        ({"down": "strided", "block": "residual", "strides": (2, 3)}, 31),
        ({"padding": "valid"}, 56),
        ({"padding": "valid", "up": "pixel_shuffle", "head_kernel": 3}, 64),
        ({"padding": "valid", "up": "nearest_conv", "block": "residual"}, 64),
        ({"down": "strided", "padding": "valid", "block": "preactivation"}, 61),
        ({"padding": "valid", "kernels": (5, 1, 3), "strides": (3, 2)}, 61),
        ({"up": "bilinear", "kernels": (1, 3, 1)}, 37),
        (
            {"up": "bilinear", "features": (1, 1), "strides": (3,), "kernels": (1, 1)},
            13,
        ),
        ({"up": "bilinear_aligned", "features": (1, 1), "strides": (3,)}, 32),
        ({"up": "bilinear_aligned", "padding": "valid", "kernels": (1, 3, 1)}, 24),
        ({"decoder": "unetpp", "kernels": (5, 1, 1)}, 27),
        ({"decoder": "unetpp", "padding": "valid", "strides": (2, 3)}, 80),
    ],
)
def test_fields_are_where_the_gradients_are(fields, size):
    model = column(**{"down": "average", **fields})
    check_fields(model, next(models.axis(model, 0, 2).working_sizes(size)))


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"features": (1, 1, 1), "kernels": (1, 1, 1)}, 30),
        ({"features": (1, 1, 1), "kernels": (3, 1, 1)}, 29),
        ({"features": (1, 1, 1), "padding": "valid", "up": "nearest_conv"}, 65),
    ],
)
def test_gates_on_the_coarse_grid_see_around(fields, size, monkeypatch):
    # A sigmoid of what is positive has no gradient left: any other function has.
    monkeypatch.setattr(nn, "sigmoid", lambda x: x)
    model = column(down="average", merge="gated", **fields)
    check_fields(model, next(models.axis(model, 0, 2).working_sizes(size)))
    plain = models.axis(model.clone(merge="concat"), 0, 2)
    assert plain.receptive_field <= models.axis(model, 0, 2).receptive_field


@pytest.mark.parametrize("down", ["max", "strided"])
def test_no_gradient_is_outside_the_field(down):
    fields = {"down": down, "decoder": "unetpp", "up": "nearest_conv"}
    check_fields(column(**fields), 22, exact=False)


def test_a_resnets_gradients_are_inside_the_field():
    model = models.build(
        "unet_resnet18",
        num_classes=1,
        encoder=functools.partial(ResNetEncoder, counts=(1, 1, 1, 1)),
        features=(0, 4, 4, 4, 4, 4),
        decoder_features=(2,) * 5,
        norm="none",
    )
    check_fields(model, 33, exact=False)


def widest(model, size):
    """The most pixels that a logit sees which sees no border."""
    along = models.axis(model, 0, 2)
    fields = [along.field(size, cell) for cell in range(along.out(size) or 0)]
    return max(b - a + 1 for a, b in fields if a > 0 and b < size - 1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"padding": "valid", "head_kernel": 3},
        {"up": "bilinear", "strides": (3, 2), "merge": "gated"},
        {"down": "strided", "decoder": "unetpp", "kernels": (5, 1, 3)},
        {"up": "bilinear_aligned", "strides": (3, 2)},
    ],
)
def test_the_receptive_field_is_the_largest_of_all(fields):
    model = column(**fields)
    along = models.axis(model, 0, 2)
    size = next(along.working_sizes(300))
    assert along.receptive_field == widest(model, size)
    assert len(along.seen_up()) == 2
    assert along.seen_up()[0] <= along.receptive_field


def test_receptive_fields_of_named_nets():
    # By hand: the two 3x3 convolutions of a level see 4 cells more, n cells lie in at
    # most n // 2 + 1 coarse ones, and pooling doubles them. Depth 2: 1 + 4 = 5 cells in
    # 3, with 4 more 7, in 4, with 4 more 8, which are 16 and with 4 more 20, which are
    # 40 and with 4 more 44.
    fields = {"unet_shallow": 44, "unet": 204, "unet_2015": 204, "unet_bilinear": 236}
    for name, field in fields.items():
        along = models.axis(models.build(name, num_classes=2), 0, 2)
        assert along.receptive_field == field
    down = [seen for seen, _ in along.seen_down()]
    assert down == [5, 14, 32, 68, 140]
    assert [row[0] for row in along.seen_grid()] == down
