"""Resampling against scipy in float64 and against exact array operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import augment, warp

SIZES = [(9, 7), (4, 5, 6)]

resample = jax.jit(warp.resample)
affine_field = jax.jit(warp.affine_field, static_argnums=0)


def example(rng, size, channels=2, labels=0):
    """Random image, label and positive weight as NumPy arrays."""
    shape = (*size, labels) if labels else size
    return {
        "image": rng.normal(size=(*size, channels)).astype(np.float32),
        "label": rng.integers(0, 2 if labels else 5, shape).astype(np.int32),
        "weight": rng.uniform(0.5, 2, shape).astype(np.float32),
    }


def assert_same(actual, expected, atol=0.0):
    for key in expected:
        got, want = np.asarray(actual[key]), np.asarray(expected[key])
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=key)


@pytest.mark.parametrize("size", [*SIZES, (1, 7), (1, 1), (5, 1, 3)])
def test_the_identity_gives_everything_back_exactly(rng, size):
    source = example(rng, size, labels=3)
    field = warp.coordinates(size)
    np.testing.assert_array_equal(field, affine_field(size))
    zero = jnp.zeros(1 if len(size) == 2 else 3)
    still = affine_field(
        size, angles=zero, zoom=jnp.float32(1), shift=jnp.zeros(len(size))
    )
    np.testing.assert_array_equal(field, still)
    assert_same(resample(source, field), source)
    if size == (9, 7):
        assert_same(warp.resample(source, field), source)


@pytest.mark.parametrize("size", SIZES)
def test_resample_equals_scipy_in_float64(rng, size):
    """A field far outside the frame: mirrored image, nearest label, weight 0."""
    source = example(rng, size)
    scale = np.asarray(size).reshape((-1, *[1] * len(size)))
    field = rng.uniform(-0.6, 1.6, (len(size), *size)) * (scale - 1)
    field = field.astype(np.float32)
    moved = resample(source, jnp.asarray(field))

    def read(array, order):
        return scipy.ndimage.map_coordinates(
            array.astype(np.float64), field.astype(np.float64), order=order,
            mode="mirror",
        )  # fmt: skip

    for channel in range(2):
        np.testing.assert_allclose(
            moved["image"][..., channel],
            read(source["image"][..., channel], 1),
            atol=2e-5,
        )
    np.testing.assert_array_equal(moved["label"], read(source["label"], 0))
    inside = ((field >= -0.5) & (field <= scale - 0.5)).all(0)
    assert 0.05 < inside.mean() < 0.9
    np.testing.assert_allclose(
        moved["weight"], np.where(inside, read(source["weight"], 1), 0), atol=2e-5
    )


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(-9, 9), columns=st.integers(-9, 9))
def test_whole_shifts_equal_a_mirrored_pad(rows, columns):
    source = example(np.random.default_rng(1), (6, 7))
    field = affine_field((6, 7), shift=(rows, columns))
    moved = resample(source, field)

    def cut(array, mode):
        pads = [(9, 9), (9, 9)] + [(0, 0)] * (array.ndim - 2)
        padded = np.pad(array, pads, mode=mode)
        return padded[9 - rows : 15 - rows, 9 - columns : 16 - columns]

    expected = {key: cut(source[key], "reflect") for key in ("image", "label")}
    expected["weight"] = cut(source["weight"], "constant")
    assert_same(moved, expected)


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (4, 5, 5)])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_through_the_field_equal_rot90(rng, size, turns):
    source = example(rng, size, labels=2)
    field = affine_field(size, angles=(turns * np.pi / 2,))
    axes = (len(size) - 2, len(size) - 1)
    expected = {k: np.rot90(v, turns, axes) for k, v in source.items()}
    assert_same(resample(source, field), expected, atol=1e-5)


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_each_plane_of_a_volume_turns(rng, plane):
    source = example(rng, (5, 5, 5))
    angles = [np.pi / 2 if i == plane else 0.0 for i in range(3)]
    axes = [(1, 2), (0, 2), (0, 1)][plane]
    expected = {k: np.rot90(v, 1, axes) for k, v in source.items()}
    field = affine_field((5, 5, 5), angles=angles)
    assert_same(resample(source, field), expected, atol=1e-5)


def test_several_angles_apply_one_after_the_other(rng):
    """Right angles in every plane equal rot90 in the order that is documented."""
    source = example(rng, (5, 5, 5))
    field = affine_field((5, 5, 5), angles=[np.pi / 2] * 3)
    expected = source
    for axes in [(1, 2), (0, 2), (0, 1)]:
        expected = {k: np.rot90(v, 1, axes) for k, v in expected.items()}
    assert_same(resample(source, field), expected, atol=2e-5)


def test_a_larger_zoom_makes_things_larger_and_keeps_the_centre():
    image = np.zeros((21, 21, 1), np.float32)
    image[8:13, 8:13] = 1
    source = {"image": image, "label": image[..., 0].astype(np.int32)}
    moved = resample(source, affine_field((21, 21), zoom=3.0))
    assert moved["label"].sum() == 15 * 15
    assert moved["image"][10, 10, 0] == 1
    assert (np.asarray(moved["weight"]) == 1).all()  # absent means one everywhere


def test_positive_shifts_move_towards_higher_indices_after_the_rotation():
    image = np.zeros((9, 9, 1), np.float32)
    image[2, 4] = 1  # two above the centre
    source = {"image": image, "label": image[..., 0].astype(np.int32)}
    field = affine_field((9, 9), angles=(np.pi / 2,), shift=(1, 3))
    moved = resample(source, field)
    # Up turns to the left, then one down and three right.
    inside = np.asarray(moved["weight"]) > 0
    assert np.argwhere(np.asarray(moved["label"]) * inside).tolist() == [[5, 5]]


@settings(max_examples=25, deadline=None)
@given(angle=st.floats(-3, 3), zoom=st.floats(0.5, 2), seed=st.integers(0, 99))
def test_a_void_label_is_never_learnt(angle, zoom, seed):
    rng = np.random.default_rng(seed)
    source = example(rng, (9, 8))
    void = rng.random((9, 8)) < 0.3
    source["label"] = np.where(void, 255, source["label"])
    source["weight"] = np.where(void, 0, source["weight"]).astype(np.float32)
    field = affine_field((9, 8), angles=(angle,), zoom=zoom)
    moved = resample(source, field)
    learnt = np.asarray(moved["weight"]) > 0
    assert learnt.any()
    assert (np.asarray(moved["label"])[learnt] != 255).all()


@pytest.mark.parametrize("size", [(8, 8), (4, 5, 5)])
def test_fields_of_flips_and_turns_equal_the_exact_operations(rng, size):
    """resample(flip(turned...)) by pixels and by coordinates, on a crooked field."""
    source = example(rng, size)
    field = affine_field(size, angles=(0.4,), zoom=1.2, shift=[0.83] * len(size))
    for turns in range(4):
        exact = resample(augment.quarter_turn(source, turns=turns), field)
        both = resample(source, warp.quarter_turn_field(field, turns=turns))
        assert_same(both, {k: np.asarray(v) for k, v in exact.items()}, atol=2e-5)
    for bits in np.ndindex(*[2] * len(size)):
        flipped = np.asarray(bits, bool)
        exact = resample(augment.flip(source, flipped=flipped), field)
        both = resample(source, warp.flip_field(field, flipped=flipped))
        assert_same(both, {k: np.asarray(v) for k, v in exact.items()}, atol=2e-5)
