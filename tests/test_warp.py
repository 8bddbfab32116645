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


def keys_weights(part):
    """Cubic convolution by its definition (Keys 1981, eq. 15), a = -1/2."""

    def kernel(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    return [kernel(part - tap) for tap in range(-1, 3)]


@pytest.mark.parametrize("size", [(2,), (9, 7), (4, 5, 6), (1, 7)])
@pytest.mark.parametrize("method", ["cubic", "linear"])
def test_a_coarse_grid_gives_its_nodes_and_straight_lines(rng, size, method):
    """A displacement that is linear in the place stays linear, at the edges as well."""
    rank, nodes = len(size), (3, 4, 2)[: len(size)]
    slope, start = rng.normal(size=(rank, rank)), rng.normal(size=rank)

    def plane(axes):
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        return np.einsum("ij,j...->i...", slope, grid) + start.reshape(
            -1, *[1] * rank
        )  # fmt: skip

    vectors = plane([np.linspace(0, 1, n) for n in nodes]).astype(np.float32)
    got = warp.grid_displacement(jnp.asarray(vectors), size, method=method)
    want = plane([np.linspace(0, 1, n) for n in size])
    np.testing.assert_allclose(got, want, atol=2e-6)
    on_nodes = tuple(1 + 6 * (n - 1) for n in nodes)
    vectors = rng.normal(size=(rank, *nodes)).astype(np.float32)
    got = warp.grid_displacement(jnp.asarray(vectors), on_nodes, method=method)
    every = (slice(None), *[slice(None, None, 6)] * rank)
    np.testing.assert_allclose(got[every], vectors, atol=1e-6)


@pytest.mark.parametrize("method", ["cubic", "linear"])
def test_between_the_nodes_equals_the_definition(rng, method):
    """One pixel at a time in float64, with a straight continuation at the edges."""
    vectors = rng.normal(size=(2, 3, 4))
    size = (11, 8)
    got = warp.grid_displacement(
        jnp.asarray(vectors.astype(np.float32)), size, method=method
    )
    longer = np.pad(vectors, [(0, 0), (1, 1), (1, 1)], "reflect", reflect_type="odd")
    for y in range(size[0]):
        for x in range(size[1]):
            places = [y * 2 / 10, x * 3 / 7]
            want = np.zeros(2)
            taps = []
            for place, nodes in zip(places, (3, 4), strict=True):
                low = min(int(place), nodes - 2)
                part = place - low
                shares = keys_weights(part)
                if method == "linear":
                    shares = [0, 1 - part, part, 0]
                taps.append([(low + i, share) for i, share in enumerate(shares)])
            for i, a in taps[0]:
                for j, b in taps[1]:
                    want += a * b * longer[:, i, j]
            np.testing.assert_allclose(got[:, y, x], want, atol=2e-6)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 40.0])
