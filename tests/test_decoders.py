"""Going up and the decoders: against jax.image, by hand, and one against the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import decoders, layers, models, resample
from unet_jax.types import InputError


def _filled(model, x, rng):
    """Random variables, float32, variances of 1: faster than compiling `init`."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.ones(leaf.shape, leaf.dtype)
            if path[-1].key == "var"
            else jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
        ),
        shapes,
    )


# --- Up ------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(3, 2), (1, 3), (4, 1), (3, 1, 2)])
@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_interpolation_by_any_factor_is_that_of_jax_image(rng, method, stride):
    size = (3, 4, 2)[: len(stride)]
    x = jnp.asarray(rng.standard_normal((2, *size, 3)), jnp.float32)
    shape = (2, *(n * s for n, s in zip(size, stride, strict=True)), 3)
    expected = jax.image.resize(x, shape, method)
    ours = getattr(resample, method)(x, stride)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("stride", [(3, 2), (1, 3), (3, 1, 2)])
def test_aligned_interpolation_by_any_factor_keeps_the_corners(rng, stride):
    size = (3, 4, 2)[: len(stride)]
    x = rng.standard_normal((1, *size, 2))
    expected = x
    for axis, (n, s) in enumerate(zip(size, stride, strict=True), start=1):
        at = np.linspace(0, n - 1, n * s)
        expected = np.apply_along_axis(
            lambda row, at=at: np.interp(at, np.arange(len(row)), row), axis, expected
        )
    ours = resample.linear_aligned(jnp.asarray(x, jnp.float32), stride)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    corners = np.ix_([0], *((0, -1) for _ in stride), [0, 1])
    np.testing.assert_allclose(ours[corners], x[corners], atol=1e-6)


@pytest.mark.parametrize("stride", [(2, 2), (1, 3), (2, 1, 3)])
def test_interleaving_puts_each_tap_in_its_place(rng, stride):
    size = (2, 3, 2)[: len(stride)]
    x = rng.standard_normal((2, *size, *stride, 4))
    y = resample.depth_to_space(jnp.asarray(x, jnp.float32), stride)
    expected = np.empty((2, *(n * s for n, s in zip(size, stride, strict=True)), 4))
    for tap in np.ndindex(*stride):
        index = tuple(slice(t, None, s) for t, s in zip(tap, stride, strict=True))
        expected[(slice(None), *index)] = x[(..., *tap, slice(None))]
    np.testing.assert_array_equal(y, expected.astype(np.float32))


def _up(name, stride, kernel, padding="same", norm="none"):
    """An up-sampling as a net makes it."""
    model = models.UNet(
        num_classes=1,
        features=(4, 6),
        up=name,
        padding=padding,
        norm=norm,
        kernels=(kernel, kernel),
        strides=(stride,),
    )
    return models._parts(model, len(stride), train=False).decoder(parent=None).ups[0]


@pytest.mark.parametrize("stride", [(2, 2), (1, 3)])
@pytest.mark.parametrize("padding", ["same", "valid", "reflect"])
def test_pixel_shuffle_interleaves_a_convolution(rng, stride, padding):
    x = jnp.asarray(rng.standard_normal((2, 4, 5, 3)), jnp.float32)
    module = _up("pixel_shuffle", stride, (3, 1), padding)(features=4)
    variables = _filled(module, x, rng)
    p = variables["params"]["conv"]
    taps = int(np.prod(stride))
    assert p["kernel"].shape == (3, 1, 3, taps * 4)
    wide = {"same": ((0, 0), (1, 1), (0, 0), (0, 0)), "valid": ()}.get(padding)
    if padding == "reflect":
        given = layers.mirror(x, ((1, 1), (0, 0)))
    else:
        given = jnp.pad(x, wide) if wide else x
    spec = ("NHWC", "HWIO", "NHWC")
    z = jax.lax.conv_general_dilated(
        given, p["kernel"], (1, 1), "VALID", dimension_numbers=spec, precision="highest"
    )
    z = np.asarray(z + p["bias"].reshape(1, 1, 1, -1))
    # Channel (i * stride + j) * features + f goes to pixel (y * stride + i, ...).
    expected = np.empty((2, z.shape[1] * stride[0], z.shape[2] * stride[1], 4))
    for i, j in np.ndindex(*stride):
        first = (i * stride[1] + j) * 4
        expected[:, i :: stride[0], j :: stride[1]] = z[..., first : first + 4]
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, atol=1e-4)


