"""Pooling and up-sampling against lax, against NumPy, and against their definition."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import layers, norms, resample, sharding
from unet_jax.compiled import collectives


def _random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


POOLED = [
    ((6, 8), (2, 2)),
    ((7, 5), (2, 2)),  # an odd last row and column are dropped
    ((7, 5), (3, 2)),
    ((4, 6, 5), (2, 2, 2)),
    ((3, 6, 5), (1, 2, 2)),
]


@pytest.mark.parametrize(("size", "window"), POOLED)
def test_max_pool_equals_reduce_window_in_value_and_gradient(rng, size, window):
    # Integers, so that ties are common: the first maximum must take the gradient.
    x = jnp.asarray(rng.integers(0, 3, (2, *size, 3)), jnp.float32)
    ours, back = jax.vjp(partial(resample.max_pool, stride=window), x)
    theirs, lax_back = jax.vjp(lambda x: nn.max_pool(x, window, window), x)
    chex.assert_trees_all_equal(ours, theirs)
    g = _random(rng, *ours.shape)
    chex.assert_trees_all_equal(back(g), lax_back(g))


def test_max_pool_of_equals_gives_the_gradient_to_the_first():
    x = jnp.zeros((1, 4, 6, 1))
    gradient = jax.grad(lambda x: jnp.sum(resample.max_pool(x, (2, 3))))(x)
    expected = np.zeros((4, 6))
    expected[::2, ::3] = 1
    np.testing.assert_array_equal(gradient[0, ..., 0], expected)


@pytest.mark.parametrize(("size", "window"), POOLED[2:4])
def test_max_pool_goes_forwards_as_it_goes_back_and_mapped(rng, size, window):
    # Whole numbers, with ties, so that both sums are exact.
    x, towards = jnp.asarray(rng.integers(-3, 3, (2, 2, *size, 3)), jnp.float32)
    pool = partial(resample.max_pool, stride=window)
    y, slope = jax.jvp(pool, (x,), (towards,))
    again, back = jax.vjp(pool, x)
    chex.assert_trees_all_equal(y, again)
    g = jnp.asarray(rng.integers(-3, 3, y.shape), jnp.float32)
    assert jnp.sum(g * slope) == jnp.sum(back(g)[0] * towards) != 0
    chex.assert_trees_all_equal(jax.linearize(pool, x)[1](towards), slope)
    both = jnp.stack([x, towards])
    chex.assert_trees_all_equal(
        jax.vmap(pool)(both), jnp.stack([pool(x), pool(towards)])
    )
    mapped = jax.vmap(lambda x: jax.vjp(pool, x)[1](g)[0])(both)
    expected = jnp.stack([back(g)[0], jax.vjp(pool, towards)[1](g)[0]])
    chex.assert_trees_all_equal(mapped, expected)


@pytest.mark.parametrize(("size", "window"), POOLED[2:4])
def test_max_pool_has_the_second_derivatives_of_a_maximum(rng, size, window):
    def plain(x):
        pooled = [n // w for n, w in zip(size, window, strict=True)]
        x = x[(slice(None), *map(slice, np.multiply(pooled, window)))]
        split = [n for pair in zip(pooled, window, strict=True) for n in pair]
        x = x.reshape(len(x), *split, x.shape[-1])
        return jnp.max(x, tuple(range(2, x.ndim - 1, 2)))

    with jax.enable_x64(True):
        x, towards = jnp.asarray(rng.standard_normal((2, 2, *size, 3)))

        def second(pool):
            def gradient(x):
                return jax.grad(lambda x: jnp.sum(jnp.sin(pool(jnp.exp(x)))))(x)

            def of_gradient(x):
                return jnp.sum(jnp.cos(gradient(x)))

            hessian = jax.jvp(gradient, (x,), (towards,))[1]
            return hessian, jax.grad(of_gradient)(x)

        ours = jax.jit(second, static_argnums=0)(
            partial(resample.max_pool, stride=window)
        )
        chex.assert_trees_all_close(
            ours, jax.jit(second, static_argnums=0)(plain), rtol=0, atol=1e-12
        )


def test_max_pool_keeps_nan_and_axes_of_one():
    x = jnp.asarray([[1.0, jnp.nan, 3.0, 2.0]]).reshape(1, 1, 4, 1)
    out = resample.max_pool(x, (2, 2))
    chex.assert_shape(out, (1, 1, 2, 1))
    assert np.isnan(out[0, 0, 0, 0]) and out[0, 0, 1, 0] == 3.0


@pytest.mark.parametrize("place", range(8))
def test_a_nan_anywhere_in_a_window_comes_through(rng, place):
    window = np.array(rng.standard_normal(8), np.float32)
    window[place] = np.nan
    x = jnp.asarray(window.reshape(1, 2, 2, 2, 1))
    y, back = jax.vjp(lambda x: resample.max_pool(x, (2, 2, 2)), x)
    assert jnp.isnan(y.ravel()[0])
    (gradient,) = back(jnp.ones_like(y))
    np.testing.assert_array_equal(gradient.ravel(), np.arange(8) == place)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool_keeps_a_byte_for_each_window(rng, dtype):
    x = _random(rng, 2, 8, 6, 16).astype(dtype)
    kept = jax.tree.leaves(jax.vjp(lambda x: resample.max_pool(x, (2, 2)), x)[1])
    # Beside the numbers of the four places.
    (places,) = (leaf for leaf in kept if leaf.size > 4)
    assert places.dtype == jnp.uint8
    assert places.size == x.size // 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_max_pool_keeps_the_type(rng, dtype):
    x = _random(rng, 2, 4, 5, 3).astype(dtype)
    y, back = jax.vjp(lambda x: resample.max_pool(x, (2, 2)), x)
    expected = nn.max_pool(x.astype(jnp.float32), (2, 2), (2, 2))
    assert y.dtype == back(y)[0].dtype == dtype
    chex.assert_trees_all_equal(y.astype(jnp.float32), expected)


@pytest.mark.parametrize("rank", [2, 3])
def test_up_conv_is_the_transposed_convolution(rng, rank):
    x = _random(rng, 2, *(4, 3, 5)[:rank], 6)
    module = resample.UpConv(features=4)
    variables = module.init(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    chex.assert_shape(kernel, (*(2,) * rank, 6, 4))
    variables["params"]["bias"] = _random(rng, 4)
    # lax lets tap k - 1 - i fill pixel 2 y + i, hence the flip.
    flipped = jnp.flip(kernel, tuple(range(rank)))
    spec = ("NHWC", "HWIO", "NHWC") if rank == 2 else ("NDHWC", "DHWIO", "NDHWC")
    expected = jax.lax.conv_transpose(
        x, flipped, (2,) * rank, "VALID", dimension_numbers=spec
    )
    bias = variables["params"]["bias"].reshape((1,) * (rank + 1) + (4,))
    chex.assert_trees_all_close(module.apply(variables, x), expected + bias, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (1, 5), (3, 2, 4)])
def test_linear_upsampling_equals_image_resize(rng, size):
    x = _random(rng, 2, *size, 3)
    shape = (2, *(2 * n for n in size), 3)
    expected = jax.image.resize(x, shape, "linear")
    chex.assert_trees_all_close(
        resample.linear(x, (2,) * len(size)), expected, atol=1e-6
    )


@pytest.mark.parametrize("size", [(4, 6), (1, 5), (3, 2, 4)])
def test_aligned_upsampling_equals_interpolation_between_the_corners(rng, size):
    x = _random(rng, 2, *size, 3)
    expected = np.asarray(x, np.float64)
    for axis, n in enumerate(size, start=1):
        at = np.linspace(0, n - 1, 2 * n)
        expected = np.apply_along_axis(
            lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, expected
        )
    out = resample.linear_aligned(x, (2,) * len(size))
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "stride"),
    [((4, 6), (2, 2)), ((1, 5), (2, 3)), ((2, 9), (5, 1)), ((3, 2, 4), (3, 2, 4))],
)
@pytest.mark.parametrize("how", ["linear", "linear_aligned"])
def test_interpolation_is_a_product_with_hats(rng, how, size, stride):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, *size, 3)))

        def hats(x):
            for axis, (n, factor) in enumerate(zip(size, stride, strict=True), 1):
                at = {
                    "linear": (np.arange(factor * n) + 0.5) / factor - 0.5,
                    "linear_aligned": np.linspace(0, n - 1, factor * n),
                }[how].clip(0, n - 1)
                weights = 1 - np.abs(at[:, None] - np.arange(n)).clip(0, 1)
                x = jnp.moveaxis(jnp.tensordot(weights, x, ((1,), (axis,))), 0, axis)
            return x

        shape = (2, *(n * s for n, s in zip(size, stride, strict=True)), 3)
        g = jnp.asarray(rng.standard_normal(shape))

        @partial(jax.jit, static_argnums=0)
        def both(function, x):
            y, back = jax.vjp(function, x)
            return y, back(g)

        ours = both(partial(getattr(resample, how), stride=stride), x)
        chex.assert_trees_all_close(ours, both(hats, x), rtol=0, atol=1e-12)


def test_nearest_upsampling_repeats(rng):
    x = _random(rng, 1, 2, 3, 1)
    out = resample.nearest(x, (2, 2))
    np.testing.assert_array_equal(out, np.asarray(x).repeat(2, 1).repeat(2, 2))


# --- To any size ---------------------------------------------------------------------


def _interpolated(x, size, how):
    """Axis by axis, from the position of every new pixel between the old ones."""
    for axis, new in enumerate(size, start=1):
        n = x.shape[axis]
        at = {
            "linear": (np.arange(new) + 0.5) * n / new - 0.5,
            "linear_aligned": np.linspace(0, n - 1, new),
        }[how]
        x = np.apply_along_axis(
            lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, x
        )
    return x


SIZES = [
    ((4, 6), (7, 4)),
    ((3, 5), (9, 8)),  # one axis a multiple, the other not
    ((1, 7), (3, 3)),
    ((5, 2), (1, 2)),
    ((2, 3, 4), (3, 4, 9)),
]


@pytest.mark.parametrize(("size", "new"), SIZES)
@pytest.mark.parametrize("how", ["linear", "linear_aligned"])
def test_interpolation_to_any_size_is_that_between_positions(rng, how, size, new):
    x = rng.standard_normal((2, *size, 3))
    with jax.enable_x64(True):
        out = resample.to_size(jnp.asarray(x), new, getattr(resample, how))
        assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, _interpolated(x, new, how), atol=1e-12)


@pytest.mark.parametrize(("size", "new"), SIZES)
def test_nearest_to_any_size_takes_the_floor(rng, size, new):
    x = rng.standard_normal((2, *size, 3)).astype(np.float32)
    index = [np.arange(m) * n // m for n, m in zip(size, new, strict=True)]
    expected = x[np.ix_(range(2), *index, range(3))]
    np.testing.assert_array_equal(resample.to_size(jnp.asarray(x), new), expected)


@pytest.mark.parametrize(
    ("n", "new", "index", "pixel"), [(26, 22, 11, 12), (14, 46, 23, 6)]
)
def test_nearest_rounds_as_float32_does(n, new, index, pixel):
    # Where `index * n / new` is a whole number, and float32 falls short of it.
    assert index * n == (pixel + 1) * new
    x = jnp.arange(n, dtype=jnp.float32).reshape(1, 1, n, 1)
    out = np.asarray(resample.to_size(x, (1, new))).ravel()
    assert out[index] == pixel
    others = np.arange(new) != index
    np.testing.assert_array_equal(out[others], (np.arange(new) * n // new)[others])


@pytest.mark.parametrize("how", ["linear", "linear_aligned", "nearest"])
def test_to_a_multiple_it_is_the_plain_method(rng, how):
    method = getattr(resample, how)
    x = _random(rng, 1, 3, 2, 4, 2)
    out = resample.to_size(x, (6, 2, 12), method)
    chex.assert_trees_all_equal(out, method(x, (2, 1, 3)))
    assert resample.to_size(x, (3, 2, 4), method) is x


# --- What PyTorch's nets have --------------------------------------------------------


def _kit():
    """Bare convolutions in float64, as PyTorch pads them."""
    init = layers.INITIALISERS["he_normal"]
    options = {"use_bias": False, "dtype": jnp.float64}
    return layers.Kit(
        conv=layers.conv_factory(padding="same", init=init, **options),
        dense=partial(nn.Dense, kernel_init=init, **options),
        norm=norms.norm_factory("none", train=False),
        act=layers.act_factory("relu"),
        excite=lambda name: lambda x: x,
        up_conv=partial(resample.up_convolution, dtype=jnp.float64),
    )


def _run(module, x, rng, *given):
    """The output in float64 for random variables, and these."""
    with jax.enable_x64(True):
        with jax.numpy_dtype_promotion("standard"):  # parameters begin as float32
            shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), shapes)
        y = module.apply(variables, jnp.asarray(x), *given)
        assert y.dtype == jnp.float64
    return np.asarray(y), variables.get("params", {})


def _scattered(x, kernel, stride, size):
    """Every tap adds its product to its pixel, if the result has it."""
    *taps, _, features = kernel.shape
    out = np.zeros((len(x), *size, features))
    for pixel in np.ndindex(*x.shape[1:-1]):
        for tap in np.ndindex(*taps):
            at = [
                s * p + t - (k - 1) // 2
                for s, p, t, k in zip(stride, pixel, tap, taps, strict=True)
            ]
            if all(0 <= a < n for a, n in zip(at, size, strict=True)):
                out[(slice(None), *at)] += x[(slice(None), *pixel)] @ kernel[tap]
    return out


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        ((3, 3), (2, 2)),
        ((5, 5), (2, 2)),
        ((4, 4), (2, 2)),
        ((3, 3), (1, 1)),
        ((5, 3), (3, 1)),
        ((3, 3, 3), (2, 2, 2)),
        ((5, 4, 3), (2, 2, 1)),
        ((1, 5, 3), (1, 2, 2)),
    ],
)
def test_a_wide_up_convolution_scatters(rng, kernel, stride):
    x = rng.standard_normal((2, *(3, 4, 2)[: len(kernel)], 3))
    module = resample.WideUpConv(2, stride, kernel, dtype=jnp.float64)
    y, params = _run(module, x, rng)
    assert params["kernel"].shape == (*kernel, 3, 2)
    size = [n * s for n, s in zip(x.shape[1:-1], stride, strict=True)]
    expected = _scattered(x, params["kernel"], stride, size) + params["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride"), [((3, 3), (2, 2)), ((5, 3), (3, 1)), ((3, 1, 5), (2, 1, 2))]
)
def test_a_short_one_lacks_the_last_pixels(rng, kernel, stride):
    x = rng.standard_normal((1, *(3, 4, 2)[: len(kernel)], 3))
    module = resample.WideUpConv(
        2, stride, kernel, short=True, use_bias=False, dtype=jnp.float64
    )
    y, params = _run(module, x, rng)
    assert set(params) == {"kernel"}
    size = [n * s - (s - 1) for n, s in zip(x.shape[1:-1], stride, strict=True)]
    expected = _scattered(x, params["kernel"], stride, size)
    np.testing.assert_allclose(y, expected, atol=1e-12)


def _dilated(x, kernel, stride, *, short):
    """A transposed convolution as lax has it: zeros between the pixels."""
    taps = kernel.shape[:-2]
    pads = []
    for size, s in zip(taps, stride, strict=True):
        before, centre = size - 1 - (size - 1) // 2, (size - 1) // 2
        pads.append((before, before + (0 if short else s + 2 * centre - size)))
    space = "DHW"[3 - len(taps) :]
    return jax.lax.conv_general_dilated(
        x,
        jnp.flip(kernel, range(len(taps))),
        (1,) * len(taps),
        pads,
        lhs_dilation=stride,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    )


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        # Every kernel of 2 to 5 with every stride of 1 to 3.
        ((2, 5), (1, 3)),
        ((3, 4), (1, 2)),
        ((4, 3), (1, 3)),
        ((5, 2), (1, 2)),
        ((2, 5), (3, 2)),
        ((3, 4), (2, 3)),
        ((2, 5, 3), (2, 3, 1)),
    ],
)
def test_a_wide_up_convolution_is_that_of_a_dilated_input(rng, kernel, stride, short):
    module = resample.WideUpConv(
        2, stride, kernel, short=short, use_bias=False, dtype=jnp.float64
    )
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, *(4, 3, 2)[: len(kernel)], 3)))
        w = jnp.asarray(rng.standard_normal((*kernel, 3, 2)))
        g = jnp.asarray(rng.standard_normal(_dilated(x, w, stride, short=short).shape))

        @partial(jax.jit, static_argnums=0)
        def both(function, *given):
            y, back = jax.vjp(function, *given)
            return y, back(g)

        ours = both(lambda x, w: module.apply({"params": {"kernel": w}}, x), x, w)
        expected = both(partial(_dilated, stride=stride, short=short), x, w)
        chex.assert_trees_all_close(ours, expected, rtol=0, atol=1e-12)


def test_a_wide_up_convolution_of_its_strides_size_is_the_plain_one(rng):
    x = rng.standard_normal((1, 3, 2, 4))
    wide = resample.WideUpConv(5, (2, 2), (2, 2), dtype=jnp.float64)
    y, params = _run(wide, x, rng)
    with jax.enable_x64(True):
        plain = resample.UpConv(5, dtype=jnp.float64).apply({"params": params}, x)
    np.testing.assert_allclose(y, plain, atol=1e-12)


@pytest.mark.parametrize("stride", [(2, 2), (3, 1), (2, 1, 2)])
def test_a_blurred_pixel_shuffle_is_the_mean_with_the_pixels_before(rng, stride):
    rank = len(stride)
    x = rng.standard_normal((2, *(3, 4, 2)[:rank], 3))
    options = {"kernel": (1,) * rank, "kit": _kit(), "stride": stride}
    y, params = _run(resample.UPS["pixel_shuffle_blurred"](2, **options), x, rng)
    # Its convolution has a bias, although the kit's have none.
    z = x @ params["conv"]["kernel"].reshape(3, -1) + params["conv"]["bias"]
    z = z.reshape(*x.shape[:-1], *stride, 2)
    sharp = np.asarray(resample.depth_to_space(z, stride))
    expected = np.zeros_like(sharp)
    for pixel in np.ndindex(*sharp.shape[1:-1]):
        window = [
            slice(max(p - s + 1, 0), p + 1) for p, s in zip(pixel, stride, strict=True)
        ]
        # Beyond the border are zeros, which count.
        total = sharp[(slice(None), *window)].sum(tuple(range(1, rank + 1)))
        expected[(slice(None), *pixel)] = total / np.prod(stride)
    np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize("new", [None, (7, 5)])
def test_bilinear_then_dense(rng, new):
    x = rng.standard_normal((2, 3, 2, 4))
    options = {"stride": (2, 3), "kernel": (3, 3), "kit": _kit()}
    for features in (4, 3):  # a convolution in either case
        module = resample.UPS["bilinear_dense"](features, **options)
        y, params = _run(module, x, rng, new)
        large = _interpolated(x, new or (6, 6), "linear")
        expected = large @ params["conv"]["kernel"] + params["conv"]["bias"]
        np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize("new", [None, (7, 5)])
def test_dense_then_bilinear_only_where_channels_change(rng, new):
    x = rng.standard_normal((2, 3, 2, 4))
    options = {"stride": (2, 3), "kernel": (3, 3), "kit": _kit()}
    y, params = _run(resample.UPS["dense_bilinear_aligned"](3, **options), x, rng, new)
    small = x @ params["conv"]["kernel"] + params["conv"]["bias"]
    expected = _interpolated(small, new or (6, 6), "linear_aligned")
    np.testing.assert_allclose(y, expected, atol=1e-12)
    y, params = _run(resample.UPS["dense_bilinear_aligned"](4, **options), x, rng, new)
    assert not params
    expected = _interpolated(x, new or (6, 6), "linear_aligned")
    np.testing.assert_allclose(y, expected, atol=1e-12)


# --- Over devices --------------------------------------------------------------------


class _Up(nn.Module):
    """An interpolation, as a module without parameters."""

    method: resample.Method
    stride: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return self.method(x, self.stride)


@pytest.mark.parametrize(
    "module",
    [
        _Up(resample.linear, (2, 2)),
        _Up(resample.linear_aligned, (3, 2)),
        resample.WideUpConv(4, (2, 2), (3, 3)),
        resample.WideUpConv(4, (2, 2, 2), (3, 3, 3)),
    ],
)
def test_of_maps_over_devices_only_borders_move(rng, module):
    x = _random(rng, 2, *(8, 6, 4)[: len(module.stride)], 3)
    variables = module.init(jax.random.key(0), x)
    mesh = sharding.make_mesh(1, 2)
    whole, rows = sharding.replicated(mesh), sharding.split(mesh, x.ndim)

    def loss(variables, x):
        return jnp.sum(jnp.sin(module.apply(variables, x)))

    def compiled_for(fn, out):
        within = jax.jit(
            sharding.within(mesh, fn), in_shardings=(whole, rows), out_shardings=out
        )
        program = within.lower(variables, x).compile()
        return program, collectives(program.as_text())

    def placed():
        return jax.device_put(variables, whole), jax.device_put(x, rows)

    program, found = compiled_for(module.apply, rows)
    assert set(found) == {"collective-permute"}
    chex.assert_trees_all_close(
        jax.device_get(program(*placed())), module.apply(variables, x), atol=1e-5
    )
    program, found = compiled_for(jax.grad(loss, (0, 1)), (whole, rows))
    # Sums are of the gradients of parameters.
    learnt = {"all-reduce"} if variables else set()
    assert set(found) == {"collective-permute"} | learnt
    chex.assert_trees_all_close(
        jax.device_get(program(*placed())),
        jax.grad(loss, (0, 1))(variables, x),
        atol=1e-4,
    )
