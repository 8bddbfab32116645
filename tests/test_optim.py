"""Optimizers: they compute what PyTorch documents; schedules hit their ends."""

import dataclasses
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from unet_jax import checkpoint, models, optim, training
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
    for pattern in ("enc", "", "encoder/*/kernel", "ernel", "encoder/bias/*"):
        says = f"{re.escape(repr(pattern))} matches no.*encoder/kernel"
        with pytest.raises(InputError, match=says):
            optim.is_frozen(PARAMS, ("encoder", pattern))


NET = models.UNet(num_classes=2, features=(2, 4, 8), norm="batch")


@pytest.fixture(scope="module")
def net():
    return jax.eval_shape(NET.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))[
        "params"
    ]


@pytest.mark.parametrize(
    ("pattern", "regex"),
    [
        ("encoder", r"encoder/.*"),
        ("/encoder/level1/", r"encoder/level1/.*"),
        ("encoder/level[01]/*/kernel", r"encoder/level[01]/[^/]*/kernel"),
        ("decoder/up*", r"decoder/up.*"),
        ("*/level?", r"[^/]*/level./.*"),
        ("**/norm*", r"(.*/)?norm.*"),
        ("**/bias", r"(.*/)?bias"),
        ("encoder/**/conv0", r"encoder/(.*/)?conv0/.*"),
        ("**/encoder", r"encoder/.*"),
        ("head/kernel", r"head/kernel"),
        ("**", r".*"),
    ],
)
def test_a_pattern_means_what_the_regular_expression_says(net, pattern, regex):
    frozen = jax.tree_util.tree_leaves_with_path(optim.is_frozen(net, (pattern,)))
    for path, found in frozen:
        name = "/".join(part.key for part in path)
        assert found == bool(re.fullmatch(regex, name)), name
    assert any(found for _, found in frozen)


def test_what_is_frozen_keeps_no_state_and_its_bits():
    tx, _ = optim.build(total_steps=9, clip=1.0, weight_decay=0.1, freeze=("**/bias",))
    state = tx.init(PARAMS)
    # The moments of the kernel alone; the numbers are two counts.
    assert sorted(x.size for x in jax.tree.leaves(state)) == [1, 1, 4, 4]
    out = _update([1.0, -2.0], freeze=("**/bias",), clip=1.0, weight_decay=0.1)
    assert (out["bias"] == 1.0).all() and (out["kernel"] != 1.0).all()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_lr_scale_multiplies_the_update_and_the_last_match_wins(name):
    options = {"name": name, "learning_rate": 0.01, "weight_decay": 0.1, "clip": 1.0}
    plain = 1.0 - _update([0.5], **options)["kernel"]
    scaled = (("**", 5.0), ("encoder/bias", 3), ("encoder/ker*", 0.5))
    one = _update([0.5], **options, lr_scale=scaled)
    np.testing.assert_allclose(1.0 - one["kernel"], 0.5 * plain, rtol=1e-4)
    same = _update([0.5], **options, lr_scale=dict(scaled))
    np.testing.assert_array_equal(one["bias"], same["bias"])
    bias = 1.0 - _update([0.5], **options)["bias"]
    np.testing.assert_allclose(1.0 - one["bias"], 3 * bias, rtol=1e-4)
    turned = _update([0.5], **options, lr_scale=scaled[::-1])
    np.testing.assert_allclose(1.0 - turned["bias"], 5 * bias, rtol=1e-4)


def test_lr_scale_and_decay_all_leave_the_state_as_it_is_and_freeze_wins():
    for name in optim.OPTIMIZERS:
        options = {"name": name, "weight_decay": 0.1, "clip": 1.0, "total_steps": 9}
        plain, _ = optim.build(**options)
        other, _ = optim.build(**options, decay_all=True, lr_scale={"encoder": 2.0})
        assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(
            other.init(PARAMS)
        )
    out = _update([1.0], freeze=("**/bias",), lr_scale={"**/bias": 2.0, "**": 0.5})
    assert (out["bias"] == 1.0).all() and (out["kernel"] != 1.0).all()


META = checkpoint.Meta(
    model={"name": "unet", **models.fields(NET)},
    task="classes",
    label_names=("a", "b"),
    normalisation={"kind": "range", "shift": (0.0,), "scale": (1.0,)},
    channels=1,
    rank=2,
)


