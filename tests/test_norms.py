"""Norms against NumPy, flax and PyTorch, and their derivative against autodiff's."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import norms, sharding
from unet_jax.compiled import collectives
from unet_jax.types import InputError


def _random(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


# --- Means ---------------------------------------------------------------------------


def test_a_mean_over_many_pixels_keeps_its_digits(rng):
    x = np.float32(30.0 + 0.05 * rng.standard_normal((2, 200, 300, 2)))
    mean = norms.mean_of(norms.at_least_float32, (jnp.asarray(x),), (1, 2))
    expected = np.mean(x, (1, 2), dtype=np.float64, keepdims=True)
    assert mean.shape == expected.shape == (2, 1, 1, 2)
    np.testing.assert_allclose(mean, expected, rtol=2e-7)
    again = norms.mean_of(norms.at_least_float32, (jnp.asarray(x),), (2, 1))
    chex.assert_trees_all_equal(again, mean)


@pytest.mark.parametrize("width", [1, 8, 9, 11, 12, 300])
@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2), (2,)])
def test_a_mean_of_products_is_that_of_the_plain_sum(rng, monkeypatch, width, axes):
    monkeypatch.setattr(norms, "LARGE", 0)
    x, y = rng.standard_normal((2, 2, 3, width, 4))
    centre = y.mean((0, 1, 2), keepdims=True)

    def product(x, y):
        return x * (y - jnp.asarray(centre))

    with jax.enable_x64(True):
        mean = norms.mean_of(product, (jnp.asarray(x), jnp.asarray(y)), axes)
    expected = np.mean(x * (y - centre), axes, keepdims=True)
    np.testing.assert_allclose(mean, expected, rtol=1e-12, atol=1e-14)


def test_columns_divide_the_width_and_only_large_maps_have_them(monkeypatch):
    widths = {1: 1, 7: 7, 8: 8, 9: 3, 11: 1, 12: 6, 16: 8, 300: 6}
    for width, columns in widths.items():
        small = jax.ShapeDtypeStruct((1, 2, width, 2), jnp.float32)
        assert norms._columns(small) == 1
        large = jax.ShapeDtypeStruct((1, norms.LARGE, width, 2), jnp.float32)
        assert norms._columns(large) == columns
    monkeypatch.setattr(sharding, "on_cpu", lambda: False)
    assert norms._columns(large) == 1


def test_one_program_for_all_platforms_is_exported(rng, monkeypatch):
    monkeypatch.setattr(norms, "LARGE", 0)
    given = _random(rng, 2, 3, 8, 6), _random(rng, 6), _random(rng, 6)
    gradient = jax.jit(jax.grad(_total(_functions("batch", 2)[0]), (0, 1, 2)))
    exported = jax.export.export(gradient, platforms=["cpu", "tpu", "cuda"])(*given)
    chex.assert_trees_all_close(
        exported.call(*given), gradient(*given), rtol=1e-5, atol=1e-5
    )


# --- The derivative ------------------------------------------------------------------


def _grouped(groups):
    """Means shared by the channels of a group."""

    def pool(means):
        split = means.reshape(*means.shape[:-1], groups, -1)
        shared = jnp.mean(split, -1, keepdims=True)
        return jnp.broadcast_to(shared, split.shape).reshape(means.shape)

    return pool


def _plain(x, scale, bias, axes, pool):
    """The formula, with a derivative that is left to JAX."""
    mean = pool(jnp.mean(x, axes, keepdims=True))
    var = pool(jnp.mean(jnp.square(x - mean), axes, keepdims=True))
    one = (1,) * (x.ndim - 1) + (-1,)
    unit = (x - mean) / jnp.sqrt(var + 1e-5)
    return unit * scale.reshape(one) + bias.reshape(one), mean, var


def _compiled(function, **options):
    """Under ``jit``, with all passes of XLA and none of LLVM: a third of the time."""
    options["compiler_options"] = {"xla_backend_optimization_level": 0}
    return jax.jit(function, **options)


def _functions(kind, rank):
    """Ours and the plain formula, of map, scale and bias."""
    space = tuple(range(1, rank + 1))
    axes = (0, *space) if kind == "batch" else space
    pool = _grouped(3) if kind == "group" else lambda means: means
    return [
        partial(function, axes=axes, pool=pool)
        for function in (norms.normalised, _plain)
    ]


def _given(rng, shape, mean=0.0):
    """Map, scale and bias in float64."""
    x = mean + rng.standard_normal(shape)
    return [jnp.asarray(a) for a in (x, *rng.standard_normal((2, shape[-1])))]


def _total(function):
    """A number that depends on the map and on both statistics."""

    def total(*given):
        y, mean, var = function(*given)
        wave = jnp.sin(y + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))
        return jnp.sum(wave) + jnp.sum(jnp.cos(mean)) + jnp.sum(jnp.sin(2 * var))

    return total


def _first(function, *given):
    """Value and first derivatives in both directions, by name."""
    every = tuple(range(len(given)))
    towards = tuple(jnp.cos(3 * a) for a in given)
    return {
        "value": function(*given),
        "gradient": jax.grad(_total(function), every)(*given),
        "jvp": jax.jvp(function, given, towards),
        "jvp by the map": jax.jvp(
            lambda x: function(x, *given[1:]), given[:1], towards[:1]
        ),
    }


def _more(function, *given):
    """Second derivatives, and the function mapped over maps, by name."""
    every = tuple(range(len(given)))
    gradient = jax.grad(_total(function), every)
    towards = tuple(jnp.cos(3 * a) for a in given)
    maps = jnp.stack([given[0], 1 - given[0]])

    def of_gradient(*given):
        return sum(jnp.sum(jnp.cos(part)) for part in gradient(*given))

    return {
        "hessian times vector": jax.jvp(gradient, given, towards)[1],
        "gradient of gradient": jax.grad(of_gradient, every)(*given),
        "mapped": jax.vmap(gradient, (0, None, None))(maps, *given[1:]),
    }


def _compare(what, kind, rng, shape):
    with jax.enable_x64(True):
        given = _given(rng, shape)
        ours, plain = (
            _compiled(partial(what, function))(*given)
            for function in _functions(kind, len(shape) - 2)
        )
    for name, expected in plain.items():
        chex.assert_trees_all_equal_dtypes(ours[name], expected)
        chex.assert_trees_all_close(
            ours[name], expected, rtol=1e-9, atol=1e-9, custom_message=name
        )


# The last spatial axis in 1, 3, 8 and, of a volume, 2 columns.
SHAPES = [(2, 3, 11, 6), (3, 2, 9, 6), (2, 2, 8, 6), (2, 3, 2, 2, 6)]


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_derivative_is_that_of_the_formula(rng, monkeypatch, kind, shape):
    monkeypatch.setattr(norms, "LARGE", 0)
    _compare(_first, kind, rng, shape)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("batch", SHAPES[2]), ("group", SHAPES[1]), ("group", SHAPES[0])],
)
def test_the_second_derivative_is_that_of_the_formula(rng, monkeypatch, kind, shape):
    monkeypatch.setattr(norms, "LARGE", 0)
    _compare(_more, kind, rng, shape)


@pytest.mark.parametrize("large", [0, norms.LARGE])
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_nothing_as_large_as_the_map_is_kept_but_the_map(rng, monkeypatch, kind, large):
    monkeypatch.setattr(norms, "LARGE", large)
    x, scale, bias = _random(rng, 3, 4, 8, 6), _random(rng, 6), _random(rng, 6)
    ours = _functions(kind, 2)[0]
    for function in (ours, jax.jit(ours)):
        kept = jax.tree.leaves(jax.vjp(function, x, scale, bias)[1])
        (largest,) = (leaf for leaf in kept if leaf.size > 3 * 6)
        chex.assert_trees_all_equal(largest, x)


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_under_checkpoint_and_scan_it_is_the_formula(rng, monkeypatch, kind):
    monkeypatch.setattr(norms, "LARGE", 0)
    with jax.enable_x64(True):
        x, _, _ = _given(rng, (2, 3, 8, 6))
        scales, biases = jnp.asarray(rng.standard_normal((2, 3, 6)))
        ours, plain = _functions(kind, 2)

        def scanned(x, scales, biases):
            def layer(x, given):
                y, mean, var = jax.checkpoint(ours)(x, *given)
                return jnp.sin(y), (mean, var)

            return jax.lax.scan(layer, x, (scales, biases))

        def unrolled(x, scales, biases):
            found = []
            for given in zip(scales, biases, strict=True):
                y, *statistics = plain(x, *given)
                x = jnp.sin(y)
                found.append(tuple(statistics))
            return x, jax.tree.map(lambda *rows: jnp.stack(rows), *found)

        def gradient(function):
            def loss(*given):
                y, (mean, var) = function(*given)
                return _total(lambda: (y, mean, var))()

            return _compiled(jax.value_and_grad(loss, (0, 1, 2)))(x, scales, biases)

        chex.assert_trees_all_close(
            gradient(scanned), gradient(unrolled), rtol=1e-9, atol=1e-9
        )


def _over_devices(data, space, kind, given):
    """Value and gradients on a mesh, and what devices said to each other."""
    mesh = sharding.make_mesh(data, space)
    whole, split = sharding.replicated(mesh), sharding.split(mesh, 4)
    places = (split, whole, whole)
    ours = jax.value_and_grad(_total(_functions(kind, 2)[0]), (0, 1, 2))
    run = _compiled(
        sharding.within(mesh, ours), in_shardings=places, out_shardings=(whole, places)
    )
    program = run.lower(*given).compile()
    value = jax.device_get(program(*map(jax.device_put, given, places)))
    return value, collectives(program.as_text())


@pytest.mark.parametrize(("data", "space"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_over_two_devices_it_is_the_formula(rng, monkeypatch, kind, data, space):
    monkeypatch.setattr(norms, "LARGE", 0)
    with jax.enable_x64(True):
        given = _given(rng, (2, 4, 8, 6), mean=3.0)
        plain = jax.value_and_grad(_total(_functions(kind, 2)[1]), (0, 1, 2))
        value, _ = _over_devices(data, space, kind, given)
        chex.assert_trees_all_close(
            value, _compiled(plain)(*given), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(("data", "space"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_over_two_devices_only_sums_move(rng, kind, data, space):
    given = [_random(rng, *shape) for shape in ((2, 16, 64, 16), (16,), (16,))]
    assert norms._columns(given[0]) == 8  # where rows are whole
    _, found = _over_devices(data, space, kind, given)
    assert set(found) == {"all-reduce"}
    # Eight numbers for each channel, and the loss.
    assert found["all-reduce"].bytes <= (2 * 8 * 16 + 1) * 4


def _as_both_devices(kind, x, axis_name):
    """A batch norm, its statistics and its gradient."""
    make = norms.norm_factory(kind, train=True, axis_name=axis_name)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return make(name="norm")(x)

    width = x.shape[-1]
    begin = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
    params = {"scale": jnp.linspace(1, 2, width), "bias": jnp.linspace(-1, 1, width)}

    def loss(x):
        variables = {"params": {"norm": params}, "batch_stats": {"norm": begin}}
        y, updated = Net().apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(3 * y)), (y, updated["batch_stats"]["norm"])

    return jax.grad(loss, has_aux=True)(x)


@pytest.mark.parametrize("large", [0, norms.LARGE])
@pytest.mark.parametrize("kind", ["batch", "batch_unbiased"])
def test_devices_of_a_pmap_share_the_statistics(rng, monkeypatch, kind, large):
    monkeypatch.setattr(norms, "LARGE", large)
    x = np.float32(2 + rng.standard_normal((4, 3, 8, 5)))
    gradient, (y, stats) = _as_both_devices(kind, jnp.asarray(x), None)
    mapped = jax.pmap(
        lambda x: _as_both_devices(kind, x, "devices"), axis_name="devices"
    )(x.reshape(2, 2, 3, 8, 5))
    two, (parts, kept) = jax.device_get(mapped)
    np.testing.assert_allclose(parts.reshape(x.shape), y, atol=2e-6)
    np.testing.assert_allclose(two.reshape(x.shape), gradient, atol=2e-5)
    for name, statistic in stats.items():
        for part in kept[name]:
            np.testing.assert_allclose(part, statistic, rtol=1e-6)


# --- Against flax and PyTorch --------------------------------------------------------


@pytest.mark.parametrize("large", [0, norms.LARGE])
def test_batch_norm_keeps_the_statistics_that_flax_keeps(rng, monkeypatch, large):
    """For several batches, and evaluates by them."""
    monkeypatch.setattr(norms, "LARGE", large)
    theirs = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
    ours = norms.BatchNorm(use_running_average=False)
    batches = [_random(rng, 2, 3, 8, 5) * 2 + 1 for _ in range(3)]
    variables = others = ours.init(jax.random.key(0), batches[0])
    chex.assert_trees_all_equal(
        variables, theirs(use_running_average=False).init(jax.random.key(0), batches[0])
    )
    for x in batches:
        y, new = ours.apply(variables, x, mutable=["batch_stats"])
        z, other = theirs(use_running_average=False).apply(
            others, x, mutable=["batch_stats"]
        )
        variables, others = {**variables, **new}, {**others, **other}
        chex.assert_trees_all_close(y, z, atol=5e-6)
        chex.assert_trees_all_close(variables, others, rtol=2e-6, atol=1e-6)
    chex.assert_trees_all_close(
        norms.BatchNorm(use_running_average=True).apply(variables, x),
        theirs(use_running_average=True).apply(variables, x),
        atol=2e-6,
    )


@pytest.mark.parametrize("rank", [2, 3])
def test_unbiased_batch_norm_is_that_of_pytorch(rng, rank):
    torch = pytest.importorskip("torch")
    theirs = (torch.nn.BatchNorm2d if rank == 2 else torch.nn.BatchNorm3d)(5)
    ours = norms.BatchNorm(use_running_average=False, unbiased=True)
    shape = (2, *(3, 2, 2)[:rank], 5)
    variables = ours.init(jax.random.key(0), jnp.zeros(shape))
    for _ in range(3):
        x = np.float32(1 + rng.standard_normal(shape))
        y, new = ours.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
        variables = {**variables, **new}
        z = theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
        z = np.moveaxis(z.detach().numpy(), 1, -1)
        np.testing.assert_allclose(y, z, atol=5e-6)
    stats = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], theirs.running_var, rtol=1e-5)
    theirs.eval()
    z = theirs(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy()
    y = norms.BatchNorm(use_running_average=True, unbiased=True).apply(variables, x)
    np.testing.assert_allclose(y, np.moveaxis(z, 1, -1), atol=5e-6)


@pytest.mark.parametrize("large", [0, norms.LARGE])
@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_bfloat16_has_statistics_in_float32(rng, monkeypatch, kind, large):
    monkeypatch.setattr(norms, "LARGE", large)
    x = (30 + _random(rng, 3, 4, 8, 6)).astype(jnp.bfloat16)
    scale, bias = _random(rng, 6), _random(rng, 6)
    ours = _functions(kind, 2)[0]
    y, mean, var = ours(x, scale, bias)
    assert (y.dtype, mean.dtype, var.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    # The same as of the map in float32, of which only the result is rounded.
    exact = ours(x.astype(jnp.float32), scale, bias)
    chex.assert_trees_all_equal(
        (y, mean, var), (exact[0].astype(jnp.bfloat16), *exact[1:])
    )

    def loss(x, scale, bias):
        return jnp.sum(jnp.sin(ours(x, scale, bias)[0].astype(jnp.float32)))

    given = (x, scale, bias)
    gradients = jax.grad(loss, (0, 1, 2))(*given)
    chex.assert_trees_all_equal_dtypes(gradients, given)
    found = jax.grad(loss, (0, 1, 2))(x.astype(jnp.float32), scale, bias)
    # sin' of a result and its cotangent, each rounded to eight bits.
    for one, other in zip(gradients, found, strict=True):
        error = jnp.abs(one.astype(jnp.float32) - other)
        assert jnp.max(error) <= 2**-6 * jnp.max(jnp.abs(other))


# --- The factory ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch", "instance", "group", "none"])
def test_norms_keep_the_type_and_normalise(rng, kind):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norms.norm_factory(kind, train=True, groups=2)(name="norm")(x)

    x = (3.0 + 2.0 * _random(rng, 4, 8, 8, 4)).astype(jnp.bfloat16)
    out, _ = Net().init_with_output(jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    if kind == "none":
        chex.assert_trees_all_equal(out, x)
        return
    axes = {"batch": (0, 1, 2), "instance": (1, 2), "group": (1, 2, 4)}[kind]
    value = np.asarray(out, np.float64)
    if kind == "group":
        value = value.reshape(4, 8, 8, 2, 2)
    np.testing.assert_allclose(value.mean(axes), 0.0, atol=5e-3)
    np.testing.assert_allclose(value.std(axes), 1.0, atol=1e-2)


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(InputError, match="batch"):
        norms.norm_factory("bach", train=True)(name="norm")


# --- Against float64 -----------------------------------------------------------------


class _Normed(nn.Module):
    """A layer of a norm factory."""

    kind: str
    train: bool = True
    groups: int = 8

    @nn.compact
    def __call__(self, x):
        make = norms.norm_factory(self.kind, train=self.train, groups=self.groups)
        return make(name="norm")(x)


KINDS = ["batch", "batch_unbiased", "instance", "instance_plain", "group"]


def _norm_variables(rng, kind, width):
    """Random scales, biases and running statistics, float64."""
    params = {k: rng.standard_normal(width) for k in ("scale", "bias")}
    variables = {"params": {} if kind == "instance_plain" else {"norm": params}}
    if kind.startswith("batch"):
        stats = {"mean": rng.standard_normal(width), "var": rng.uniform(1, 2, width)}
        variables["batch_stats"] = {"norm": stats}
    return variables


def _as(dtype, tree):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _normalised(x, variables, kind, groups=1):
    """A norm in NumPy."""
    x = np.asarray(x, np.float64)
    space = tuple(range(1, x.ndim - 1))
    if kind.startswith("batch"):
        split, axes = x, (0, *space)
    else:
        groups = groups if kind == "group" else x.shape[-1]
        split = x.reshape(*x.shape[:-1], groups, -1)
        axes = (*space, x.ndim)
    mean, var = split.mean(axes, keepdims=True), split.var(axes, keepdims=True)
    y = ((split - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    params = variables["params"].get("norm", {"scale": 1.0, "bias": 0.0})
    return y * params["scale"] + params["bias"]


def _call(module, variables, x):
    """The output, and the statistics afterwards."""
    # flax's own batch norm, and float32 statistics of float64 maps, mix types.
    with jax.numpy_dtype_promotion("standard"):
        y, updated = module.apply(variables, x, mutable=["batch_stats"])
    return y, updated.get("batch_stats", {}).get("norm", {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 3, 4, 5, 12)])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (30.0, 0.05)])
def test_norms_equal_float64(rng, kind, shape, mean, deviation):
    x = np.float32(mean + deviation * rng.standard_normal(shape))
    variables = _norm_variables(rng, kind, shape[-1])
    y, _ = _call(_Normed(kind), _as(jnp.float32, variables), jnp.asarray(x))
    assert y.dtype == jnp.float32
    # Six channels are fewer than eight groups: one. Of twelve, gcd(8, 12) = 4.
    expected = _normalised(x, variables, kind, {6: 1, 12: 4}[shape[-1]])
    # Half a unit in the last place of 30 is 1e-6, and 2e-5 deviations.
    atol = 2e-6 if mean == 0 else 2e-4
    np.testing.assert_allclose(y, expected, atol=atol)


@pytest.mark.parametrize(
    ("width", "groups"), [(3, 1), (7, 1), (8, 8), (12, 4), (9, 1), (16, 8)]
)
def test_groups_that_do_not_divide_the_width(rng, width, groups):
    x = np.float32(rng.standard_normal((2, 3, 2, width)))
    variables = _norm_variables(rng, "group", width)
    y, _ = _call(_Normed("group"), _as(jnp.float32, variables), jnp.asarray(x))
    expected = _normalised(x, variables, "group", groups)
    np.testing.assert_allclose(y, expected, atol=5e-6)


def test_unbiased_batch_norm_keeps_the_unbiased_variance(rng):
    x = np.float32(30.0 + 0.05 * rng.standard_normal((2, 3, 2, 5)))
    variables = _norm_variables(rng, "batch_unbiased", 5)
    module = _Normed("batch_unbiased")
    y, stats = _call(module, _as(jnp.float32, variables), jnp.asarray(x))
    values = np.asarray(x, np.float64).reshape(12, 5)
    old = variables["batch_stats"]["norm"]
    mean = 0.9 * old["mean"] + 0.1 * values.mean(0)
    var = 0.9 * old["var"] + 0.1 * values.var(0) * 12 / 11
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
    # Both variances are of the order of epsilon: normalised is by the biased one.
    same, theirs = _call(_Normed("batch"), _as(jnp.float32, variables), jnp.asarray(x))
    np.testing.assert_allclose(y, same, atol=2e-4)
    np.testing.assert_allclose(stats["mean"], theirs["mean"], rtol=1e-6)


def test_unbiased_batch_norm_evaluates_by_its_statistics(rng):
    x = np.float32(rng.standard_normal((2, 3, 4)))
    variables = _norm_variables(rng, "batch_unbiased", 4)
    given = _as(jnp.float32, variables)
    y, stats = _call(_Normed("batch_unbiased", train=False), given, jnp.asarray(x))
    chex.assert_trees_all_equal(stats, given["batch_stats"]["norm"])
    old, params = variables["batch_stats"]["norm"], variables["params"]["norm"]
    expected = (x - old["mean"]) / np.sqrt(old["var"] + 1e-5)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_unbiased_batch_norm_begins_at_zero_and_one_and_init_counts_nothing(rng):
    x = jnp.asarray(30.0 + rng.standard_normal((2, 3, 4)), jnp.float32)
    variables = _Normed("batch_unbiased").init(jax.random.key(0), x)
    ones, zeros = jnp.ones(4, jnp.float32), jnp.zeros(4, jnp.float32)
    expected = {
        "params": {"norm": {"scale": ones, "bias": zeros}},
        "batch_stats": {"norm": {"mean": zeros, "var": ones}},
    }
    chex.assert_trees_all_equal(variables, expected)


def test_one_value_a_channel_has_no_variance_and_is_no_nan(rng):
    x = _random(rng, 1, 1, 1, 3)
    variables = _norm_variables(rng, "batch_unbiased", 3)
    given = _as(jnp.float32, variables)
    y, stats = _call(_Normed("batch_unbiased"), given, x)
    np.testing.assert_allclose(y.ravel(), variables["params"]["norm"]["bias"], 1e-6)
    old = variables["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["var"], 0.9 * old["var"], rtol=1e-6)
    for kind in KINDS:
        given = _as(jnp.float32, _norm_variables(rng, kind, 3))

        def total(x, kind=kind, given=given):
            return jnp.sum(jnp.sin(_call(_Normed(kind), given, x)[0]))

        assert np.all(np.isfinite(jax.grad(total)(x)))


@pytest.mark.parametrize("large", [0, norms.LARGE])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_norms_are_those_of_flax(rng, monkeypatch, kind, large):
    monkeypatch.setattr(norms, "LARGE", large)
    with jax.enable_x64(True):
        x = jnp.asarray(30.0 + 0.05 * rng.standard_normal((3, 4, 3, 12)))
        variables = _as(jnp.float64, _norm_variables(rng, kind, 12))
        options = {"epsilon": 1e-5, "dtype": jnp.float64, "use_fast_variance": False}
        theirs = {
            "batch": nn.BatchNorm(use_running_average=False, **options),
            "batch_unbiased": nn.BatchNorm(use_running_average=False, **options),
            "instance": nn.InstanceNorm(**options),
            "instance_plain": nn.InstanceNorm(
                use_bias=False, use_scale=False, **options
            ),
            "group": nn.GroupNorm(num_groups=4, **options),
        }[kind]
        weights = jnp.asarray(rng.standard_normal(x.shape))
        bare = {k: tree.get("norm", {}) for k, tree in variables.items()}

        def gradients(module, variables):
            def loss(params, x):
                y, _ = _call(module, {**variables, "params": params}, x)
                return jnp.sum(weights * jnp.sin(y)), y

            gradient = _compiled(jax.grad(loss, (0, 1), has_aux=True))
            return gradient(variables["params"], x)

        (params, by_x), y = gradients(_Normed(kind), variables)
        (flax_params, flax_by_x), flax_y = gradients(theirs, bare)
        chex.assert_trees_all_close(y, flax_y, rtol=1e-9, atol=1e-9)
        chex.assert_trees_all_close(by_x, flax_by_x, rtol=1e-8, atol=1e-8)
        chex.assert_trees_all_close(
            params.get("norm", {}), flax_params, rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("kind", ["batch", "batch_unbiased", "instance", "group"])
def test_a_norm_is_the_same_compiled_mapped_and_over_two_devices(rng, kind):
    x = np.float32(30.0 + 0.05 * rng.standard_normal((4, 5, 3, 12)))
    variables = _as(jnp.float32, _norm_variables(rng, kind, 12))
    run = jax.jit(partial(_call, _Normed(kind)))
    one, stats = _call(_Normed(kind), variables, jnp.asarray(x))
    chex.assert_trees_all_close(run(variables, x)[0], one, atol=2e-4)
    mesh = sharding.make_mesh(2)
    placed = jax.device_put(variables, sharding.replicated(mesh))
    two, others = run(placed, sharding.place({"image": x}, mesh)["image"])
    assert len(two.sharding.device_set) == 2
    chex.assert_trees_all_close(jax.device_get(two), np.asarray(one), atol=2e-4)
    chex.assert_trees_all_close(jax.device_get(others), stats, rtol=1e-5)
    # Batch norm mapped over examples takes each one's own statistics.
    mapped = jax.vmap(lambda x: _call(_Normed(kind), variables, x[None])[0][0])(x)
    rows = [_call(_Normed(kind), variables, x[i : i + 1])[0][0] for i in range(4)]
    chex.assert_trees_all_close(mapped, jnp.stack(rows), atol=2e-4)
    if not kind.startswith("batch"):
        chex.assert_trees_all_close(mapped, one, atol=2e-4)
