"""Self-attention at the coarsest level: the rotation, the formulas, any size."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import bottlenecks, layers


@pytest.fixture
def _float64():
    # Standard: in float64 flax's statistics and jax's softmax name float32.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def _transformer(dtype=jnp.float64, **options):
    dense = partial(nn.Dense, use_bias=False, dtype=dtype)
    others = dict.fromkeys(("conv", "norm", "act", "excite", "up_conv"))
    return bottlenecks.Transformer(layers.Kit(dense=dense, **others), **options)


def _variables(module, x, rng):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), shapes)


# --- The rotation --------------------------------------------------------------------


def _turned(x, place):
    """Channels of ``x`` as one pixel at ``place``, by complex numbers."""
    pairs = len(x) // (2 * len(place))
    turned = pairs * len(place)
    z = x[:turned] + 1j * x[turned : 2 * turned]
    speeds = [100 ** -(i / pairs) for i in range(pairs)]
    angles = [at * speed for at in place for speed in speeds]
    z = z * np.exp(1j * np.asarray(angles))
    return np.concatenate([z.real, z.imag, x[2 * turned :]])


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("size", "channels"), [((4, 3), 16), ((2, 3, 2), 15), ((1, 1), 8), ((3, 2), 3)]
)
def test_a_rotation_is_a_product_of_complex_numbers(rng, size, channels):
    x = rng.standard_normal((2, int(np.prod(size)), 3, channels))
    expected = np.empty_like(x)
    for i, place in enumerate(np.ndindex(*size)):
        for index in np.ndindex(2, 3):
            b, h = index
            expected[b, i, h] = _turned(x[b, i, h], place)
    ours = bottlenecks.rotate(jnp.asarray(x), size)
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12)
    # It is a rotation: lengths stay, and what has too few channels stays as it is.
    np.testing.assert_allclose(
        np.linalg.norm(ours, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12
    )
    if channels < 2 * len(size):
        np.testing.assert_array_equal(ours, x)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("size", "shift"), [((6, 5), (2, 3)), ((6, 5), (5, 0)), ((3, 4, 5), (1, 2, 3))]
)
def test_products_depend_on_how_far_apart_two_pixels_are(rng, size, shift):
    query, key = rng.standard_normal((2, 12))
    everywhere = np.broadcast_to(query, (1, int(np.prod(size)), 1, 12))
    elsewhere = np.broadcast_to(key, everywhere.shape)
    queries, keys = (
        np.asarray(bottlenecks.rotate(jnp.asarray(x), size)).reshape(*size, 12)
        for x in (everywhere, elsewhere)
    )
    inside = [n - s for n, s in zip(size, shift, strict=True)]
    places = list(np.ndindex(*inside))
    first = {(p, q): queries[p] @ keys[q] for p in places for q in places}
    for (p, q), product in first.items():
        p, q = (tuple(np.add(place, shift)) for place in (p, q))
        np.testing.assert_allclose(queries[p] @ keys[q], product, rtol=0, atol=1e-12)
    # And it does depend on that, or there would be no positions at all.
    origin = (0,) * len(size)
    assert np.ptp([queries[origin] @ keys[q] for q in np.ndindex(*size)]) > 0.1


# --- The transformer -----------------------------------------------------------------


def _attend(query, key, value):
    """``[N, C]`` each; softmax over the keys."""
    scores = query @ key.T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value


def _expected(x, params, *, heads):
    batch, *size, channels = x.shape
    y = x.reshape(batch, -1, channels)

    def norm(p, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * p["scale"] + p["bias"]

    def dense(p, x):
        return x @ p["kernel"] + p["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    places = list(np.ndindex(*size))
    for i in range(len(params) - 1):
        p = params[f"layer{i}"]
        z = norm(p["norm0"], y)
        query, key, value = (dense(p[k], z) for k in ("query", "key", "value"))
        mixed = np.empty_like(z)
        for b in range(batch):
            for part in np.split(np.arange(channels), heads):
                q, k = (
                    np.stack(
                        [_turned(x[b, n, part], at) for n, at in enumerate(places)]
                    )
                    for x in (query, key)
                )
                mixed[b][:, part] = _attend(q, k, value[b][:, part])
        y = y + dense(p["out"], mixed)
        y = y + dense(p["narrow"], gelu(dense(p["widen"], norm(p["norm1"], y))))
    return norm(params["norm"], y).reshape(x.shape)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("size", "channels", "options", "heads"),
    [
        ((3, 4), 12, {"layers": 2, "head_features": 6}, 2),
        ((5, 1), 8, {"layers": 1}, 1),
        ((1, 1), 8, {"layers": 1}, 1),
        ((2, 3, 2), 14, {"layers": 1, "head_features": 4}, 2),  # 3 do not divide 14
    ],
)
def test_a_transformer_is_attention_with_rotated_queries_and_keys(
    rng, size, channels, options, heads
):
    x = rng.standard_normal((2, *size, channels))
    module = _transformer(**options)
    variables = _variables(module, x, rng)
    y = jax.jit(module.apply)(variables, x)
    assert y.dtype == jnp.float64
    expected = _expected(x, variables["params"], heads=heads)
    # jax's attention takes the softmax in float32 whatever it is given: 6e-8, which
    # what follows makes larger.
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 3), (1, 1, 1), (2, 1, 3)])
def test_one_set_of_parameters_serves_every_size(rng, size):
    module = _transformer(jnp.float32, layers=2, head_features=4)
    x = jnp.asarray(rng.standard_normal((2, *size, 8)), jnp.float32)
    whole = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
    here = jax.eval_shape(module.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, here)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), whole
    )
    y = jax.jit(module.apply)(variables, x)
    assert y.shape == x.shape and y.dtype == jnp.float32
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize(
    ("channels", "heads"), [(64, 1), (32, 1), (128, 2), (200, 2), (210, 3), (193, 1)]
)
def test_heads_divide_the_channels(channels, heads):
    seen = []

    def watch(call, args, kwargs, context):
        if isinstance(context.module, bottlenecks.TransformerLayer):
            seen.append(context.module.heads)
        return call(*args, **kwargs)

    module = _transformer(jnp.float32, layers=1)
    x = jnp.zeros((1, 2, 2, channels), jnp.float32)
    with nn.intercept_methods(watch):
        jax.eval_shape(module.init, jax.random.key(0), x)
    assert set(seen) == {heads}
