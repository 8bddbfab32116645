"""The training step: its algebra, its randomness, its state."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import losses, models, optim, sharding, training

STATS = {"kind": "range", "shift": (0.0,), "scale": (1 / 255,)}
LOSS = losses.build(task="classes", cross_entropy=1.0, dice=1.0)


def _batch(rng, rows=4, size=8, rank=2):
    image = rng.integers(0, 256, (rows, *(size,) * rank, 1)).astype(np.uint8)
    label = (image[..., 0] > 128).astype(np.uint8)
    return {
        "image": image,
        "label": label,
        "weight": np.ones(label.shape, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


def _setup(norm="none", dropout=0.0, ema=0.0, features=(4, 8), rank=2, **options):
    model = models.UNet(num_classes=2, features=features, norm=norm, dropout=dropout)
    names = ("name", "learning_rate", "momentum", "freeze", "weight_decay", "clip")
    chosen = {k: options.pop(k) for k in names if k in options}
    tx, _ = optim.build(total_steps=100, **chosen)
    step = training.make_train_step(
        model, tx, LOSS, stats=STATS, ema_decay=ema, **options
    )
    shape = (1, *(8,) * rank, 1)
    state = training.init_state(model, tx, seed=0, image_shape=shape, ema=ema > 0)
    return state, step


@pytest.mark.parametrize("rank", [2, 3])
def test_a_step_is_finite_traces_once_and_learns_one_batch(rng, rank):
    chex.clear_trace_counter()
    state, step = _setup("batch", rank=rank, learning_rate=1e-2)
    step = jax.jit(chex.assert_max_traces(step, n=1))
    batch = _batch(rng, rank=rank)
    seen = []
    for _ in range(40):
        state, stats = step(state, batch)
        seen.append(float(stats["loss"] / stats["count"]))
    chex.assert_tree_all_finite(state.params)
    assert int(state.step) == 40
    assert seen[-1] < 0.35 * seen[0]


def test_jit_equals_eager(rng):
    # Plain descent: Adam's first step is the sign of the gradient, which rounding
    # decides where the gradient is zero.
    state, step = _setup("batch", dropout=0.3, name="sgd", learning_rate=0.1)
    batch = jax.tree.map(jnp.asarray, _batch(rng))
    eager, _ = step(state, batch)
    jitted, _ = jax.jit(step)(state, batch)
    chex.assert_trees_all_close(eager.params, jitted.params, atol=1e-6)
    chex.assert_trees_all_close(eager.batch_stats, jitted.batch_stats, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_batch(rng, accumulate):
    batch = _batch(rng)
    batch["weight"][3] = 0.0  # one example that counts nowhere
    state, whole = _setup(name="sgd", learning_rate=0.1)
    _, parts = _setup(name="sgd", learning_rate=0.1, accumulate=accumulate)
    a, stats_a = jax.jit(whole)(state, batch)
    b, stats_b = jax.jit(parts)(state, batch)
    assert float(stats_a["count"]) == float(stats_b["count"]) == 3.0
    chex.assert_trees_all_close(a.params, b.params, atol=1e-6)


def test_a_row_of_weight_zero_changes_nothing(rng):
    state, step = _setup(name="sgd", learning_rate=0.1)
    batch = _batch(rng)
    less = {k: v[:3] for k, v in batch.items()}
    batch["weight"][3] = 0.0
    batch["label"][3] = 255
    a, _ = jax.jit(step)(state, batch)
    b, _ = jax.jit(step)(state, less)
    chex.assert_trees_all_close(a.params, b.params, atol=1e-6)


def test_two_devices_equal_one(rng):
    state, step = _setup("batch", name="sgd", learning_rate=0.1)
    batch = _batch(rng)
    one, stats_one = jax.jit(step)(state, batch)
    mesh = sharding.make_mesh(2)
    state = jax.device_put(state, sharding.replicated(mesh))
    two, stats_two = jax.jit(step)(state, sharding.place(batch, mesh))
    np.testing.assert_allclose(stats_one["loss"], stats_two["loss"], rtol=1e-5)
    chex.assert_trees_all_close(one.params, jax.device_get(two.params), atol=1e-5)
    stats = jax.device_get(two.batch_stats)
    chex.assert_trees_all_close(one.batch_stats, stats, atol=1e-5)


def test_augmentation_depends_on_seed_step_and_index_only(rng):
    model = models.UNet(num_classes=2, features=(2, 2), norm="none")
    tx, _ = optim.build(total_steps=9, name="sgd", learning_rate=0.1)

    def noise(key, example):
        image = example["image"]
        return {**example, "image": image + jax.random.normal(key, image.shape)}

    def shift(state, batch):
        step = training.make_train_step(model, tx, LOSS, noise, stats=STATS)
        return step(state, batch)[1]["loss"]

    state = training.init_state(model, tx, seed=0, image_shape=(1, 8, 8, 1))
    batch = _batch(rng)
    swapped = {k: v[::-1].copy() for k, v in batch.items()}
    a, b = (jax.jit(shift)(state, x) for x in (batch, swapped))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    other = {**batch, "index": batch["index"] + 1}
    assert float(jax.jit(shift)(state, other)) != float(a)
    later = state.replace(step=state.step + 1)
    assert float(jax.jit(shift)(later, batch)) != float(a)


def test_the_average_follows_the_parameters(rng):
    state, step = _setup("batch", ema=0.9, name="sgd", learning_rate=0.1)
    new, _ = jax.jit(step)(state, _batch(rng))
    # At step 0 the decay is (1 + 0) / (10 + 0).
    expected = jax.tree.map(lambda a, b: 0.1 * a + 0.9 * b, state.params, new.params)
    chex.assert_trees_all_close(new.ema["params"], expected, atol=1e-6)
    assert new.variables["params"] is new.ema["params"]
    moved = jax.tree.leaves(new.ema["batch_stats"])[0]
    assert jnp.any(moved != jax.tree.leaves(state.batch_stats)[0])


def test_frozen_parameters_stay_and_the_rest_moves(rng):
    state, step = _setup("batch", freeze=("encoder",), weight_decay=0.1)
    new, _ = jax.jit(step)(state, _batch(rng))
    chex.assert_trees_all_equal(new.params["encoder"], state.params["encoder"])
    for a, b in zip(
        jax.tree.leaves(new.params["head"]),
        jax.tree.leaves(state.params["head"]),
        strict=True,
    ):
        assert jnp.any(a != b)


def test_the_plateau_scale_scales_the_update(rng):
    state, step = _setup(name="sgd", learning_rate=0.1)
    batch = _batch(rng)
    whole, _ = jax.jit(step)(state, batch)
    half, _ = jax.jit(step)(state.replace(lr_scale=jnp.float32(0.5)), batch)
    moved = jax.tree.map(jnp.subtract, whole.params, state.params)
    halved = jax.tree.map(jnp.subtract, half.params, state.params)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: 0.5 * x, moved), halved, atol=1e-7
    )


def test_a_valid_net_is_trained_on_the_centre(rng):
    model = models.UNet(num_classes=2, features=(2, 2), norm="none", padding="valid")
    tx, _ = optim.build(total_steps=9, name="sgd", learning_rate=0.1)
    step = jax.jit(training.make_train_step(model, tx, LOSS, stats=STATS))
    state = training.init_state(model, tx, seed=0, image_shape=(1, 20, 20, 1))
    batch = _batch(rng, size=20)
    ring = {**batch, "weight": np.zeros_like(batch["weight"])}
    ring["weight"][:, 8:12, 8:12] = 1.0
    ring["label"] = np.where(ring["weight"] > 0, batch["label"], 7).astype(np.uint8)
    a, b = step(state, batch), step(state, ring)
    chex.assert_trees_all_close(a[0].params, b[0].params, atol=1e-6)


def test_is_due_is_true_at_multiples_and_at_the_end():
    assert [s for s in range(1, 11) if training.is_due(s, 4, 10)] == [4, 8, 10]
    assert [s for s in range(1, 11) if training.is_due(s, 0, 10)] == [10]
