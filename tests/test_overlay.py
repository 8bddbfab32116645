"""The label on the image."""

import numpy as np
import pytest

from unet_jax import overlay
from unet_jax.pictures import class_colours
from unet_jax.types import InputError


@pytest.fixture
def image():
    pixels = np.full((9, 9, 1), 7, np.uint16)
    pixels[0, 0] = 1007  # stretched to black and white
    return pixels


@pytest.fixture
def label():
    ids = np.zeros((9, 9), np.uint8)
    ids[2:7, 2:7] = 1
    return ids


def test_classes_have_a_tint_and_an_outline(image, label):
    names = ("background", "cell")
    drawn = overlay.draw(image, label, task="classes", label_names=names)
    assert drawn.shape == (9, 9, 3)
    assert drawn.dtype == np.uint8
    assert drawn[0, 0].tolist() == [255] * 3
    assert drawn[8, 8].tolist() == [0] * 3
    colour = class_colours(names)[1]
    np.testing.assert_array_equal(drawn[2, 2], colour)
    np.testing.assert_allclose(drawn[4, 4], 0.35 * colour, atol=1)
    # Without a class of that name nothing is background.
    drawn = overlay.draw(image, label, task="classes", label_names=("wall", "cell"))
    assert drawn[8, 8].any()


def test_labels_lie_over_one_another(image, label):
    names = ("cell", "wall")
    both = np.stack([label, np.roll(label, 1, 0)], -1)
    drawn = overlay.draw(image, both, task="labels", label_names=names)
    colours = class_colours(names)
    np.testing.assert_array_equal(drawn[7, 3], colours[1])
    np.testing.assert_array_equal(drawn[2, 3], colours[0])
    one = overlay.draw(image, label, task="labels", label_names=("cell",))
    np.testing.assert_array_equal(one[2, 2], colours[0])


def test_an_even_image_a_row_a_colour_volume(image, label):
    names = ("background", "cell")
    row = overlay.draw(image[:1] * 0, label[:1], task="classes", label_names=names)
    assert row.shape == (1, 9, 3)
    assert row.max() == 0
    volume = np.repeat(image[None], 3, -1)
    drawn = overlay.draw(volume, label[None], task="classes", label_names=names)
    assert drawn.shape == (1, 9, 9, 3)


def test_written_as_png_or_pages(tmp_path):
    from PIL import Image

    overlay.write(tmp_path / "a.png", np.zeros((4, 5, 3), np.uint8))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (5, 4)
    overlay.write(tmp_path / "a.tif", np.zeros((2, 4, 5, 3), np.uint8))
    with Image.open(tmp_path / "a.tif") as picture:
        assert picture.n_frames == 2
    with pytest.raises(InputError, match="cannot be written"):
        overlay.write(tmp_path / "no" / "a.png", np.zeros((4, 5, 3), np.uint8))