@pytest.mark.parametrize("name", sorted(resample.UPS))
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_every_way_up_multiplies_the_size_and_loses_its_taps(name, padding):
    stride, kernel, size = (1, 2, 3), (1, 3, 5), (5, 6, 7)
    if padding == "valid" and name.startswith("transpose_wide"):
        with pytest.raises(InputError, match="pads by itself"):
            models.build("unet", num_classes=1, up=name, padding=padding)
        return
    module = _up(name, stride, kernel, padding)(features=4)
    x = jax.ShapeDtypeStruct((2, *size, 6), jnp.float32)
    y, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), x)
    learnt = name not in ("bilinear", "bilinear_aligned", "nearest")
    assert y.shape[-1] == (4 if learnt else 6) and bool(variables) is learnt
    for axis in range(3):
        before, after = module.clone(parent=None).taps(axis)
        lost = [
            sum(k - 1 for k in taps) * (padding == "valid") for taps in (before, after)
        ]
        expected = (size[axis] - lost[0]) * stride[axis] - lost[1]
        expected -= (stride[axis] - 1) * (name == "transpose_wide_short")
        assert y.shape[1 + axis] == expected


def test_a_convolution_after_nearest_is_normalised_and_activated(rng):
    x = jnp.asarray(rng.standard_normal((1, 3, 4, 6)), jnp.float32)
    module = _up("nearest_conv", (2, 2), (3, 3), norm="batch")(features=4)
    variables = _filled(module, x, rng)
    assert set(variables["params"]) == {"conv0", "norm0"}
    large = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    z = jax.lax.conv_general_dilated(
        large,
        variables["params"]["conv0"]["kernel"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    p, stats = (
        jax.tree.map(np.asarray, variables[kind]["norm0"])
        for kind in ("params", "batch_stats")
    )
    z = (np.asarray(z, np.float64) - stats["mean"]) / np.sqrt(1 + 1e-5)
    expected = np.maximum(z * p["scale"] + p["bias"], 0.0)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, atol=1e-4)


# --- Fitting -------------------------------------------------------------------------


def test_a_skip_and_an_upsampled_map_of_another_size_become_one_size():
    rows = jnp.arange(7.0)
    skip = rows.reshape(1, 7, 1, 1)
    small, large = skip[:, :3], jnp.arange(8.0).reshape(1, 8, 1, 1)
    for how, begin in (("crop", 2), ("crop_before", 1)):
        (kept,), up = decoders.fit((skip,), small, how)
        np.testing.assert_array_equal(kept.ravel(), rows[begin : begin + 3])
        np.testing.assert_array_equal(up.ravel(), small.ravel())
    filled = {
        "zeros": [0, 0, 0, 1, 2, 0, 0],
        "edge": [0, 1, 2, 2, 2, 2, 2],
        "resize": [0, 0, 0, 1, 1, 2, 2],  # floor(3 i / 7)
    }
    for how, expected in filled.items():
        (kept,), up = decoders.fit((skip,), small, how)
        np.testing.assert_array_equal(kept.ravel(), rows)
        np.testing.assert_array_equal(up.ravel(), expected)
        _, up = decoders.fit((skip,), large, how)
        assert up.shape == skip.shape
    assert set(decoders.FITS) == {"crop", "crop_before", *filled}


# --- The decoders as called ----------------------------------------------------------


class _Named:
    """Stands in for a part: writes down what it was called with."""

    def __init__(self, seen, kind, row):
        self.seen, self.kind, self.row = seen, kind, row

    def __call__(self, name, features=None):
        def call(*given):
            if self.kind == "up":
                given = given[:1]
            shapes = jax.tree.map(jnp.shape, given)
            self.seen.append((name, features, shapes))
            if self.kind == "up":
                size = tuple(2 * n for n in given[0].shape[1:-1])
                return jnp.zeros((1, *size, features))
            if self.kind == "merge":
                return jnp.concatenate([*given[0], given[1]], -1), ()
            return jnp.zeros((*given[0].shape[:-1], features))

        return call


def _decode(kind, pyramid, **options):
    """A decoder over maps of zeros with parts that do nothing; and their calls."""
    seen = []
    depth = len(pyramid) - 1
    parts = {
        f"{part}s": tuple(_Named(seen, part, row) for row in range(depth + 1))
        for part in ("block", "up", "merge")
    }
    module = decoders.DECODERS[kind](**parts, **options)
    maps = tuple(jnp.zeros((1, n, f)) for n, f in pyramid)
    return module.apply({}, maps), {name: call for name, *call in seen}


PYRAMID = [(9, 2), (4, 3), (2, 5), (1, 7)]  # size and channels of each level


@pytest.mark.parametrize("up_features", ["level", "input"])
def test_a_unet_decodes_from_the_coarsest_level_up(up_features):
    out, seen = _decode("unet", PYRAMID, features=(20, 30, 50), up_features=up_features)
    steps = [f"{part}{i}" for i in (2, 1, 0) for part in ("up", "merge", "level")]
    assert list(seen) == steps
    given = {"up2": 7, "up1": 50, "up0": 30}
    for name, channels in given.items():
        level = int(name[-1])
        wide = channels if up_features == "input" else (20, 30, 50)[level]
        assert seen[name][0] == wide and seen[name][1][0][-1] == channels
        skips, up, coarse = seen[f"merge{level}"][1]
        n, f = PYRAMID[level]
        assert (skips, up) == (((1, n, f),), (1, n, wide))
        assert coarse[-1] == channels
        assert seen[f"level{level}"][0] == (20, 30, 50)[level]
    assert [x.shape for x in out.aux["decoder"]] == [(1, 9, 20), (1, 4, 30), (1, 2, 50)]
    assert set(out.outputs) == {0} and set(out.aux) == {"decoder"}


@pytest.mark.parametrize("supervised", [1, 3])
def test_the_nodes_of_unetpp_see_all_earlier_ones_of_their_row(supervised):
    out, seen = _decode("unetpp", PYRAMID, features=(20, 30, 50), supervised=supervised)
    nodes = [(i, j) for j in (1, 2, 3) for i in range(4 - j)]
    parts = ("up", "merge", "node")
    assert list(seen) == [f"{part}{i}_{j}" for i, j in nodes for part in parts]
    # Every node has its row's channels, the last one the decoder's.
    encoder = [f for _, f in PYRAMID]
    width = {(i, 0): encoder[i] for i in range(4)}
    width |= {(i, j): (20, 30, 50)[i] if i + j == 3 else encoder[i] for i, j in nodes}
    for i, j in nodes:
        features, (given,) = seen[f"node{i}_{j}"]
        assert features == width[i, j]
        skips, up, coarse = seen[f"merge{i}_{j}"][1]
        assert [x[-1] for x in skips] == [width[i, k] for k in range(j)]
        assert up[-1] == width[i, j] and coarse[-1] == width[i + 1, j - 1]
        assert given[-1] == sum(width[i, k] for k in range(j)) + width[i, j]
    grid = [[x.shape for x in row] for row in out.aux["grid"]]
    assert grid == [
        [(1, PYRAMID[i][0], width[i, j]) for j in range(4 - i)] for i in range(4)
    ]
    assert list(out.outputs) == ([1, 2, 3] if supervised > 1 else [3])
    for j, x in out.outputs.items():
        assert x is out.aux["grid"][0][j]


def test_without_features_of_full_size_a_node_is_there_for_its_head_alone():
    pyramid = [(9, 0), *PYRAMID[1:]]
    out, seen = _decode("unetpp", pyramid, features=(20, 30, 50))
    assert "node0_1" not in seen and "up0_2" not in seen
    assert [x.shape[-1] for x in out.aux["grid"][0]] == [0, 0, 0, 20]
    assert seen["node0_3"] == [20, ((1, 9, 20),)]
    out, seen = _decode("unetpp", pyramid, features=(20, 30, 50), supervised=3)
    assert [x.shape[-1] for x in out.aux["grid"][0]] == [0, 20, 20, 20]
    assert seen["node0_3"] == [20, ((1, 9, 60),)]


@pytest.mark.parametrize("level", [1, 2])
def test_a_smaller_pyramid_runs_fewer_nodes_of_the_same_width(level):
    options = {"features": (20, 30, 50), "supervised": 3}
    _, whole = _decode("unetpp", PYRAMID, **options)
    out, seen = _decode("unetpp", PYRAMID[: level + 1], **options)
    inside = {
        f"{part}{i}_{j}"
        for part in ("up", "merge", "node")
        for j in range(1, level + 1)
        for i in range(level + 1 - j)
    }
    assert seen == {name: whole[name] for name in inside}
    assert list(out.outputs) == list(range(1, level + 1))


@pytest.mark.parametrize("up_features", ["level", "input", (11, 13, 17)])
def test_a_late_up_decoder_joins_the_skip_and_then_goes_up(up_features):
    # The last two levels have one size: a stride of 1 leads to the coarsest.
    pyramid = [*PYRAMID[:3], (2, 7)]
    options = {"features": (20, 30, 50), "up_features": up_features, "supervised": 2}
    out, seen = _decode("late_up", pyramid, **options)
    assert list(seen) == ["merge2", "up1", "level1", "merge1", "up0", "level0"]
    # The skip beside what comes from below; no skip of full size, no up2, no level2.
    wide = {"level": (20, 30), "input": (33, 12)}.get(up_features, (11, 13))
    assert seen == {
        "merge2": [None, (((1, 2, 5),), (1, 2, 7), (1, 2, 7))],
        "up1": [wide[1], ((1, 2, 12),)],
        "level1": [30, ((1, 4, wide[1]),)],
        "merge1": [None, (((1, 4, 3),), (1, 4, 30), (1, 4, 30))],
        "up0": [wide[0], ((1, 4, 33),)],
        "level0": [20, ((1, 9, wide[0]),)],  # aligned from 8 to 9
    }
    assert [x.shape for x in out.aux["decoder"]] == [(1, 9, 20), (1, 4, 30)]
    assert set(out.aux) == {"decoder"} and list(out.outputs) == [0, 1]
    for level, x in out.outputs.items():
        assert x is out.aux["decoder"][level]


@pytest.mark.parametrize(("units", "bare"), [(2, "level0"), (1, "level0"), (0, "up0")])
def test_a_bare_late_up_decoder_ends_in_a_convolution(rng, units, bare):
    model = models.UNet(
        num_classes=3,
        features=(2, 4, 5),
        decoder_features=(3, 2),
        decoder="late_up",
        block="residual_units",
        down="strided",
        strides=(2, 1),
        up="transpose_wide_unit",
        decoder_units=(units, units),
        norm="instance_plain",
        act="prelu",
        head_kernel=0,
    )
    x = jnp.asarray(rng.standard_normal((1, 4, 6, 1)), jnp.float32)
    variables = _filled(model, x, rng)
    decoder = variables["params"]["decoder"]
    # The last convolution stands alone, without an activation after it; no head.
    acts = {part: {k for k in p if k.startswith("act")} for part, p in decoder.items()}
    inner = {f"act{i}" for i in range(units - 1)}
    expected = {"level0": inner} if units else {}
    assert acts == {"up0": {"act"} if units else set(), **expected}
    assert bare in acts and set(variables["params"]) == {"encoder", "decoder"}
    logits, aux = model.apply(variables, x)
    assert logits.shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(logits, aux["decoder"][0])


# --- Heads ---------------------------------------------------------------------------


def test_supervised_levels_of_a_unet_are_the_finest():
    features = {"features": (20, 30, 50)}
    for supervised in (1, 2, 3):
        out, _ = _decode("unet", PYRAMID, supervised=supervised, **features)
        assert list(out.outputs) == list(range(supervised))
        for level, x in out.outputs.items():
            assert x is out.aux["decoder"][level]
            assert x.shape == (1, PYRAMID[level][0], (20, 30, 50)[level])


@pytest.mark.parametrize(("heads", "count"), [(None, 3), (2, 2), (1, 1)])
def test_a_supervised_unet_has_a_head_on_every_level_in_its_size(rng, heads, count):
    model = models.UNet(
        num_classes=2,
        features=(2, 3, 4, 5),
        norm="none",
        deep_supervision=True,
        heads=heads,
    )
    x = jnp.asarray(rng.standard_normal((2, 9, 16, 1)), jnp.float32)
    variables = _filled(model, x, rng)
    params = variables["params"]
    names = {name for name in params if name.startswith("head")}
    assert names == {f"head{i}" for i in range(count)}
    logits, aux = model.apply(variables, x)
    sizes = [(9, 16), (4, 8), (2, 4)][:count]
    assert [head.shape for head in aux["heads"]] == [(2, *s, 2) for s in sizes]
    np.testing.assert_array_equal(logits, aux["heads"][0])
    for i, head in enumerate(aux["heads"]):
        p = jax.tree.map(np.asarray, params[f"head{i}"])
        expected = np.asarray(aux["decoder"][i]) @ p["kernel"] + p["bias"]
        np.testing.assert_allclose(head, expected, rtol=1e-4, atol=1e-4)
    # Without supervision it is the same net with the finest head alone.
    plain = model.clone(deep_supervision=False, heads=None)
    others = {k: v for k, v in params.items() if not k.startswith("head")}
    alone, rest = plain.apply({"params": {**others, "head": params["head0"]}}, x)
    np.testing.assert_array_equal(alone, logits)
    assert "heads" not in rest


# --- One against the other -----------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "up", "merge", "size"),
    [
        ("same", "transpose", "concat", (7, 6)),
        ("valid", "pixel_shuffle", "concat_up_first", (22, 24)),
        ("reflect", "nearest_conv", "sum", (4, 5)),
        ("same", "bilinear", "gated_full", (3, 4, 5)),
    ],
)
def test_a_grid_of_depth_one_is_a_unet(rng, padding, up, merge, size):
    fields = {"padding": padding, "up": up, "merge": merge, "features": (4, 6)}
    unet = models.UNet(num_classes=2, **fields)
    nested = models.UNet(num_classes=2, decoder="unetpp", **fields)
    x = jnp.asarray(rng.standard_normal((1, *size, 1)), jnp.float32)
    variables = _filled(unet, x, rng)
    names = {"up0": "up0_1", "merge0": "merge0_1", "level0": "node0_1"}

    def renamed(tree):
        decoder = {names[name]: value for name, value in tree["decoder"].items()}
        return {**tree, "decoder": decoder}

    others = {kind: renamed(tree) for kind, tree in variables.items()}
    shapes = jax.eval_shape(nested.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, others)
    logits, aux = jax.jit(unet.apply)(variables, x)
    also, grid = jax.jit(nested.apply)(others, x)
    np.testing.assert_array_equal(logits, also)
    np.testing.assert_array_equal(aux["decoder"][0], grid["grid"][0][1])
    assert np.ptp(np.asarray(logits)) > 0.1


def test_gates_are_told_by_level_and_column():
    model = models.UNet(num_classes=1, features=(2, 3, 4, 5), merge="gated")
    x = jax.ShapeDtypeStruct((2, 9, 6, 1), jnp.float32)

    def gates(model):
        run = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
        return jax.tree.map(jnp.shape, run[0][1]["gates"])

    # The grid form leaves level 0 alone; a gate has the size of its skip.
    assert gates(model) == ((), ((2, 4, 3, 1),), ((2, 2, 1, 1),))
    nested = gates(model.clone(decoder="unetpp"))
    assert nested[0] == ((),) * 4 and nested[3] == ((),)
    for row, size in ((1, (2, 4, 3, 1)), (2, (2, 2, 1, 1))):
        assert nested[row] == tuple((size,) * column for column in range(4 - row))
    full = gates(model.clone(merge="gated_full"))
    assert full == (((2, 9, 6, 1),), ((2, 4, 3, 1),), ((2, 2, 1, 1),))
    plain = jax.eval_shape(
        model.clone(merge="concat").init_with_output, jax.random.key(0), x
    )
    assert "gates" not in plain[0][1]
