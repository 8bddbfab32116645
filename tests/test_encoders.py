"""Encoders: sizes, pooling, dropout, and ResNet against the layers of its table."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import encoders, layers, models, norms, resample
from unet_jax.blocks import ResidualBlock


def _pyramid(model, size, channels=1):
    """The shapes of an encoder's maps without the batch, and its parameters'."""
    image = jax.ShapeDtypeStruct((2, *size, channels), jnp.float32)
    (_, aux), variables = jax.eval_shape(
        model.init_with_output, jax.random.key(0), image
    )
    return [x.shape[1:] for x in aux["encoder"]], variables["params"]["encoder"]


def _filled(model, x, rng):
    """Random parameters, which is faster than compiling `init`."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes
    )


# --- Down ----------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 3, 1), (2, 2, 2)])
def test_pooling_takes_windows_that_do_not_overlap(rng, stride):
    x = jnp.asarray(rng.standard_normal((2, 5, 6, 7, 3)), jnp.float32)
    window = (1, *stride, 1)
    largest = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    np.testing.assert_array_equal(resample.max_pool(x, stride), largest)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID")
    mean = resample.average_pool(x, stride)
    assert mean.shape == (
        2,
        *(n // s for n, s in zip((5, 6, 7), stride, strict=True)),
        3,
    )
    np.testing.assert_allclose(mean, total / float(np.prod(stride)), atol=1e-6)


def test_pooling_leaves_an_axis_shorter_than_its_window(rng):
    x = jnp.asarray(rng.standard_normal((1, 1, 4, 2, 1)), jnp.float32)
    pairs = np.asarray(x).reshape(1, 1, 2, 2, 2, 1)
    out = resample.max_pool(x, (2, 2, 3))
    np.testing.assert_array_equal(out, pairs.max(3))
    np.testing.assert_allclose(
        resample.average_pool(x, (2, 2, 3)), pairs.mean(3), atol=1e-7
    )


@pytest.mark.parametrize("down", sorted(resample.DOWNS))
def test_strided_convolutions_round_up_and_pooling_down(down):
    model = models.UNet(num_classes=1, features=(2, 3, 4), down=down)
    shapes, params = _pyramid(model, (7, 1))
    sizes = {"strided": [7, 4, 2]}.get(down, [7, 3, 1])
    assert shapes == [(n, 1, f) for n, f in zip(sizes, (2, 3, 4), strict=True)]
    assert set(params) == {"level0", "level1", "level2"}


def test_what_strides_is_the_first_convolution_of_the_next_level(rng):
    x = jnp.asarray(rng.standard_normal((1, 6, 7, 1)), jnp.float32)
    model = models.UNet(
        num_classes=1, features=(2, 3), down="strided", norm="none", strides=((3, 2),)
    )
    variables = _filled(model, x, rng)
    fine, coarse = jax.jit(lambda v, x: model.apply(v, x)[1]["encoder"])(variables, x)
    params = variables["params"]["encoder"]["level1"]
    spec = ("NHWC", "HWIO", "NHWC")

    def conv(x, name, stride):
        y = jax.lax.conv_general_dilated(
            x,
            params[name]["kernel"],
            stride,
            ((1, 1), (1, 1)),
            dimension_numbers=spec,
            precision="highest",
        )
        return nn.relu(y + params[name]["bias"].reshape(1, 1, 1, -1))

    expected = conv(conv(fine, "conv0", (3, 2)), "conv1", (1, 1))
    assert coarse.shape == (1, 2, 4, 3)
    np.testing.assert_allclose(coarse, expected, atol=1e-5)


# --- Dropout -------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [0, 2])
def test_dropout_is_after_the_coarsest_levels_alone(rng, levels):
    model = models.UNet(
        num_classes=1,
        features=(8,) * 3,
        norm="none",
        act="leaky_relu",
        dropout=0.5,
        dropout_levels=levels,
    )
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 1)), jnp.float32)
    variables = _filled(model, x, rng)

    @jax.jit
    def encode(variables, x):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(variables, x, train=True, rngs=rngs)[1]["encoder"]

    # Nothing is exactly zero but what dropout makes so.
    shares = [float(np.mean(np.asarray(x) == 0.0)) for x in encode(variables, x)]
    assert shares[: 3 - levels] == [0.0] * (3 - levels)
    assert all(0.2 < share < 0.8 for share in shares[3 - levels :])


# --- ResNet --------------------------------------------------------------------------

RESNETS = {  # torchvision's parameters less those of its `fc`
    "unet_resnet18": 11_689_512 - 513_000,
    "unet_resnet34": 21_797_672 - 513_000,
    "unet_resnet50": 25_557_032 - 2_049_000,
}


