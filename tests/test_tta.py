"""Views are a group of index moves; rotations give back what is smooth."""

import itertools
import math

import numpy as np
import pytest

from unet_jax import tta
from unet_jax.types import InputError

GROUPS = [
    ("none", 2, 1),
    ("none", 3, 1),
    ("flips", 2, 4),
    ("flips", 3, 8),
    ("symmetries", 2, 8),
    ("symmetries", 3, 16),
]


@pytest.mark.parametrize(("kind", "rank", "count"), GROUPS)
def test_the_views_form_a_group(kind, rank, count, rng):
    views = tta.views(kind, rank)
    image = rng.normal(size=(*range(4, 4 + rank), 2))
    np.testing.assert_array_equal(views[0].apply(image), image)
    seen = {(v.apply(image).shape, v.apply(image).tobytes()) for v in views}
    assert len(views) == len(seen) == count  # all different
    for one, other in itertools.product(views, repeat=2):
        both = other.apply(one.apply(image))
        assert (both.shape, both.tobytes()) in seen
    for view in views:
        moved = view.apply(image)
        np.testing.assert_array_equal(view.inverse.apply(moved), image)
        np.testing.assert_array_equal(view.apply(view.inverse.apply(image)), image)
        assert view.inverse in views
        batch = view.apply(image[None], axis=1)
        np.testing.assert_array_equal(batch[0], moved)
        assert np.shares_memory(moved, image)  # nothing is copied


def test_the_symmetries_are_the_quarter_turns_and_their_mirror_images(rng):
    image = rng.normal(size=(3, 5))
    turns = [np.rot90(x, k) for x in (image, image.T) for k in range(4)]
    made = [view.apply(image) for view in tta.views("symmetries", 2)]
    for turned in turns:
        assert sum(np.array_equal(turned, x) for x in made) == 1


def test_depth_and_plane_are_never_exchanged(rng):
    volume = rng.normal(size=(2, 4, 5))
    for view in tta.views("symmetries", 3):
        assert view.apply(volume).shape[0] == 2


def test_an_unknown_kind_is_named():
    with pytest.raises(InputError, match="flips, none, rotations, symmetries"):
        tta.views("all", 2)


# --- Rotations -----------------------------------------------------------------------


def test_seven_equal_parts_of_a_turn():
    assert tta.views("rotations", 2) == tta.views("none", 2)
    assert len(tta.ANGLES) == 7
    np.testing.assert_allclose(np.degrees(tta.ANGLES), np.arange(7) * 360 / 7)


@pytest.mark.parametrize("size", [(9, 9), (5, 5), (3, 9, 9)])
def test_a_quarter_turn_is_rot90_with_its_mirror_image_around_it(size, rng):
    image = rng.integers(0, 256, (*size, 2)).astype(np.uint8)
    turned = tta.turn(image, math.pi / 2)
    assert turned.dtype == np.uint8
    assert turned.shape == (*tta.frame(size), 2)
    margin, odd = divmod(turned.shape[-2] - size[-1], 2)
    assert margin and not odd  # else pixels would lie between pixels
    around = [(0, 0)] * (len(size) - 2) + [(margin, margin)] * 2 + [(0, 0)]
    plane = np.rot90(image, axes=(len(size) - 2, len(size) - 1))
    np.testing.assert_array_equal(turned, np.pad(plane, around, mode="reflect"))


@pytest.mark.parametrize("size", [(21, 33), (40, 1), (1, 1), (2, 16, 9)])
def test_none_of_the_image_is_lost(size, rng):
    """Each pixel of the image lies inside the turned frame, whatever the angle."""
    height, width = size[-2:]
    side = tta.frame(size)[-1]
    for angle in tta.ANGLES:
        for corner in itertools.product((-1, 1), repeat=2):
            y, x = (np.array([height, width]) - 1) / 2 * corner
            turned = math.cos(angle) * y - math.sin(angle) * x
            assert abs(turned) <= (side - 1) / 2
        image = rng.uniform(size=(*size, 3)).astype(np.float32)
        back = tta.turn_back(tta.turn(image, angle), angle, size)
        assert back.shape == image.shape and back.dtype == np.float32
        assert image.min() - 1e-6 <= back.min() and back.max() <= image.max() + 1e-6


@pytest.mark.parametrize("angle", tta.ANGLES[1:])
def test_what_is_linear_comes_back(angle):
    """Linear interpolation keeps a plane, but where the mirror image has its fold."""
    y, x = np.mgrid[:31, :24].astype(np.float32)
    image = np.stack([0.3 * y - 0.7 * x, 1 + 0 * y], axis=-1)
    back = tta.turn_back(tta.turn(image, angle), angle, (31, 24))
    np.testing.assert_allclose(back[2:-2, 2:-2], image[2:-2, 2:-2], atol=1e-4)
    np.testing.assert_allclose(back[..., 1], 1, atol=1e-6)
    # A volume turns plane by plane.
    volume = np.stack([image, 2 * image, -image])
    found = tta.turn_back(tta.turn(volume, angle), angle, (3, 31, 24))
    np.testing.assert_allclose(found, np.stack([back, 2 * back, -back]), atol=1e-4)


def test_probabilities_still_add_up_to_one(rng):
    angle = tta.ANGLES[2]
    logits = rng.normal(size=(*tta.frame((20, 13)), 5))
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    back = tta.turn_back(probability.astype(np.float32), angle, (20, 13))
    np.testing.assert_allclose(back.sum(-1), 1, rtol=1e-5)
