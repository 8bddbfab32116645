"""How skips and up-sampled map become one, against the formulas, in float64."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import layers, merges, norms


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _kit(norm="none", *, bias=False):
    init = layers.INITIALISERS["he_normal"]
    options = {"use_bias": bias, "dtype": jnp.float64}
    return layers.Kit(
        conv=layers.conv_factory(padding="same", init=init, **options),
        dense=partial(nn.Dense, kernel_init=init, **options),
        norm=norms.norm_factory(norm, train=False),
        act=layers.act_factory("relu"),
        excite=None,
        up_conv=None,
    )


def _run(name, maps, rng, *, level=1, stride=(2, 2), norm="none", bias=False):
    """What a merge makes of (skips, up, coarse), its gates, and random variables."""
    merge = merges.MERGES[name](level=level, stride=stride, kit=_kit(norm, bias=bias))
    with jax.numpy_dtype_promotion("standard"):  # parameters begin as float32
        shapes = jax.eval_shape(merge.init, jax.random.key(0), *maps)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 2.0, leaf.shape)
            if path[-1].key == "var"
            else np.asarray(rng.standard_normal(leaf.shape))
        ),
        shapes,
    )
    y, gates = jax.jit(merge.apply)(variables, *maps)
    return np.asarray(y), [np.asarray(gate) for gate in gates], variables


def _maps(rng, size, coarse, channels=(4, 3, 5), skips=1):
    """Skips and up-sampled map of one size, and the coarse map."""
    skip, up, below = channels
    return (
        tuple(rng.standard_normal((2, *size, skip)) for _ in range(skips)),
        rng.standard_normal((2, *size, up)),
        rng.standard_normal((2, *coarse, below)),
    )


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _norm(variables, path, x):
    params, stats = variables["params"], variables["batch_stats"]
    for part in path:
        params, stats = params[part], stats[part]
    y = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return y * params["scale"] + params["bias"]


def _close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


# --- Beside each other, added, not at all --------------------------------------------


def test_concat_has_the_skips_first_oldest_first_unless_told_otherwise(rng):
    maps = skips, up, _ = _maps(rng, (3, 4), (2, 2), skips=3)
    y, gates, variables = _run("concat", maps, rng)
    np.testing.assert_array_equal(y, np.concatenate([*skips, up], -1))
    assert not gates and not variables
    y, _, _ = _run("concat_up_first", maps, rng)
    np.testing.assert_array_equal(y, np.concatenate([up, *skips], -1))


def test_none_is_the_upsampled_map_alone(rng):
    maps = _maps(rng, (3, 4), (2, 2))
    y, gates, variables = _run("none", maps, rng)
    np.testing.assert_array_equal(y, maps[1])
    assert not gates and not variables


@pytest.mark.parametrize("bias", [False, True])
def test_sum_projects_what_has_other_channels(rng, bias):
    equal, up, coarse = _maps(rng, (3, 4), (2, 2), (5, 5, 8))
    other, _, _ = _maps(rng, (3, 4), (2, 2), (4, 5, 8))
    nothing = rng.standard_normal((2, 3, 4, 0))
    maps = ((*equal, *other, nothing, *equal), up, coarse)
    y, gates, variables = _run("sum", maps, rng, bias=bias)
    assert not gates and set(variables["params"]) == {"project1"}
    project = variables["params"]["project1"]
    projected = other[0] @ project["kernel"] + project.get("bias", 0.0)
    _close(y, up + 2 * equal[0] + projected)
    assert ("bias" in project) is bias


# --- Gates ---------------------------------------------------------------------------


def _interpolated(x, size, stride):
    """Linear interpolation between cells, each in the middle of its stride."""
    for axis, (n, s) in enumerate(zip(size, stride, strict=True), start=1):
        at = (np.arange(n) + 0.5) / s - 0.5
        cells = np.arange(x.shape[axis])
        x = np.apply_along_axis(lambda row: np.interp(at, cells, row), axis, x)  # noqa: B023
    return x


def _theta(x, kernel):
    """The convolution whose windows do not overlap; what is left over is dropped."""
    *stride, _, features = kernel.shape
    size = [n // s for n, s in zip(x.shape[1:-1], stride, strict=True)]
    out = np.zeros((len(x), *size, features))
    for tap in np.ndindex(*stride):
        index = [slice(t, n * s, s) for t, n, s in zip(tap, size, stride, strict=True)]
        out += x[(slice(None), *index)] @ kernel[tap]
    return out


GRIDS = [  # size of the skip, of the coarse map, stride
    ((4, 6), (2, 3), (2, 2)),
    ((5, 7), (2, 3), (2, 2)),  # as pooling leaves odd sizes
    ((5, 7), (3, 4), (2, 2)),  # as strided convolutions do
    ((6, 3), (2, 3), (3, 1)),
    ((3, 4, 5), (3, 2, 2), (1, 2, 2)),
    ((1, 4), (1, 2), (2, 2)),  # an axis of one pixel is not halved
    ((1, 1, 4), (1, 1, 2), (2, 2, 2)),
]


@pytest.mark.parametrize(("size", "coarse", "stride"), GRIDS)
def test_the_grid_gate_is_its_formula(rng, size, coarse, stride):
    maps = ((x,), up, g) = _maps(rng, size, coarse)
    y, (alpha,), variables = _run("gated", maps, rng, stride=stride, norm="batch")
    params = variables["params"]["gate0"]
    assert set(params) == {"theta", "phi", "psi", "w", "w_norm"}
    assert set(params["theta"]) == {"kernel"}
    assert params["theta"]["kernel"].shape == (*stride, 4, 2)
    theta = _theta(x, params["theta"]["kernel"])
    # A cell of the coarse map with no whole window of the skip gets nothing from it.
    short = [n - m for n, m in zip(coarse, theta.shape[1:-1], strict=True)]
    theta = np.pad(theta, [(0, 0), *((0, n) for n in short), (0, 0)])
    phi = g @ params["phi"]["kernel"] + params["phi"]["bias"]
    psi = np.maximum(theta + phi, 0.0) @ params["psi"]["kernel"] + params["psi"]["bias"]
    expected = _interpolated(_sigmoid(psi), size, stride)
    _close(alpha, expected)
    assert alpha.shape == (2, *size, 1) and 0 <= alpha.min() <= alpha.max() <= 1
    gated = _norm(
        variables, ("gate0", "w_norm"), (expected * x) @ params["w"]["kernel"]
    )
    _close(y, np.concatenate([gated, up], -1))


@pytest.mark.parametrize("size", [(4, 6), (5, 1), (3, 4, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_full_gate_is_its_formula(rng, size, bias):
    maps = ((x,), up, _) = _maps(rng, size, (2,) * len(size))
    y, (alpha,), variables = _run("gated_full", maps, rng, norm="batch", bias=bias)
    params = variables["params"]["gate0"]
    assert set(params) == {
        n + e for n in ("theta", "phi", "psi") for e in ("", "_norm")
    }

    def unit(name, x):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        return _norm(variables, ("gate0", f"{name}_norm"), x)

    expected = _sigmoid(unit("psi", np.maximum(unit("theta", x) + unit("phi", up), 0)))
    assert params["theta"]["kernel"].shape == (4, 2)
    _close(alpha, expected)
    assert alpha.shape == (2, *size, 1) and 0 <= alpha.min() <= alpha.max() <= 1
    _close(y, np.concatenate([expected * x, up], -1))


@pytest.mark.parametrize("name", ["gated", "gated_full"])
def test_every_skip_has_a_gate_of_its_own(rng, name):
    maps = skips, up, coarse = _maps(rng, (4, 5), (2, 2), skips=2)
    y, alphas, variables = _run(name, maps, rng)
    assert set(variables["params"]) == {"gate0", "gate1"} and len(alphas) == 2
    # Each is what it would be alone.
    merge = merges.MERGES[name](level=1, stride=(2, 2), kit=_kit())
    for i, skip in enumerate(skips):
        own = {"params": {"gate0": variables["params"][f"gate{i}"]}}
        alone, (alpha,) = jax.jit(merge.apply)(own, (skip,), up, coarse)
        _close(alphas[i], alpha)
        _close(y[..., 4 * i : 4 * (i + 1)], alone[..., :4])
    np.testing.assert_array_equal(y[..., 8:], up)


def test_the_grid_form_leaves_the_finest_skip_and_both_leave_one_without_channels(rng):
    maps = (x,), up, coarse = _maps(rng, (4, 5), (2, 2))
    y, gates, variables = _run("gated", maps, rng, level=0)
    np.testing.assert_array_equal(y, np.concatenate([x, up], -1))
    assert not gates and not variables
    nothing = ((x[..., :0],), up, coarse)
    for name in ("gated", "gated_full"):
        y, gates, variables = _run(name, nothing, rng)
        np.testing.assert_array_equal(y, up)
        assert not gates and not variables
    _, gates, _ = _run("gated_full", maps, rng, level=0)
    assert len(gates) == 1
