"""Augmentation: what moves together, what stays exact, what a key decides."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import augment
from unet_jax.types import InputError

SIZES = [(12, 12), (9, 14), (5, 6, 6)]
GEOMETRY = {
    "flip": {"flip": True},
    "quarter_turns": {"quarter_turns": True},
    "exact": {"flip": True, "quarter_turns": True},
    "rotate": {"rotate": 40.0},
    "scale": {"scale": 0.5},
    "shift": {"shift": 0.3},
    "all": {
        "flip": True,
        "quarter_turns": True,
        "rotate": 30.0,
        "scale": 0.3,
        "shift": 0.2,
        "rotate_3d": True,
    },
}
LIGHT = {"brightness": 0.2, "contrast": 0.3, "gamma": 0.4, "noise": 0.1}
MOVE_ALL = jax.jit(augment.build(**GEOMETRY["all"]))
EVERYTHING = {**GEOMETRY["all"], **LIGHT}


def ramps(size):
    """An image whose channels are the coordinates, and labels that number the pixels.

    Linear interpolation is exact on a ramp, so the image says where each output pixel
    was read, and the label must be that of the pixel nearest to that place.
    """
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    return {
        "image": jnp.asarray(grid, jnp.float32),
        "label": jnp.asarray(np.arange(np.prod(size)).reshape(size), jnp.int32),
        "weight": jnp.ones(size, jnp.float32),
    }


def blob(rng, size=(10, 10), channels=1, labels=0):
    shape = (*size, labels) if labels else size
    return {
        "image": jnp.asarray(rng.random((*size, channels)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 2, shape), jnp.int32),
        "weight": jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32),
    }


def check_together(before, after):
    """Label and weight of every output pixel belong to the place the image came from.

    The mirror outside the frame is exact on a ramp too, so all pixels are checked.
    """
    place = np.asarray(after["image"], np.float64)
    nearest = np.rint(place).astype(int)
    tie = (np.abs(np.abs(place - np.rint(place)) - 0.5) < 1e-4).any(-1)
    expected = np.asarray(before["label"])[tuple(np.moveaxis(nearest, -1, 0))]
    assert tie.mean() < 0.5
    np.testing.assert_array_equal(np.asarray(after["label"])[~tie], expected[~tie])


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, (9, 14)) for name in GEOMETRY]
    + [(name, size) for name in ("exact", "all") for size in SIZES[::2]],
)
def test_image_and_label_move_as_one(name, size):
    before = ramps(size)
    move = jax.jit(augment.build(**GEOMETRY[name]))
    moved = 0
    for seed in range(6):
        after = move(jax.random.key(seed), before)
        check_together(before, after)
        weight = np.asarray(after["weight"])
        assert set(np.unique(weight.round(4))) <= {0.0, 1.0}
        assert weight.mean() > 0.1
        moved += not np.array_equal(after["label"], before["label"])
    assert moved >= 2, "the check must not pass because nothing moves"


@pytest.mark.parametrize("size", [(1, 1), (7, 1), (2, 3), (1, 4, 2)])
def test_small_and_flat_sizes_move_as_one_and_keep_shape_and_type(size):
    before = ramps(size)
    move = jax.jit(augment.build(**GEOMETRY["all"]))
    for seed in range(10):
        after = move(jax.random.key(seed), before)
        for key, array in before.items():
            assert after[key].shape == array.shape
            assert after[key].dtype == array.dtype
        check_together(before, after)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_no_key_parts_image_and_label(seed):
    before = ramps((9, 14))
    check_together(before, MOVE_ALL(jax.random.key(seed), before))


@pytest.mark.parametrize("size", SIZES)
def test_an_image_equal_to_its_label_stays_equal_under_exact_moves(rng, size):
    label = rng.integers(0, 100, size).astype(np.int32)
    before = {
        "image": jnp.asarray(label[..., None], jnp.float32),
        "label": jnp.asarray(label),
        "weight": jnp.asarray(label, jnp.float32),
    }
    seen = set()
    move = jax.jit(augment.build(**GEOMETRY["exact"]))
    for seed in range(24):
        after = move(jax.random.key(seed), before)
        np.testing.assert_array_equal(after["image"][..., 0], after["label"])
        np.testing.assert_array_equal(after["weight"], after["label"])
        assert sorted(np.ravel(after["label"])) == sorted(label.ravel())
        seen.add(np.asarray(after["label"]).tobytes())
    assert len(seen) >= 4


def test_flip_and_quarter_turn_equal_numpy(rng):
    source = blob(rng, (6, 6), channels=2, labels=3)
    for turns in range(-1, 5):
        turned = augment.quarter_turn(source, turns=turns)
        for key in source:
            np.testing.assert_array_equal(turned[key], np.rot90(source[key], turns))
    flipped = augment.flip(source, flipped=(False, True))
    for key in source:
        np.testing.assert_array_equal(flipped[key], np.flip(source[key], 1))
    with pytest.raises(InputError, match="even number"):
        augment.quarter_turn(blob(rng, (4, 6)), turns=1)
    half = augment.quarter_turn(blob(rng, (4, 6)), turns=2)
    assert half["image"].shape == (4, 6, 1)


def test_flips_keep_to_their_axes(rng):
    source = {"image": rng.random((3, 4, 5, 1), np.float32)}
    source["label"] = np.arange(60, dtype=np.int32).reshape(3, 4, 5)
    source["weight"] = np.ones((3, 4, 5), np.float32)
    one = jax.jit(augment.build(flip=True, flip_axes=(1,)))
    seen = [one(jax.random.key(k), source)["label"] for k in range(20)]
    found = {np.asarray(label).tobytes() for label in seen}
    flipped = np.flip(source["label"], 1)
    assert found == {source["label"].tobytes(), flipped.tobytes()}
    with pytest.raises(InputError, match="flip_axes"):
        augment.build(flip=True, flip_axes=(3,))


def test_random_flips_and_turns_take_every_value_equally_often():
    source = ramps((2, 2))
    keys = jax.random.split(jax.random.key(0), 4000)
    flips = jax.vmap(lambda key: augment.random_flip(key, source)["label"])(keys)
    turns = jax.vmap(lambda key: augment.random_quarter_turn(key, source)["label"])
    for labels in (np.asarray(flips), np.asarray(turns(keys))):
        _, counts = np.unique(labels.reshape(4000, 4), axis=0, return_counts=True)
        assert len(counts) == 4
        assert (np.abs(counts - 1000) < 150).all()


def test_labels_with_channels_and_weights_with_channels_move(rng):
    """Each label channel moves like a single label of its own."""
    source = blob(rng, (9, 8), labels=3)
    move = MOVE_ALL
    key = jax.random.key(4)
    after = move(key, source)
    for k in range(3):
        single = {
            "image": source["image"],
            "label": source["label"][..., k],
            "weight": source["weight"][..., k],
        }
        alone = move(key, single)
        np.testing.assert_array_equal(after["label"][..., k], alone["label"])
        np.testing.assert_allclose(after["weight"][..., k], alone["weight"], atol=1e-6)


def test_vmap_equals_a_loop_and_keys_decide(rng):
    move = augment.build(**EVERYTHING)
    alone, together = jax.jit(move), jax.jit(jax.vmap(move))
    batch = [blob(rng, (10, 10)) for _ in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    keys = jax.random.split(jax.random.key(7), 4)
    after = together(keys, stacked)
    jax.tree.map(np.testing.assert_array_equal, after, together(keys, stacked))
    for i, source in enumerate(batch):
        expected = alone(keys[i], source)
        for key in ("image", "label", "weight"):
            np.testing.assert_allclose(after[key][i], expected[key], atol=2e-5)
    other = together(keys[::-1], stacked)
    assert not np.allclose(other["image"], after["image"], atol=0.05)


def test_jit_equals_eager(rng):
    move = augment.build(**EVERYTHING)
    source, key = blob(rng, (10, 10)), jax.random.key(5)
    eager, jitted = move(key, source), jax.jit(move)(key, source)
    for name, array in eager.items():
        np.testing.assert_allclose(jitted[name], array, atol=2e-5, err_msg=name)


def test_turning_one_on_does_not_change_another():
    """The flips drawn are the same with and without rotation or noise."""
    source = ramps((8, 8))
    flips = {"flip": True, "quarter_turns": True}
    few = jax.jit(augment.build(**flips))
    many = jax.jit(augment.build(**flips, rotate=1e-4, noise=1e-5))
    for seed in range(8):
        key = jax.random.key(seed)
        exact, more = few(key, source), many(key, source)
        np.testing.assert_array_equal(exact["label"], more["label"])


def test_probability_leaves_examples_exactly_as_they_are(rng):
    source = blob(rng, (16, 16))
    move = augment.build(rotate=30.0, scale=0.2, shift=0.1, probability=0.25)
    keys = jax.random.split(jax.random.key(0), 400)
    after = jax.jit(jax.vmap(move, (0, None)))(keys, source)
    same = (np.asarray(after["image"]) == np.asarray(source["image"])).all((1, 2, 3))
    assert 0.65 < same.mean() < 0.85
    assert (np.asarray(after["weight"])[same] == np.asarray(source["weight"])).all()
    assert augment.build(rotate=30.0, probability=0.0) is None


def test_amounts_stay_within_their_limits_and_reach_them():
    """Read from a ramp: the field's slope is the scale, its centre the shift."""
    source = ramps((21, 21))
    keys = jax.random.split(jax.random.key(3), 300)

    def run(**options):
        move = jax.jit(jax.vmap(augment.build(**options), (0, None)))
        return np.asarray(move(keys, source)["image"], np.float64)

    image = run(scale=0.5)
    zoom = 1 / (image[:, 11, 10, 0] - image[:, 10, 10, 0])
    assert 1 / 1.5 <= zoom.min() < 0.7
    assert 1.45 < zoom.max() <= 1.5 + 1e-4
    assert abs(np.log(zoom).mean()) < 0.05
    image = run(rotate=20.0)
    step = image[:, 10, 11] - image[:, 10, 10]
    degrees = np.degrees(np.arctan2(step[:, 0], step[:, 1]))
    assert -20.01 < degrees.min() < -19
    assert 19 < degrees.max() < 20.01
    image = run(shift=0.2)
    shift = 10 - image[:, 10, 10]
    assert np.abs(shift).max() < 0.2 * 21 + 1e-3
    assert (shift.max(0) > 3.9).all()
    assert (shift.min(0) < -3.9).all()
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.2