def test_smoothed_noise_keeps_its_deviation(rng, sigma):
    noise = rng.normal(size=(2, 12, 20)).astype(np.float32)
    got = warp.smooth_displacement(jnp.asarray(noise), sigma=sigma)
    # scipy's weights add up to 1; ours have squares that do.
    filtered = noise.astype(np.float64)
    for axis, size in ((1, 12), (2, 20)):
        away = np.arange(-size, size + 1)
        kernel = np.exp(-0.5 * (away / sigma) ** 2)
        square = scipy.ndimage.convolve1d(np.ones(size), kernel**2, mode="constant")
        filtered = scipy.ndimage.convolve1d(filtered, kernel, axis, mode="constant")
        shape = [1, 1, 1]
        shape[axis] = size
        filtered /= np.sqrt(square).reshape(shape)
    np.testing.assert_allclose(got, filtered, atol=1e-5)
    many = jax.vmap(lambda k: jax.random.normal(k, (1, 6, 9)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    fields = jax.vmap(lambda n: warp.smooth_displacement(n, sigma=sigma))(many)
    np.testing.assert_allclose(np.std(fields, axis=0), 1.0, atol=0.06)


@pytest.mark.parametrize("size", [(24, 24), (8, 10, 10)])
def test_the_composed_field_equals_the_sequential_composition(rng, size):
    """Flip, turn, rotate, scale, shift, deform: one field, to 1e-4 of a pixel.

    Sequentially: the picture of every pixel's own coordinates goes through the exact
    flip and quarter turn and through two interpolations, which are exact for it.
    """
    rank = len(size)
    angles = rng.uniform(-0.3, 0.3, 1 if rank == 2 else 3).astype(np.float32)
    zoom, shift = np.float32(1.3), rng.uniform(-1, 1, rank).astype(np.float32)
    flipped = np.array([True, False, True][:rank])
    vectors = rng.normal(size=(rank, *[3] * rank)).astype(np.float32)
    bent = warp.grid_displacement(jnp.asarray(vectors), size)
    field = affine_field(size, angles=angles, zoom=zoom, shift=shift, displacement=bent)
    field = warp.quarter_turn_field(field, turns=3)
    field = warp.flip_field(field, flipped=flipped)

    places = np.moveaxis(np.asarray(warp.coordinates(size)), 0, -1)
    source = {"image": jnp.asarray(places), "label": np.ones(size, np.int32)}
    moved = augment.flip(source, flipped=flipped)
    moved = augment.quarter_turn(moved, turns=3)
    only = affine_field(size, angles=angles, zoom=zoom, shift=shift)
    moved = resample(moved, only)
    # Outside the frame the picture is mirrored, and twice mirrored is not once: a
    # channel of ones and zeros follows what was read inside.
    ends = np.asarray(size).reshape(-1, *[1] * rank) - 1

    def inside(field):
        return ((np.asarray(field) >= 0) & (np.asarray(field) <= ends)).all(0)

    frame = jnp.asarray(inside(only)[..., None], jnp.float32)
    moved["image"] = jnp.concatenate([moved["image"], frame], axis=-1)
    last = warp.coordinates(size) + bent
    moved = resample(moved, last)
    image, frame = np.split(np.asarray(moved["image"]), [rank], axis=-1)
    counted = inside(last) & (frame[..., 0] == 1)
    assert counted.mean() > 0.25
    got = np.moveaxis(np.asarray(field), 0, -1)[counted]
    np.testing.assert_allclose(got, image[counted], atol=1e-4)


@pytest.mark.parametrize("size", [(6, 9), (2, 5), (4, 3, 5)])
def test_cubic_interpolation_equals_the_definition(rng, size):
    source = example(rng, size)
    scale = np.asarray(size).reshape((-1, *[1] * len(size)))
    field = rng.uniform(-0.5, 1.5, (len(size), *size)) * (scale - 1)
    field = field.astype(np.float32)
    moved = jax.jit(warp.resample, static_argnames="interpolation")(
        source, jnp.asarray(field), interpolation="cubic"
    )
    widths = [(40, 40)] * len(size) + [(0, 0)]
    mirrored = np.pad(source["image"].astype(np.float64), widths, "reflect")
    for place in np.ndindex(*size):
        want, taps = np.zeros(2), [()]
        for at in field[(slice(None), *place)].astype(np.float64):
            low = int(np.floor(at))
            shares = keys_weights(at - low)
            taps = [(*t, (low - 1 + i, s)) for t in taps for i, s in enumerate(shares)]
        for tap in taps:
            where = tuple(i + 40 for i, _ in tap)
            want += np.prod([s for _, s in tap]) * mirrored[where]
        np.testing.assert_allclose(moved["image"][place], want, atol=3e-5)
    plain = resample(source, jnp.asarray(field))
    np.testing.assert_array_equal(moved["label"], plain["label"])
    np.testing.assert_array_equal(moved["weight"], plain["weight"])
    still = warp.resample(source, warp.coordinates(size), interpolation="cubic")
    assert_same(still, source)
