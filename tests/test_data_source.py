"""unet_jax.data.source: what its layers make of labels that overlap."""

import numpy as np
import pytest

from unet_jax.data.border import Bordered
from unet_jax.data.source import (
    Cached,
    Checked,
    Labelled,
    Resized,
    Source,
    Standardised,
    Wrapper,
    overlapping,
)
from unet_jax.types import InputError


class Overlapping:
    """Two examples of noise with two labels each, of which a pixel may have both."""

    label_names = ("vessel", "tumour")
    overlapping = True

    def __init__(self, weighed: str = "", **change: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        self.examples = []
        for _ in range(2):
            example = {
                "image": rng.integers(0, 256, (8, 6, 3), np.uint8),
                "label": rng.integers(0, 2, (8, 6, 2), np.uint8),
            }
            shape = {"": None, "pixel": (8, 6), "label": (8, 6, 2)}[weighed]
            if shape:
                example["weight"] = rng.integers(0, 2, shape).astype(np.float32)
            self.examples.append(example | change)

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.examples[i]

    def name(self, i):
        return f"image-{i}.png"

    def size(self, i):
        return (8, 6)


class Classes(Overlapping):
    """The same with one class a pixel."""

    overlapping = False

    def __getitem__(self, i):
        return {**self.examples[i], "label": self.examples[i]["label"][..., 0]}


def checked(source: Source, **options) -> Checked:
    dtype = np.dtype(np.uint8)
    return Checked(source, channels=3, rank=2, dtype=dtype, **options)


def test_wrappers_pass_it_on():
    for kind in (Overlapping, Classes):
        source = kind()
        layers = [Wrapper(source), checked(source), Resized(source, (4, 4))]
        layers += [Standardised(source), Cached(source, 1), Wrapper(Wrapper(source))]
        layers += [Labelled(source, task="labels")]
        assert [overlapping(layer) for layer in layers] == [kind.overlapping] * 7


@pytest.mark.parametrize("weight", ["", "pixel", "label"])
def test_labels_are_as_they_were(weight):
    """Through all layers, and a weight a pixel counts for each of its labels."""
    source = Overlapping(weight)
    whole = Labelled(Cached(Standardised(checked(source)), 1), task="labels")
    assert whole.label_names == source.label_names
    for i in range(2):
        example, raw = whole[i], source[i]
        np.testing.assert_array_equal(example["label"], raw["label"])
        assert example["label"].dtype == np.uint8
        assert example["weight"].dtype == np.float32
        expected = raw.get("weight", np.ones((8, 6), np.float32))
        if expected.ndim == 2:
            expected = np.stack([expected, expected], axis=-1)
        np.testing.assert_array_equal(example["weight"], expected)


@pytest.mark.parametrize("weight", ["", "pixel", "label"])
@pytest.mark.parametrize("shape", [(16, 18), (4, 3)])
def test_resized_is_each_plane_resized(weight, shape):
    source = Overlapping(weight)
    example = Resized(source, shape)[1]
    for k in range(2):
        plane = {**source[1], "label": source[1]["label"][..., k]}
        if weight == "label":
            plane["weight"] = plane["weight"][..., k]
        alone = Classes()
        alone.examples = [plane | {"label": plane["label"][..., None]}] * 2
        expected = Resized(alone, shape)[1]
        np.testing.assert_array_equal(example["label"][..., k], expected["label"])
        if weight:
            got = example["weight"]
            got = got[..., k] if weight == "label" else got
            np.testing.assert_array_equal(got, expected["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label": np.zeros((8, 6), np.uint8)},
            "has no planes, but there are 2 labels",
        ),
        ({"label": np.zeros((8, 5, 2), np.uint8)}, "size 8 x 5, but the image"),
        ({"label": np.zeros((8, 6, 3), np.uint8)}, "has 3 planes, but there are 2"),
        ({"label": np.full((8, 6, 2), 2)}, "value 2, but a plane of a label holds"),
        ({"label": np.full((8, 6, 2), -1)}, "value -1, but a plane"),
        ({"label": np.zeros((8, 6, 2), np.float32)}, "holds float32 numbers"),
        ({"weight": np.zeros((8, 6, 1), np.float32)}, "size 8 x 6 x 1, but the lab"),
        (
            {"label": np.full((8, 6, 2), 9), "weight": np.zeros((8, 6), np.float32)},
            None,
        ),
    ],
)
def test_checked(change, message):
    source = checked(Overlapping(**change))
    if message is None:
        assert source[0]["label"].max() == 9
        return
    with pytest.raises(InputError, match=rf"of image-0\.png .*{message}"):
        source[0]


def test_what_needs_one_class_a_pixel():
    with pytest.raises(InputError, match=r"vessel, tumour \(the labels overlap\): use"):
        Labelled(Overlapping(), task="classes")
    with pytest.raises(InputError, match=r"overlap: leave data\.border\.w0 out"):
        Bordered(checked(Overlapping()), w0=10)
    Bordered(Overlapping(), w0=0)  # off, and then not used
