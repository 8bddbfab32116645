"""The blocks against the same arithmetic in NumPy, in float64."""

import dataclasses
import itertools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import blocks, encoders, layers, norms
from unet_jax.resample import UpConv
from unet_jax.types import InputError

SLOPE = 0.125  # of leaky_relu


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# --- What is tested ------------------------------------------------------------------


def _kit(padding="same", norm="batch", order="cna", *, excite="none", train=False):
    init = layers.INITIALISERS["he_normal"]
    options = {"use_bias": norm == "none", "dtype": jnp.float64}
    dense = partial(nn.Dense, kernel_init=init, **options)
    return layers.Kit(
        conv=layers.conv_factory(padding=padding, init=init, **options),
        dense=dense,
        norm=norms.norm_factory(norm, train=train),
        act=layers.act_factory("leaky_relu", slope=SLOPE),
        excite=blocks.excite_factory(blocks.EXCITES[excite], dense),
        up_conv=partial(UpConv, dtype=jnp.float64),
        order=order,
        padding=padding,
    )


def _shapes(module, x):
    # Parameters begin as float32, which float64 does not meet under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        return jax.eval_shape(module.init, jax.random.key(0), x)


def _variables(module, x, rng):
    """Random float64 variables; variances above 0."""
    shapes = _shapes(module, x)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 2.0, leaf.shape)
            if path[-1].key == "var"
            else np.asarray(rng.standard_normal(leaf.shape))
        ),
        shapes,
    )


def _run(block, x, rng):
    """The block's output and its variables, all of them NumPy's."""
    variables = _variables(block, x, rng)
    y = jax.jit(block.apply)(variables, x)
    assert y.dtype == jnp.float64
    return np.asarray(y), variables


# --- The reference -------------------------------------------------------------------