@pytest.mark.parametrize("name", sorted(RESNETS))
def test_a_resnet_has_torchvisions_parameters_and_halves_rounding_up(name):
    model = models.build(name, num_classes=2)
    shapes, params = _pyramid(model, (45, 64), channels=3)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == RESNETS[name]
    assert shapes[0] == (45, 64, 0)
    sizes = [(45, 64), (23, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
    assert [shape[:2] for shape in shapes] == sizes
    assert tuple(shape[2] for shape in shapes) == model.features


def _small(encoder, counts, features, dtype):
    """A ResNet encoder of few blocks."""
    options = {"use_bias": False, "dtype": dtype}
    init = layers.INITIALISERS["he_normal"]
    kit = layers.Kit(
        conv=layers.conv_factory(padding="same", init=init, **options),
        dense=partial(nn.Dense, kernel_init=init, **options),
        norm=norms.norm_factory("none", train=False),
        act=layers.act_factory("relu"),
        excite=lambda name: lambda x: x,
        up_conv=None,
    )
    block = {"basic": ResidualBlock, "bottleneck": encoders.BottleneckBlock}[encoder]
    return encoders.ResNetEncoder(features, kit, counts=counts, block=block)


def _resnet(x, params, counts, *, bottleneck):
    """The table of the paper in lax, with zeros at the borders."""
    rank = x.ndim - 2
    spec = ("NHWC", "HWIO", "NHWC") if rank == 2 else ("NDHWC", "DHWIO", "NDHWC")

    def conv(x, kernel, stride=1):
        if kernel.ndim == 2:
            kernel = kernel.reshape((1,) * rank + kernel.shape)
        pads = [(k // 2, k // 2) for k in kernel.shape[:rank]]
        return jax.lax.conv_general_dilated(
            x, kernel, (stride,) * rank, pads, dimension_numbers=spec
        )

    x = nn.relu(conv(x, params["conv_stem"]["kernel"], 2))
    maps = [x]
    x = nn.max_pool(x, (3,) * rank, (2,) * rank, ((1, 1),) * rank)
    for stage, count in enumerate(counts, start=1):
        for i in range(count):
            p = params[f"level{stage + 1}_{i}"]
            stride = 2 if stage > 1 and i == 0 else 1
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            y = x
            for j, s in enumerate(strides):
                y = conv(y, p[f"conv{j}"]["kernel"], s)
                y = nn.relu(y) if j + 1 < len(strides) else y
            if "shortcut" in p:
                x = conv(x, p["shortcut"]["kernel"], stride)
            x = nn.relu(x + y)
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    ("encoder", "counts", "features", "size", "projected"),
    [
        ("basic", (2, 2), (0, 4, 4, 6), (13, 18), {"level3_0"}),
        ("basic", (1, 2), (0, 4, 4, 6), (5, 9, 1), {"level3_0"}),
        # A bottleneck block widens already in the first stage, without a stride.
        ("bottleneck", (2, 2), (0, 4, 8, 12), (13, 18), {"level2_0", "level3_0"}),
    ],
)
def test_a_resnet_is_the_papers_table(rng, encoder, counts, features, size, projected):
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, *size, 3)))
        module = _small(encoder, counts, features, jnp.float64)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        params = jax.tree.map(lambda s: rng.standard_normal(s.shape) / 4, shapes)
        nothing, *ours = jax.jit(module.apply)(params, x)
        assert nothing.shape == (2, *size, 0)
        bottleneck = encoder == "bottleneck"
        reference = partial(_resnet, counts=counts, bottleneck=bottleneck)
        expected = jax.jit(reference)(x, params["params"])
        assert len(ours) == len(expected) == len(features) - 1
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    blocks = params["params"]
    assert {name for name in blocks if "shortcut" in blocks[name]} == projected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_beyond_the_border_nothing_wins_the_pooling(dtype):
    # Only reachable from outside with an activation that lets negatives through.
    module = _small("basic", (1,), (0, 2, 2), dtype)
    module = module.clone(kit=layers.Kit(**{**vars(module.kit), "act": _identity}))
    x = -jnp.ones((1, 8, 8, 1), dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)["params"]
    params["conv_stem"]["kernel"] = params["conv_stem"]["kernel"].at[3, 3].set(1.0)
    _, stem, pooled = jax.jit(module.apply)({"params": params}, x)
    # The block adds nothing to its shortcut, which is what was pooled.
    np.testing.assert_array_equal(stem.astype(jnp.float32), -np.ones((1, 4, 4, 2)))
    np.testing.assert_array_equal(pooled.astype(jnp.float32), -np.ones((1, 2, 2, 2)))

    def total(x):
        return jnp.sum(module.apply({"params": params}, x)[-1].astype(jnp.float32))

    gradient = jax.jit(jax.grad(total))(x)
    assert gradient.dtype == dtype
    # Four windows, two channels each.
    assert float(jnp.sum(gradient.astype(jnp.float32))) == 8.0


def _identity(name):
    return lambda x: x