def test_a_run_goes_on_with_other_factors_and_not_with_another_state(tmp_path):
    def state_of(**options):
        tx, _ = optim.build(total_steps=9, **options)
        return training.init_state(NET, tx, seed=0, image_shape=(1, 8, 8, 1))

    def changes(before, now):
        metas = [
            dataclasses.replace(META, config={"optim": options})
            for options in (before, now)
        ]
        return checkpoint.check_same_run(*metas, tmp_path)

    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(), META, score=0.0)
    now = {"lr_scale": (("head*", 10.0),), "decay_all": True}
    shapes = jax.eval_shape(lambda: state_of(**now))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(0, shapes).step) == 0
    assert len(changes({}, now)) == 2
    # rmsprop has a state of momentum only if it has momentum, sgd always.
    plain = {"name": "rmsprop"}
    with pytest.raises(InputError, match=r"optim\.momentum > 0"):
        changes(plain, {**plain, "momentum": 0.9})
    assert changes({**plain, "momentum": 0.5}, {**plain, "momentum": 0.9})
    assert changes({"name": "sgd", "momentum": 0.0}, {"name": "sgd"})
    with pytest.raises(InputError, match=r"optim\.freeze"):
        changes({"freeze": ("encoder",)}, {"freeze": ("encoder", "**/norm*")})


def _parsed(monkeypatch, *flags):
    argv = ["train.py", "--dry_run", *flags]
    monkeypatch.setattr(sys, "argv", argv)  # ml_collections looks there for overrides
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # how ml_collections loads a file
        return train.parse(argv).config["optim"]


def test_the_command_line_gives_patterns_and_factors(monkeypatch):
    options = _parsed(
        monkeypatch,
        "--config.optim.freeze=('head','**/norm*')",
        "--config.optim.lr_scale=(('encoder',0.1),('head*',10))",
        "--config.optim.betas=(0.8,0.9)",
        "--config.optim.decay_all=True",
    )
    assert options["freeze"] == ("head", "**/norm*")
    assert options["lr_scale"] == (("encoder", 0.1), ("head*", 10))
    assert (options["betas"], options["decay_all"]) == ((0.8, 0.9), True)
    optim.build(total_steps=100, **options)
    one = _parsed(monkeypatch, "--config.optim.lr_scale=(('encoder',0.1),)")
    assert one["lr_scale"] == (("encoder", 0.1),)
    plain = _parsed(monkeypatch, "--config.optim.freeze=encoder")
    assert plain["freeze"] == ("encoder",) and "lr_scale" not in plain


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((("enc", 0.1),), "lr_scale = 'enc' matches no parameter.*encoder/kernel"),
        ((("encoder", 0),), r"use optim\.freeze=\('encoder',\)"),
        ((("encoder", -1.0),), "positive"),
        ((("encoder", float("nan")),), "positive"),
        ((("encoder", float("inf")),), "positive"),
        (("encoder", 0.1), r"'encoder'.*\(\('encoder', 0\.1\),\)"),
        ((("encoder",),), "a pair"),
        (((0.1, "encoder"),), "a pair"),
        ({"encoder": 0.0}, "freeze"),
    ],
)
def test_factors_that_make_no_sense_are_refused(given, says):
    with pytest.raises(InputError, match=says):
        optim.build(total_steps=9, lr_scale=given)[0].init(PARAMS)


def test_the_default_momentum_is_the_papers_for_sgd_and_none_for_rmsprop():
    for name, momentum in (("sgd", 0.99), ("rmsprop", 0.0)):
        options = {"name": name, "learning_rate": 0.1}
        default = _update([1.0, 2.0], **options)["kernel"]
        np.testing.assert_array_equal(
            default, _update([1.0, 2.0], **options, momentum=momentum)["kernel"]
        )


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adan"},
        {"schedule": "step"},
        {"nesterov": True},
        {"name": "sgd", "momentum": 0.0, "nesterov": True},
        {"betas": (0.9,)},
    ],
)
def test_wrong_values_are_refused(options):
    with pytest.raises(InputError, match="optim"):
        optim.build(total_steps=100, **options)


def test_a_warmup_takes_at_most_half_of_a_short_run():
    options = {"learning_rate": 1.0, "total_steps": 10, "schedule": "cosine"}
    _, long = optim.build(**options, warmup_steps=20)
    _, half = optim.build(**options, warmup_steps=5)
    rates = [float(long(step)) for step in range(10)]
    assert rates == [float(half(step)) for step in range(10)]
    assert rates[4] == 1.0
