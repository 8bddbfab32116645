"""unet_jax.inspection.values: what masks mean, from histograms in closed form."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax.inspection import values
from unet_jax.inspection.values import Histogram, kind_of


def grey(pixels: dict[int, int], **more) -> Histogram:
    """Ten masks that all have all of these values."""
    return Histogram(pixels, dict.fromkeys(pixels, 10), 10, **more)


def colours(pixels: dict[tuple[int, int, int], int], **more) -> Histogram:
    packed = {r << 16 | g << 8 | b: n for (r, g, b), n in pixels.items()}
    return grey(packed, coloured=True, **more)


def jpeg() -> dict[int, int]:
    """Black and white with the greys around them that JPEG leaves."""
    near = dict.fromkeys((*range(1, 12), *range(244, 255)), 20)
    return {0: 5000, 255: 4000, **near, 100: 5, 130: 5}


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_binary(white):
    kind = kind_of(grey({0: 90, white: 10}))
    assert (kind.name, kind.options) == (f"binary 0/{white}", {})
    assert kind.label_names == ("background", "foreground")
    assert not kind.problem and not kind.guess


def test_binary_of_another_white_is_said():
    assert kind_of(grey({0: 90, 128: 10})).options == {"mask": "binary"}


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(2, 31))
def test_dense_ids_are_classes(largest):
    kind = kind_of(grey(dict.fromkeys(range(largest + 1), 10)))
    assert (kind.name, kind.options) == ("index", {})
    assert len(kind.label_names) == largest + 1
    assert kind.label_names[0] == "background"


def test_ids_with_gaps():
    kind = kind_of(grey({0: 50, 3: 10, 7: 10}))
    assert kind.options == {"mask": "index"}
    assert len(kind.label_names) == 8 and "1, 2, 4, 5, 6" in kind.guess
    assert "begin at 1" in kind_of(grey({1: 50, 2: 10})).guess
    assert kind_of(grey({0: 5, 1: 5, 2: 5}, palette=True)).name == "palette (index)"


@pytest.mark.parametrize(
    ("share", "thin", "ignored"),
    [(0.05, 0.0, True), (0.5, 0.9, True), (0.5, 0.1, False)],
)
def test_255_beside_small_ids(share, thin, ignored):
    rest = int(1000 * (1 - share))
    kind = kind_of(
        grey({0: rest // 2, 1: rest // 2, 255: int(1000 * share)}, thin=thin)
    )
    assert (kind.options.get("ignore") == 255) == ignored
    if ignored:
        assert kind.label_names == ("background", "class_1")
        assert "taken for" in kind.guess
    else:
        assert kind.name == "greys as classes"


def test_instances():
    many = dict.fromkeys(range(200), 5)
    assert kind_of(grey(many, consecutive=0.9)).options == {"mask": "instances"}
    assert kind_of(grey(many, pieces=1.05)).options == {"mask": "instances"}
    assert kind_of(grey(many, pieces=40.0)).name == "unclear"
    # Few numbers: only masks that count to different ends tell objects from classes.
    few = Histogram(
        dict.fromkeys(range(9), 10), {i: 10 - i for i in range(9)}, 10, consecutive=1.0,
        pieces=1.0,
    )  # fmt: skip
    assert kind_of(few).name == "instances"
    assert "index" in kind_of(few).guess
    same = dataclasses.replace(few, files=dict.fromkeys(range(9), 10))
    assert kind_of(same).name == "index"
    assert kind_of(dataclasses.replace(few, pieces=3.0)).name == "index"


def test_jpeg_and_soft_edges_are_cut_in_the_middle():
    for lossy in (True, False):  # a JPEG saved as PNG afterwards keeps its values
        kind = kind_of(grey(jpeg(), lossy=lossy))
        assert kind.name == "black and white, damaged by JPEG"
        assert kind.options == {"mask": "binary"}
        assert "two clusters" in kind.why and "cut at 128" in kind.guess
    soft = {0: 5000, 255: 4000, **dict.fromkeys(range(1, 255), 1)}
    kind = kind_of(grey(soft))
    assert kind.name == "black and white, soft"
    assert kind.options == {"mask": "binary"}
    wide = {0: 5000, 65535: 4000, **{v * 257: 1 for v in range(1, 255)}}
    assert kind_of(grey(wide, white=65535)).options == {"mask": "binary"}


def test_greys_that_are_classes():
    kind = kind_of(grey({0: 50, 128: 20, 255: 30}))
    assert kind.options["mask"] == "colors"
    assert kind.options["colors"] == ((0, 0, 0), (128, 128, 128), (255, 255, 255))
    assert kind.label_names == ("background", "#808080", "#ffffff")


def test_a_picture_is_unclear():
    kind = kind_of(grey(dict.fromkeys(range(256), 10)))
    assert kind.name == "unclear" and kind.problem and not kind.options
    assert kind_of(grey({-1: 3, 0: 5})).problem


@pytest.mark.parametrize("value", [0, 255])
def test_one_value_is_a_problem(value):
    assert f"is {value}" in kind_of(grey({value: 10})).problem


def test_nothing():
    assert kind_of(grey({})).problem


def test_colours():
    kind = kind_of(colours({(255, 0, 0): 10, (0, 0, 0): 80, (0, 255, 0): 10}))
    assert kind.options["colors"] == ((0, 0, 0), (0, 255, 0), (255, 0, 0))
    assert kind.label_names == ("background", "#00ff00", "#ff0000")


def test_damaged_colours_name_the_clean_ones():
    rng = np.random.default_rng(0)
    clean = [(0, 0, 0), (200, 40, 40), (40, 40, 200)]
    pixels = dict.fromkeys(clean, 1000)
    for colour in clean:
        for noise in rng.integers(0, 20, (100, 3)):
            pixels.setdefault(tuple(int(v) for v in np.add(colour, noise)), 2)
    histogram = colours(pixels, lossy=True)
    assert values.clean_palette(histogram) == tuple(sorted(clean))
    kind = kind_of(histogram)
    assert kind.name == "damaged colours" and "(200, 40, 40)" in kind.problem
    rainbow = {
        (int(r), int(g), int(b)): 1 for r, g, b in rng.integers(0, 256, (9999, 3))
    }
    assert kind_of(colours(rainbow)).name == "unclear"


def test_shares_add_up():
    assert values.shares(grey({3: 1, 0: 3})) == {0: 0.75, 3: 0.25}
