"""Optimizers: they compute what PyTorch documents; schedules hit their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import optim
from unet_jax.types import InputError

PARAMS = {"encoder": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}


def _update(grads, **options):
    tx, _ = optim.build(total_steps=100, **options)
    state, params = tx.init(PARAMS), PARAMS
    for g in grads:
        tree = jax.tree.map(lambda p, g=g: jnp.full_like(p, g), PARAMS)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(tree, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params["encoder"]


def test_sgd_with_momentum_and_l2():
    out = _update(
        [1.0, 2.0], name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.5
    )
    kernel = bias = 1.0
    v = w = 0.0
    for g in (1.0, 2.0):
        v = 0.9 * v + (g + 0.5 * kernel)
        w = 0.9 * w + g  # biases do not decay
        kernel, bias = kernel - 0.1 * v, bias - 0.1 * w
    np.testing.assert_allclose(out["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(out["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_decoupled_decay(name):
    out = _update([0.5, -0.25], name=name, learning_rate=0.1, weight_decay=0.5)
    p, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate((0.5, -0.25), start=1):
        old = p
        if name == "adam":
            g = g + 0.5 * old
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = old - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        if name == "adamw":
            p -= 0.1 * 0.5 * old
    np.testing.assert_allclose(out["kernel"], p, rtol=1e-5)


def test_clip_bounds_the_global_norm():
    out = _update([3.0], name="sgd", learning_rate=1.0, momentum=0.0, clip=1.0)
    moved = np.concatenate([np.ravel(1.0 - leaf) for leaf in out.values()])
    np.testing.assert_allclose(np.linalg.norm(moved), 1.0, rtol=1e-6)


def test_schedules_begin_and_end_where_they_should():
    for kind, middle in (("cosine", 0.5), ("poly", 0.5**0.9), ("constant", 1.0)):
        _, rate = optim.build(
            learning_rate=2.0, total_steps=110, schedule=kind, warmup_steps=10
        )
        np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)  # no update is lost
        np.testing.assert_allclose(rate(4), 1.0, rtol=1e-6)
        np.testing.assert_allclose(rate(10), 2.0, rtol=1e-6)
        np.testing.assert_allclose(rate(60), 2.0 * middle, rtol=1e-5)
    _, rate = optim.build(learning_rate=2.0, total_steps=100, schedule="cosine")
    np.testing.assert_allclose(rate(100), 0.0, atol=1e-7)


def test_freeze_takes_paths_and_names_what_there_is():
    frozen = optim.is_frozen(PARAMS, ("encoder/bias",))
    assert frozen == {"encoder": {"kernel": False, "bias": True}}
    with pytest.raises(InputError, match="encoder/kernel"):
        optim.is_frozen(PARAMS, ("enc",))


@pytest.mark.parametrize(
    "options", [{"name": "adan"}, {"schedule": "step"}, {"warmup_steps": 100}]
)
def test_wrong_values_are_refused(options):
    with pytest.raises(InputError, match="optim"):
        optim.build(total_steps=100, **options)
