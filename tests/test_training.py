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


@pytest.mark.slow
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


# --- Deep supervision ----------------------------------------------------------------


def _from_the_middle(x, size, steps):
    """Every so many-th pixel of each axis, as much left over before as after."""
    for axis, (n, step) in enumerate(zip(size, steps, strict=True), start=1):
        spare = x.shape[axis] - 1 - (n - 1) * step
        x = x.take([spare // 2 + i * step for i in range(n)], axis)
    return x


@pytest.mark.parametrize(
    ("length", "size", "step", "expected"),
    [
        (8, 4, 2, [0, 2, 4, 6]),
        (8, 2, 4, [1, 5]),
        (8, 1, 8, [3]),
        (9, 4, 2, [1, 3, 5, 7]),
        (9, 3, 3, [1, 4, 7]),
        (5, 5, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_every_so_many_pixels_lie_in_the_middle(length, size, step, expected):
    x = jnp.arange(2 * length).reshape(1, 2, length, 1)
    out = training.every(x, (2, size), (1, step))
    np.testing.assert_array_equal(out[0, 0, :, 0], expected)
    np.testing.assert_array_equal(out[0, 1, :, 0], np.add(expected, length))


def _plain_loss(logits, label, weight):
    """A weighted mean that sees every number it is given."""
    values = (logits[..., 0] - 2.0 * logits[..., 1] - label.astype(logits.dtype)) ** 2
    return (weight * values).mean(tuple(range(1, weight.ndim)))


@pytest.mark.parametrize(
    ("size", "coarse", "shares"),
    [
        ((8, 12), [(4, 6), (2, 3)], (1, 1 / 2, 1 / 4)),
        ((8, 12), [(8, 6), (4, 3), (1, 3)], (1, 1 / 2, 1 / 4, 1 / 8)),
        ((9, 6), [(4, 3)], (1, 1 / 2)),
        ((4, 8, 6), [(4, 4, 3), (2, 2, 1)], (1, 1 / 2, 1 / 6)),
    ],
)
def test_coarser_heads_see_fewer_pixels_and_count_less(rng, size, coarse, shares):
    sizes = [size, *coarse]
    heads = [rng.standard_normal((2, *s, 2)) for s in sizes]
    label = rng.integers(0, 5, (2, *size))
    weight = rng.uniform(0.5, 2.0, (2, *size))
    expected = 0.0
    for head, s, share in zip(heads, sizes, shares, strict=True):
        steps = [round(n / m) for n, m in zip(size, s, strict=True)]
        given = (_from_the_middle(x, s, steps) for x in (label, weight))
        expected = expected + share * _plain_loss(head, *given)
    expected = expected / sum(shares)
    with jax.enable_x64(True):
        given = [jnp.asarray(head) for head in heads]
        loss = training.supervised_losses(
            _plain_loss,
            given[0],
            {"heads": tuple(given)},
            jnp.asarray(label),
            jnp.asarray(weight),
        )
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


@pytest.mark.parametrize("larger", [0, 2])
def test_heads_of_full_size_count_alike(rng, larger):
    # With valid padding the earlier heads are larger, and cut to the last one's size.
    size = (6, 5)
    heads = [
        rng.standard_normal((2, *(n + i * larger for n in size), 2)) for i in (2, 1, 0)
    ]
    label = rng.integers(0, 5, (2, *size))
    weight = rng.uniform(0.5, 2.0, (2, *size))
    cut = [
        head[:, i : i + size[0], i : i + size[1]]
        for head, i in zip(heads, (larger, larger // 2, 0), strict=True)
    ]
    expected = np.mean([_plain_loss(head, label, weight) for head in cut], axis=0)
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (*heads, label, weight)]
        aux = {"heads": tuple(given[:3])}
        loss = training.supervised_losses(_plain_loss, given[2], aux, *given[3:])
        alone = training.supervised_losses(_plain_loss, given[2], {}, *given[3:])
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    np.testing.assert_allclose(alone, _plain_loss(heads[2], label, weight), rtol=1e-12)


@pytest.mark.parametrize("decoder", ["unet", "unetpp"])
def test_every_head_of_a_supervised_net_learns(rng, decoder):
    model = models.UNet(
        num_classes=2,
        features=(2, 3, 2),
        norm="none",
        decoder=decoder,
        deep_supervision=True,
    )
    tx, _ = optim.build(total_steps=9, name="sgd", learning_rate=0.1)
    batch = _batch(rng)
    image = jnp.asarray(batch["image"], jnp.float32) / 255.0
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    params = jax.tree.map(  # faster than compiling `init`
        lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), leaf.dtype),
        shapes,
    )
    state = training.TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={},
        opt_state=tx.init(params),
        ema=None,
        lr_scale=jnp.ones((), jnp.float32),
        key=jax.random.key(0),
    )
    step = jax.jit(training.make_train_step(model, tx, _plain_loss, stats=STATS))
    new, stats = step(state, batch)
    names = {"unet": {"head0", "head1"}, "unetpp": {"head1", "head2"}}[decoder]
    assert {name for name in params if name.startswith("head")} == names
    for name in names:
        for key, old in params[name].items():
            assert jnp.any(new.params[name][key] != old), (name, key)
    chex.assert_tree_all_finite(new.params)
    _, aux = model.apply({"params": params}, image)
    first, second = (np.asarray(head, np.float64) for head in aux["heads"])
    label, weight = batch["label"], batch["weight"]
    if decoder == "unetpp":
        losses = _plain_loss(first, label, weight) + _plain_loss(second, label, weight)
        expected = losses / 2
    else:
        fewer = label[:, ::2, ::2], weight[:, ::2, ::2]
        losses = 2 * _plain_loss(first, label, weight) + _plain_loss(second, *fewer)
        expected = losses / 3
    np.testing.assert_allclose(stats["loss"], expected.sum(), rtol=1e-5)