def _leaky(x):
    return np.where(x > 0, x, SLOPE * x)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _centre(x, size):
    """Loses as many pixels at the left as at the right; the surplus is even."""
    surplus = [n - m for n, m in zip(x.shape[1:-1], size, strict=True)]
    assert not any(n % 2 for n in surplus)
    cut = [slice(n // 2, -(n // 2) or None) for n in surplus]
    return x[(slice(None), *cut)]


class Reference:
    """Convolution tap by tap, and the rest by its formula."""

    def __init__(self, variables, padding="same"):
        self.params = variables["params"]
        self.stats = variables.get("batch_stats", {})
        self.padding = padding

    def conv(self, name, x, stride=None):
        kernel = self.params[name]["kernel"]
        *taps, _, _ = kernel.shape
        stride = stride or (1,) * len(taps)
        if self.padding != "valid":
            widths = [(0, 0), *((k // 2, k // 2) for k in taps), (0, 0)]
            x = np.pad(
                x, widths, mode="reflect" if self.padding == "reflect" else "constant"
            )
        out = 0.0
        for tap in np.ndindex(*taps):
            index = [
                slice(t, n - k + t + 1, s)
                for t, k, s, n in zip(tap, taps, stride, x.shape[1:-1], strict=True)
            ]
            out = out + x[(slice(None), *index)] @ kernel[tap]
        return out + self.params[name].get("bias", 0.0)

    def dense(self, name, x):
        return x @ self.params[name]["kernel"] + self.params[name].get("bias", 0.0)

    def norm(self, name, x):
        stats, params = self.stats[name], self.params[name]
        y = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        return y * params["scale"] + params["bias"]

    def unit(self, x, suffix, order="cna", stride=None):
        for letter in order:
            if letter == "c":
                x = self.conv(f"conv{suffix}", x, stride)
            elif letter == "n":
                x = self.norm(f"norm{suffix}", x)
            else:
                x = _leaky(x)
        return x

    def shortcut(self, x, stride=None, *, norm):
        if stride:
            x = x[(slice(None), *(slice(None, None, s) for s in stride))]
        x = self.dense("shortcut", x)
        return self.norm("shortcut_norm", x) if norm else x


def _close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


# --- Blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["".join(o) for o in itertools.permutations("cna")])
def test_a_plain_block_keeps_its_order(rng, order):
    x = rng.standard_normal((2, 5, 6, 3))
    y, variables = _run(blocks.ConvBlock(4, (3, 3), _kit(order=order)), x, rng)
    net = Reference(variables)
    _close(y, net.unit(net.unit(x, "0", order), "1", order))
    # A norm before the convolution is as wide as what comes in.
    wide = 3 if order.index("n") < order.index("c") else 4
    assert variables["params"]["norm0"]["scale"].shape == (wide,)


@pytest.mark.parametrize("padding", ["same", "valid", "reflect"])
@pytest.mark.parametrize(
    ("size", "kernel", "stride"),
    [
        ((7, 6), (3, 3), None),
        ((7, 6), (3, 1), (2, 2)),
        ((9, 7), (5, 3), (1, 2)),
        ((5, 6, 5), (1, 3, 3), None),
        ((5, 6, 7), (3, 3, 1), (1, 2, 2)),
    ],
)
def test_a_plain_block_of_any_padding_kernel_and_stride(
    rng, padding, size, kernel, stride
):
    x = rng.standard_normal((1, *size, 2))
    block = blocks.ConvBlock(3, kernel, _kit(padding, norm="none"), stride=stride)
    y, variables = _run(block, x, rng)
    net = Reference(variables, padding)
    # The first convolution strides and not the second.
    _close(y, net.unit(net.unit(x, "0", "ca", stride), "1", "ca"))
    assert variables["params"]["conv0"]["kernel"].shape == (*kernel, 2, 3)
    if padding != "valid":
        wanted = [-(-n // s) for n, s in zip(size, stride or (1,) * 3, strict=False)]
        assert y.shape == (1, *wanted, 3)


def test_reflect_padding_is_mirror_and_an_unpadded_convolution(rng):
    # Also where the mirror image is wider than the map, and where that is one pixel.
    for size, kernel in [((6, 5), (3, 3)), ((2, 1), (5, 3)), ((1, 3, 2), (3, 3, 5))]:
        x = rng.standard_normal((2, *size, 2))
        whole = blocks.ConvBlock(3, kernel, _kit("reflect", norm="none"), units=1)
        variables = _variables(whole, x, rng)
        pads = tuple((k // 2, k // 2) for k in kernel)
        valid = whole.clone(kit=_kit("valid", norm="none"))
        y, expected = (
            jax.jit(block.apply)(variables, x)
            for block, x in ((whole, x), (valid, layers.mirror(x, pads)))
        )
        _close(y, expected)


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({}, (8, 8)),
        ({"units": 3}, (8, 8, 8)),
        ({"mid": "half_out"}, (4, 8)),
        ({"mid": "half_in"}, (3, 8)),
    ],
)
def test_what_is_between_the_convolutions_of_a_plain_block(options, widths):
    block = blocks.ConvBlock(8, (3, 3), _kit(), **options)
    shapes = _shapes(block, jnp.zeros((1, 4, 4, 6)))
    got = [shapes["params"][f"conv{i}"]["kernel"].shape for i in range(len(widths))]
    comes = (6, *widths[:-1])
    assert got == [(3, 3, i, o) for i, o in zip(comes, widths, strict=True)]


@pytest.mark.parametrize(
    ("padding", "channels", "stride"),
    [
        ("same", 4, None),
        ("same", 3, None),
        ("same", 4, (1, 2)),
        ("reflect", 3, (2, 2)),
        ("valid", 4, None),
        ("valid", 3, None),
    ],
)
def test_a_residual_block(rng, padding, channels, stride):
    x = rng.standard_normal((2, 7, 5, channels))
    y, variables = _run(
        blocks.ResidualBlock(4, (3, 3), _kit(padding), stride=stride), x, rng
    )
    net = Reference(variables, padding)
    inside = net.unit(net.unit(x, "0", stride=stride), "1", "cn")
    identity = channels == 4 and not stride
    beside = x if identity else net.shortcut(x, stride, norm=True)
    _close(y, _leaky(_centre(beside, inside.shape[1:-1]) + inside))
    assert ("shortcut" in variables["params"]) is not identity
    assert ("shortcut_norm" in variables["params"]) is not identity


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("padding", "channels", "stride"),
    [
        ("same", 4, None),
        ("same", 3, None),
        ("same", 4, (2, 2)),
        ("reflect", 3, (2, 1)),
        ("valid", 3, None),
    ],
)
def test_a_preactivation_block(rng, first, padding, channels, stride):
    x = rng.standard_normal((2, 7, 5, channels))
    block = blocks.PreactivationBlock(
        4, (3, 3), _kit(padding), stride=stride, first=first
    )
    y, variables = _run(block, x, rng)
    net = Reference(variables, padding)
    inside = net.unit(x, "0", "c" if first else "nac", stride)
    inside = net.unit(inside, "1", "nac")
    identity = channels == 4 and not stride
    beside = x if identity else net.shortcut(x, stride, norm=False)
    _close(y, _centre(beside, inside.shape[1:-1]) + inside)
    assert ("norm0" in variables["params"]) is not first


@pytest.mark.parametrize(
    ("padding", "size", "stride"),
    [("same", (5, 4), None), ("same", (5, 4), (2, 1)), ("valid", (14, 13), None)],
)
def test_a_recurrent_block_applies_its_weights_three_times(rng, padding, size, stride):
    x = rng.standard_normal((2, *size, 3))
    block = blocks.RecurrentBlock(4, (3, 3), _kit(padding), stride=stride)
    y, variables = _run(block, x, rng)
    net = Reference(variables, padding)
    if stride:
        x = x[:, :: stride[0], :: stride[1]]
    x = net.dense("project", x)
    inside = x
    for i in "01":
        given = inside
        inside = net.unit(given, i)
        for _ in range(2):
            inside = net.unit(_centre(given, inside.shape[1:-1]) + inside, i)
    _close(y, _centre(x, inside.shape[1:-1]) + inside)
    assert set(variables["params"]) == {"project", "conv0", "norm0", "conv1", "norm1"}


def test_a_recurrent_block_counts_every_application_in_its_statistics(rng):
    x = rng.standard_normal((3, 4, 5, 4))
    block = blocks.RecurrentBlock(4, (3, 3), _kit(train=True))
    variables = _variables(block, x, rng)
    apply = jax.jit(partial(block.apply, mutable=["batch_stats"]))
    with jax.numpy_dtype_promotion("standard"):  # in flax's own statistics
        _, updated = apply(variables, x)
    net = Reference(variables)
    given = net.dense("project", x)
    mean, var = (variables["batch_stats"]["norm0"][k] for k in ("mean", "var"))
    y = 0.0
    for _ in range(3):
        z = net.conv("conv0", given + y)
        now = z.mean((0, 1, 2)), z.var((0, 1, 2))
        mean, var = 0.9 * mean + 0.1 * now[0], 0.9 * var + 0.1 * now[1]
        params = variables["params"]["norm0"]
        z = (z - now[0]) / np.sqrt(now[1] + 1e-5) * params["scale"] + params["bias"]
        y = _leaky(z)
    _close(updated["batch_stats"]["norm0"]["mean"], mean)
    _close(updated["batch_stats"]["norm0"]["var"], var)


@pytest.mark.parametrize("stride", [None, (1, 2, 2)])
@pytest.mark.parametrize("channels", [8, 4])
def test_the_bottleneck_block_of_resnet(rng, stride, channels):
    x = rng.standard_normal((1, 3, 5, 4, channels))
    block = encoders.BottleneckBlock(8, (3, 3, 3), _kit(), stride=stride)
    y, variables = _run(block, x, rng)
    net = Reference(variables)
    inside = _leaky(net.norm("norm0", net.dense("conv0", x)))
    inside = net.unit(inside, "1", stride=stride)
    inside = net.norm("norm2", net.dense("conv2", inside))
    identity = channels == 8 and not stride
    beside = x if identity else net.shortcut(x, stride, norm=True)
    _close(y, _leaky(beside + inside))
    assert variables["params"]["conv1"]["kernel"].shape == (3, 3, 3, 2, 2)


@pytest.mark.parametrize("name", sorted(blocks.BLOCKS))
def test_taps_are_the_pixels_that_a_block_loses(rng, name):
    # An even surplus on every axis, another one on each.
    kernel, size = (1, 3, 5), (9, 17, 29)
    block = blocks.BLOCKS[name](features=4, kernel=kernel, kit=_kit("valid"))
    x = jax.ShapeDtypeStruct((1, *size, 4), jnp.float64)
    with jax.numpy_dtype_promotion("standard"):  # norms in float64
        y = jax.eval_shape(block.apply, _variables(block, x, rng), x)
    lost = [n - m for n, m in zip(size, y.shape[1:-1], strict=True)]
    bare = block.clone(parent=None)
    assert lost == [sum(k - 1 for k in bare.taps(axis)) for axis in range(3)]
    assert lost[0] == 0 < lost[1] < lost[2]


# --- What re-weighs channels ---------------------------------------------------------


def _gate(params, x):
    """The gate of squeeze-and-excitation, ``[B, C]``."""
    z = x.mean(tuple(range(1, x.ndim - 1)))
    z = z @ params["squeeze"]["kernel"] + params["squeeze"]["bias"]
    z = np.maximum(z, 0.0) @ params["excite"]["kernel"] + params["excite"]["bias"]
    return _sigmoid(z).reshape(len(x), *(1,) * (x.ndim - 2), -1)


@pytest.mark.parametrize("size", [(4, 3), (2, 3, 4), (1, 1)])
def test_squeeze_and_excitation(rng, size):
    x = rng.standard_normal((2, *size, 32))
    dense = partial(nn.Dense, use_bias=False, dtype=jnp.float64)
    y, variables = _run(blocks.SqueezeExcite(dense), x, rng)
    params = variables["params"]
    assert params["squeeze"]["kernel"].shape == (32, 2)
    _close(y, x * _gate(params, x))


@pytest.mark.parametrize("size", [(4, 3), (2, 3, 4)])
def test_spatial_and_channel_excitation_add_up(rng, size):
    x = rng.standard_normal((2, *size, 6))
    dense = partial(nn.Dense, use_bias=False, dtype=jnp.float64)
    y, variables = _run(blocks.SpatialChannelExcite(dense), x, rng)
    params = variables["params"]
    assert params["channel"]["squeeze"]["kernel"].shape == (6, 1)
    spatial = x @ params["spatial"]["kernel"] + params["spatial"]["bias"]
    _close(y, x * _gate(params["channel"], x) + x * _sigmoid(spatial))


def test_a_block_excites_before_it_adds(rng):
    x = rng.standard_normal((2, 4, 5, 4))
    kit = _kit(excite="se")
    for block in (
        blocks.ConvBlock(4, (3, 3), kit),
        blocks.ResidualBlock(4, (3, 3), kit),
        blocks.PreactivationBlock(4, (3, 3), kit),
        encoders.BottleneckBlock(4, (3, 3), kit),
    ):
        y, variables = _run(block, x, rng)
        net, gate = Reference(variables), variables["params"]["excite"]
        if isinstance(block, blocks.ConvBlock):
            inside = net.unit(net.unit(x, "0"), "1")
            _close(y, inside * _gate(gate, inside))
        elif isinstance(block, blocks.PreactivationBlock):
            inside = net.unit(net.unit(x, "0", "nac"), "1", "nac")
            _close(y, x + inside * _gate(gate, inside))
        else:
            if isinstance(block, blocks.ResidualBlock):
                inside = net.unit(net.unit(x, "0"), "1", "cn")
            else:
                inside = _leaky(net.norm("norm0", net.dense("conv0", x)))
                inside = net.unit(inside, "1")
                inside = net.norm("norm2", net.dense("conv2", inside))
            _close(y, _leaky(x + inside * _gate(gate, inside)))


# --- Blocks that some PyTorch nets have ----------------------------------------------


def _instance(x):
    """Instance norm without scale and bias."""
    axes = tuple(range(1, x.ndim - 1))
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def _pooled(x, stride):
    """The mean over windows that do not overlap, what is left over dropped."""
    for axis, s in enumerate(stride, start=1):
        n = x.shape[axis] // s
        x = x.take(range(n * s), axis)
        x = x.reshape(*x.shape[:axis], n, s, *x.shape[axis + 1 :]).mean(axis + 1)
    return x


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("units", "channels", "stride", "padding"),
    [
        (1, 4, None, "same"),
        (2, 3, None, "same"),
        (3, 3, (2, 1), "same"),
        (1, 3, (2, 2), "reflect"),
        (2, 4, (2, 2), "same"),  # a stride is projected though the channels stay
        (2, 4, None, "valid"),
    ],
)
def test_residual_units(rng, bare, units, channels, stride, padding):
    x = rng.standard_normal((2, 7, 6, channels))
    options = {"units": units, "bare": bare, "stride": stride}
    block = blocks.BLOCKS["residual_units"](4, (3, 3), _kit(padding), **options)
    y, variables = _run(block, x, rng)
    net, inside = Reference(variables, padding), x
    for i in range(units):
        order = "c" if bare and i == units - 1 else "cna"
        inside = net.unit(inside, str(i), order, stride if i == 0 else None)
    beside = x
    if stride:
        beside = net.conv("shortcut", x, stride)
        assert variables["params"]["shortcut"]["kernel"].shape == (3, 3, channels, 4)
    elif channels != 4:
        beside = net.dense("shortcut", x)
    _close(y, _centre(beside, inside.shape[1:-1]) + inside)
    assert ("shortcut" in variables["params"]) is bool(stride or channels != 4)
    last = f"norm{units - 1}"
    assert (last in variables["params"]) is not bare


def test_no_residual_units_are_no_block(rng):
    x = rng.standard_normal((1, 3, 2, 3))
    block = blocks.ResidualUnits(3, (3, 3), _kit(), units=0)
    y, variables = _run(block, x, rng)
    np.testing.assert_array_equal(y, x)
    assert not variables and block.clone(parent=None).taps(0) == ()


@pytest.mark.parametrize(
    ("name", "slope"),
    [("residual_projected", SLOPE), ("residual_projected_leaky", 0.1)],
)
@pytest.mark.parametrize(
    ("channels", "order"), [(4, "cna"), (3, "cna"), (3, "nca"), (3, "can")]
)
def test_a_projected_residual_block(rng, name, slope, channels, order):
    x = rng.standard_normal((2, 5, 6, channels))
    block = blocks.BLOCKS[name](4, (3, 3), _kit(order=order, excite="se"))
    y, variables = _run(block, x, rng)
    params, net = variables["params"], Reference(variables)
    if channels != 4:
        assert params["project"]["bias"].shape == (4,)
        x = net.dense("project", x)
    assert ("project" in params) is (channels != 4)
    inside = net.unit(net.unit(x, "0", order), "1", order.replace("a", ""))
    total = x + inside
    total = np.where(total > 0, total, slope * total)
    _close(y, total * _gate(params["excite"], total))


@pytest.mark.parametrize(
    ("first", "units", "channels", "stride", "size"),
    [
        (True, 1, 3, None, (4, 5)),
        (False, 2, 3, (2, 2), (6, 4)),
        (False, 1, 4, (2, 1), (6, 3)),  # pooled and not projected
        (True, 2, 2, (1, 2, 2), (2, 4, 6)),
        (False, 1, 3, (2, 2), (7, 5)),  # the pooled map is smaller: zeros at the end
    ],
)
def test_a_residual_stage(rng, first, units, channels, stride, size):
    x = rng.standard_normal((2, *size, channels))
    kernel = (3,) * len(size)
    block = blocks.BLOCKS["residual_stage"](
        4, kernel, _kit(excite="se"), stride=stride, first=first, units=units
    )
    y, variables = _run(block, x, rng)
    if first:
        x = Reference(variables).unit(x, "_stem")
    for i in range(units):
        inner = {kind: tree[f"unit{i}"] for kind, tree in variables.items()}
        net, by = Reference(inner), stride if i == 0 else None
        inside = net.unit(net.unit(x, "0", stride=by), "1", "cn")
        inside = inside * _gate(inner["params"]["excite"], inside)
        beside = _pooled(x, by) if by else x
        missing = zip(inside.shape[1:-1], beside.shape[1:-1], strict=True)
        beside = np.pad(beside, [(0, 0), *((0, n - m) for n, m in missing), (0, 0)])
        if x.shape[-1] != 4:
            assert set(inner["params"]["shortcut"]) == {"kernel"}
            beside = net.norm("shortcut_norm", net.dense("shortcut", beside))
        assert ("shortcut" in inner["params"]) is (x.shape[-1] != 4)
        x = _leaky(beside + inside)
    _close(y, x)
    names = {f"unit{i}" for i in range(units)}
    names |= {"conv_stem", "norm_stem"} if first else set()
    assert set(variables["params"]) == names


@pytest.mark.parametrize(("size", "stride"), [((5, 4), None), ((3, 4, 5), (1, 2, 2))])
def test_one_convolution_instance_norm_and_prelu(rng, size, stride):
    x = rng.standard_normal((2, *size, 3))
    kernel = (3,) * len(size)
    name = "single_instance_prelu"
    y, variables = _run(blocks.BLOCKS[name](4, kernel, _kit(), stride=stride), x, rng)
    # Neither the kit's batch norm nor its activation; and the norm owns nothing.
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"conv0", "act0"}
    z = _instance(Reference(variables).conv("conv0", x, stride))
    slope = variables["params"]["act0"]["negative_slope"]
    _close(y, np.where(z > 0, z, slope * z))


@pytest.mark.parametrize(("channels", "mid"), [(3, 4), (6, 6), (4, 4), (12, 12)])
def test_a_block_that_widens_and_never_narrows_what_comes_in(rng, channels, mid):
    x = rng.standard_normal((1, 3, 4, channels))
    block = blocks.BLOCKS["widening_from"](8, (3, 3), _kit())
    y, variables = _run(block, x, rng)
    net = Reference(variables)
    _close(y, net.unit(net.unit(x, "0"), "1"))
    shapes = [variables["params"][f"conv{i}"]["kernel"].shape[2:] for i in (0, 1)]
    assert shapes == [(channels, mid), (mid, 8)]


def _scse(params, x):
    """The channel gate's and the pixel gate's result."""
    gate = x @ params["spatial"]["kernel"] + params["spatial"]["bias"]
    return x * _gate(params["channel"], x), x * _sigmoid(gate)


@pytest.mark.parametrize("skipless", [False, True])
def test_an_excited_block_weighs_what_comes_in_and_what_goes_out(rng, skipless):
    x = rng.standard_normal((2, 4, 5, 32))
    block = blocks.BLOCKS["excited"](20, (3, 3), _kit(), skipless=skipless)
    # Small ones: the gates are neither open nor shut.
    variables = jax.tree.map(lambda leaf: 0.2 * leaf, _variables(block, x, rng))
    apply = jax.jit(block.apply)
    y = np.asarray(apply(variables, x))
    params, net = variables["params"], Reference(variables)
    assert params["excite_input"]["channel"]["squeeze"]["kernel"].shape == (32, 2)
    assert params["excite"]["channel"]["squeeze"]["kernel"].shape == (20, 1)
    given = x if skipless else sum(_scse(params["excite_input"], x))
    inside = net.unit(net.unit(given, "0"), "1")
    _close(y, sum(_scse(params["excite"], inside)))
    # Without a skip the gate has parameters, as in SMP, and they are of no effect.
    others = jax.tree.map(np.zeros_like, params["excite_input"])
    other = {**variables, "params": {**params, "excite_input": others}}
    assert np.array_equal(apply(other, x), y) is skipless


@pytest.mark.parametrize("size", [(4, 3), (2, 3, 4)])
def test_the_larger_of_spatial_and_channel_excitation(rng, size):
    x = rng.standard_normal((2, *size, 6))
    dense = partial(nn.Dense, use_bias=False, dtype=jnp.float64)
    y, variables = _run(blocks.EXCITES["scse_max"](dense=dense), x, rng)
    params = variables["params"]
    assert params["channel"]["squeeze"]["kernel"].shape == (6, 6)
    channels, pixels = _scse(params, x)
    assert np.any(channels > pixels) and np.any(channels < pixels)
    _close(y, np.maximum(channels, pixels))


# --- Activations ---------------------------------------------------------------------


@pytest.mark.parametrize(("slope", "start"), [(None, 0.25), (0.5, 0.5)])
def test_prelu_starts_where_it_is_told(slope, start):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.act_factory("prelu", slope=slope)(name="act")(x)

    x = jnp.asarray([-2.0, 0.0, 3.0], jnp.float32)
    y, variables = Net().init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, [-2.0 * start, 0.0, 3.0])
    assert variables["params"]["act"]["negative_slope"].shape == ()


def test_prelu_has_one_slope_a_layer(rng):
    x = rng.standard_normal((2, 4, 4, 3))
    kit = dataclasses.replace(_kit(norm="none"), act=layers.act_factory("prelu"))
    y, variables = _run(blocks.ConvBlock(4, (3, 3), kit), x, rng)
    assert set(variables["params"]) == {"conv0", "act0", "conv1", "act1"}
    net, expected = Reference(variables), x
    for i in "01":
        slope = variables["params"][f"act{i}"]["negative_slope"]
        expected = net.conv(f"conv{i}", expected)
        expected = np.where(expected > 0, expected, slope * expected)
    _close(y, expected)


def test_a_slope_is_for_activations_that_have_one():
    x = jnp.asarray([-2.0, 0.0, 3.0])
    leaky = layers.act_factory("leaky_relu")(name="act")
    np.testing.assert_array_equal(leaky(x), [-0.02, 0.0, 3.0])
    steeper = layers.act_factory("leaky_relu", slope=0.2)(name="act")
    np.testing.assert_array_equal(steeper(x), [-0.4, 0.0, 3.0])
    with pytest.raises(InputError, match="leaky_relu and prelu"):
        layers.act_factory("relu", slope=0.1)