def test_photometric_operations_equal_their_formulas(rng):
    source = blob(rng, (7, 6), channels=3)
    image = np.asarray(source["image"], np.float64)
    mean, low, high = image.mean((0, 1)), image.min(), image.max()
    expected = {
        "brightness": image + 0.3,
        "contrast": (image - mean) * 1.5 + mean,
        "gamma": ((image - low) / (high - low)) ** 0.7 * (high - low) + low,
    }
    actual = {
        "brightness": augment.brightness(source, delta=0.3),
        "contrast": augment.contrast(source, factor=1.5),
        "gamma": augment.gamma(source, exponent=0.7),
    }
    for name, after in actual.items():
        np.testing.assert_allclose(after["image"], expected[name], atol=2e-6)
        assert after["label"] is source["label"]
        assert after["weight"] is source["weight"]
    flat = {**source, "image": jnp.full((7, 6, 3), 0.4)}
    np.testing.assert_allclose(augment.gamma(flat, exponent=2.0)["image"], 0.4)


def test_noise_is_gaussian_of_the_given_width():
    source = ramps((100, 100)) | {"image": jnp.zeros((100, 100, 2))}
    noisy = np.asarray(augment.noise(jax.random.key(0), source, sigma=0.2)["image"])
    assert noisy.std() == pytest.approx(0.2, rel=0.03)
    assert abs(noisy.mean()) < 0.01
    assert np.mean(np.abs(noisy) < 0.2) == pytest.approx(0.683, abs=0.02)
    assert abs(np.corrcoef(noisy[..., 0].ravel(), noisy[..., 1].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("name", LIGHT)
def test_random_light_is_within_its_limit_and_differs_by_key(rng, name):
    """Image values tell the amount drawn; label and weight are never touched."""
    source = blob(rng, (30, 30))
    image = np.asarray(source["image"], np.float64)
    keys = jax.random.split(jax.random.key(1), 200)
    after = jax.jit(jax.vmap(augment.build(**{name: 0.4}), (0, None)))(keys, source)
    np.testing.assert_array_equal(after["label"][3], source["label"])
    np.testing.assert_array_equal(after["weight"][3], source["weight"])
    out = np.asarray(after["image"], np.float64)
    low, high = image.min(), image.max()
    middle = np.unravel_index(np.abs(image - 0.3).argmin(), image.shape)

    def exponent():
        unit = (np.stack([image, *out])[:, *middle] - low) / (high - low)
        return np.log(unit[1:]) / np.log(unit[0])

    amount, bounds = {
        "brightness": (lambda: (out - image).mean((1, 2, 3)), (-0.4, 0.4)),
        "contrast": (lambda: out.std((1, 2, 3)) / image.std(), (1 / 1.4, 1.4)),
        "gamma": (exponent, (1 / 1.4, 1.4)),
        "noise": (lambda: (out - image).std((1, 2, 3)), (0.0, 0.4)),
    }[name]
    amount = amount()
    width = bounds[1] - bounds[0]
    margin = 0.03 if name == "noise" else 1e-4  # a sample's spread is an estimate
    assert bounds[0] - margin < amount.min() < bounds[0] + 0.1 * width
    assert bounds[1] - 0.1 * width < amount.max() < bounds[1] + margin


def test_everything_off_is_none_and_nonsense_is_refused():
    assert augment.build() is None
    for name in ("rotate", "scale", "shift", *LIGHT):
        with pytest.raises(InputError, match=f"augment.{name}"):
            augment.build(**{name: -0.1})
        with pytest.raises(InputError, match=f"augment.{name}"):
            augment.build(**{name: float("nan")})
    with pytest.raises(InputError, match="probability"):
        augment.build(rotate=1.0, probability=1.5)
    with pytest.raises(TypeError, match="rotatee"):
        augment.build(rotatee=1.0)


def test_every_random_operation_has_the_key_first_and_options_by_name():
    for name, function in inspect.getmembers(augment, inspect.isfunction):
        if not name.startswith("random_") or name.endswith("field"):
            continue
        first, second, *options = inspect.signature(function).parameters.values()
        assert (first.name, second.name) == ("key", "example"), name
        for option in options:
            assert option.kind in (option.KEYWORD_ONLY, option.VAR_KEYWORD), name
        assert function.__doc__, name


@pytest.mark.parametrize("method", ["cubic", "linear", "dense"])
@pytest.mark.parametrize("size", [(24, 20), (6, 12, 12)])
def test_a_void_label_is_never_learnt_however_the_image_is_bent(rng, method, size):
    """255 lies under weight 0; wherever weight is left, the label is another."""
    void = rng.uniform(size=size) < 0.3
    label = rng.integers(0, 4, size)
    source = {
        "image": rng.normal(size=(*size, 1)).astype(np.float32),
        "label": np.where(void, 255, label).astype(np.int32),
        "weight": np.where(void, 0, rng.uniform(1, 11, size)).astype(np.float32),
    }
    bend = augment.build(
        flip=True, quarter_turns=True, rotate=30.0, scale=0.2, elastic=2.0,
        elastic_method=method, elastic_sigma=4.0, interpolation="cubic",
    )  # fmt: skip
    moved = jax.vmap(bend, (0, None))(jax.random.split(jax.random.key(3), 8), source)
    counted = np.asarray(moved["weight"]) > 0
    assert 0.3 < counted.mean() < 0.8
    assert (np.asarray(moved["label"])[counted] < 4).all()
    assert moved["weight"].max() <= source["weight"].max() + 1e-4
    assert not np.allclose(moved["image"][0], moved["image"][1])


def test_displacements_have_the_deviation_that_was_asked_for():
    keys = jax.random.split(jax.random.key(0), 3000)
    for method, sigma in (("cubic", 0.0), ("linear", 0.0), ("dense", 3.0)):
        draw = functools.partial(
            augment.random_displacement_field, shape=(9, 13), elastic=(10.0, 2.0),
            method=method, sigma=sigma,
        )  # fmt: skip
        fields = np.asarray(jax.vmap(draw)(keys))
        nodes = fields[:, :, ::4, ::6]
        np.testing.assert_allclose(nodes[:, 0].std(0), 10, rtol=0.06)
        np.testing.assert_allclose(nodes[:, 1].std(0), 2, rtol=0.06)
        np.testing.assert_allclose(nodes.mean(0), 0, atol=0.7)


def test_no_displacement_is_the_affine_map_alone(rng):
    source = {
        "image": rng.normal(size=(16, 16, 1)).astype(np.float32),
        "label": rng.integers(0, 3, (16, 16)).astype(np.int32),
    }
    key = jax.random.key(5)
    options = {"flip": True, "quarter_turns": True, "rotate": 40.0, "noise": 0.1}
    plain = augment.build(**options)(key, source)
    # Deformation has a key of its own: what else is drawn does not change with it.
    bent = augment.build(**options, elastic=(0.0, 1e-30))(key, source)
    np.testing.assert_allclose(plain["image"], bent["image"], atol=1e-5)
    never = augment.build(elastic=5.0, probability=0.0)
    assert never is None


def test_elastic_deformation_of_other_axes_is_refused():
    source = {"image": np.zeros((8, 8, 1), np.float32), "label": np.zeros((8, 8), int)}
    with pytest.raises(InputError, match=r"augment.elastic=\(1, 2, 3\) has 3 numbers"):
        augment.build(elastic=(1, 2, 3))(jax.random.key(0), source)
    with pytest.raises(InputError, match="elastic_grid=1"):
        augment.build(elastic=1.0, elastic_grid=1)
    with pytest.raises(InputError, match="elastic_method = 'spline' is not known"):
        augment.build(elastic=1.0, elastic_method="spline")
    with pytest.raises(InputError, match="interpolation"):
        augment.build(interpolation="nearest")
    with pytest.raises(InputError, match="elastic"):
        augment.build(elastic=(1.0, -1.0))
