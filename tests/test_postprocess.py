"""Components, holes and objects, against loops over pixels and against geometry."""

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import postprocess
from unet_jax.postprocess import (
    fill_holes,
    flood,
    instances,
    largest_component,
    remove_small,
)
from unet_jax.predict import Prediction
from unet_jax.types import InputError


def around(place, shape):
    """The neighbours of a pixel across faces."""
    for axis, step in itertools.product(range(len(shape)), (-1, 1)):
        other = list(place)
        other[axis] += step
        if 0 <= other[axis] < shape[axis]:
            yield tuple(other)


def components(mask):
    """Sets of pixels, in the order of the first of each."""
    left = [tuple(place) for place in np.argwhere(mask)]
    found = []
    while left:
        part, front = {left[0]}, [left[0]]
        while front:
            for other in around(front.pop(), mask.shape):
                if mask[other] and other not in part:
                    part.add(other)
                    front.append(other)
        found.append(part)
        left = [place for place in left if place not in part]
    return found


labels = st.tuples(
    st.lists(st.integers(1, 7), min_size=2, max_size=3), st.integers(0, 10_000)
)


def random_label(drawn, classes=3, empty=0.5):
    shape, seed = drawn
    rng = np.random.default_rng(seed)
    label = rng.integers(1, classes, shape).astype(np.uint8)
    return np.where(rng.random(shape) < empty, 0, label).astype(np.uint8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(drawn=labels, size=st.integers(0, 6))
def test_largest_and_small_components_by_loops(drawn, size):
    label = random_label(drawn)
    largest, large = np.zeros_like(label), np.zeros_like(label)
    for value in (1, 2):
        parts = components(label == value)
        for place in max(parts, key=len, default=()):  # the first of equal ones
            largest[place] = value
        for place in itertools.chain(*(part for part in parts if len(part) >= size)):
            large[place] = value
    for found, expected in (
        (largest_component(label), largest),
        (remove_small(label, size), large),
    ):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == label.dtype


@settings(max_examples=80, deadline=None, derandomize=True)
@given(drawn=labels)
def test_holes_of_one_class_by_loops(drawn):
    """Background from which no path over background leads to the border."""
    label = random_label(drawn, classes=2, empty=0.35)
    expected = label.copy()
    for part in components(label == 0):
        ends = (
            place[axis] in (0, label.shape[axis] - 1)
            for place in part
            for axis in range(label.ndim)
        )
        if not any(ends):
            for place in part:
                expected[place] = 1
    np.testing.assert_array_equal(fill_holes(label), expected)


def art(text):
    return np.array([[int(c) for c in line] for line in text.split()], np.uint8)


def test_a_hole_becomes_the_innermost_class_around_it():
    label = art("""
        2222222222
        2111122222
        2100120330
        2103120330
        2111122030
        2222222222
    """)
    filled = art("""
        2222222222
        2111122222
        2111122330
        2113122330
        2111122030
        2222222222
    """)
    # The hole around the 3 is 1, in whose ring it lies, though 2 has a ring around it,
    # too. What touches the border, or lies between 2 and 3, is none.
    filled[2:5, 6] = label[2:5, 6]
    filled[4, 7] = 0
    np.testing.assert_array_equal(fill_holes(label), filled)
    np.testing.assert_array_equal(fill_holes(filled), filled)
    # A nucleus with background around it in a cell stays what it is.
    cell = art("11111 10001 10201 10001 11111")
    np.testing.assert_array_equal(
        fill_holes(cell), art("11111 11111 11211 11111 11111")
    )


def test_another_background():
    label = art("1110 1011 1111")
    np.testing.assert_array_equal(
        largest_component(label, background=1), art("1110 1111 1111")
    )
    np.testing.assert_array_equal(remove_small(label, 2, background=1), np.ones((3, 4)))
    np.testing.assert_array_equal(fill_holes(label, background=1), label)


def test_probabilities_are_no_label():
    with pytest.raises(InputError, match="float64 has no classes"):
        fill_holes(np.zeros((3, 3)))


# --- Objects -------------------------------------------------------------------------


def disc(centre, radius, shape):
    places = np.indices(shape)
    offsets = ((place - c) ** 2 for place, c in zip(places, centre, strict=True))
    return sum(offsets) <= radius**2


@pytest.mark.parametrize("shape", [(30, 40), (12, 20, 30)])
def test_components_are_numbered_in_their_order(shape, rng):
    mask = rng.random(shape) < 0.2
    found = instances(mask, min_size=2)
    parts = [part for part in components(mask) if len(part) > 1]
    expected = np.zeros(shape, np.int32)
    for number, part in enumerate(parts, start=1):
        for place in part:
            expected[place] = number
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32
    soft = np.where(mask, 0.6, 0.4)
    np.testing.assert_array_equal(instances(soft, min_size=2), expected)
    assert not instances(soft, threshold=0.7).any()


def touching(shape, radius=7, apart=12):
    """Two balls that touch, and which is nearer to each pixel."""
    middle = [n // 2 for n in shape]
    first, second = list(middle), list(middle)
    first[-1] -= apart // 2
    second[-1] += apart // 2
    mask = disc(first, radius, shape) | disc(second, radius, shape)
    side = np.indices(shape)[-1] - middle[-1]
    return mask, side


@pytest.mark.parametrize("shape", [(25, 41), (21, 21, 41)])
def test_touching_objects_are_parted_in_the_middle(shape):
    mask, side = touching(shape)
    assert instances(mask).max() == 1
    # A net that is sure inside and less so between: 1 at the centres, 0.55 between.
    soft = np.where(mask, 0.95 - 0.4 * np.exp(-(side**2) / 4), 0.1)
    for found in (
        instances(soft, method="watershed"),
        instances(mask, method="distance"),
        instances(soft, method="distance"),
    ):
        assert found.max() == 2
        np.testing.assert_array_equal(found > 0, mask)
        # Only the pixels of the middle itself may go either way.
        assert set(found[mask & (side < 0)]) == {1}
        assert set(found[mask & (side > 0)]) == {2}
    assert instances(mask, method="watershed").max() == 1  # sure between them, too


def test_form_alone_leaves_round_and_long_objects_whole(rng):
    shape = (70, 70)
    for radius in np.arange(1, 25, 0.9):
        mask = disc(rng.uniform(30, 40, 2), radius, shape)
        assert instances(mask, method="distance").max() == 1
    y, x = np.indices(shape) - 35.0
    for angle in np.arange(0, 3, 0.2):
        turned = np.cos(angle) * y + np.sin(angle) * x
        across = np.cos(angle) * x - np.sin(angle) * y
        assert instances((turned / 30) ** 2 + (across / 9) ** 2 < 1,
                         method="distance").max() == 1  # fmt: skip
    assert instances(np.ones((5, 6), bool), method="distance").max() == 1
    assert instances(np.zeros((5, 6), bool), method="distance").max() == 0


@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_necks_are_parted_by_how_narrow_they_are(ratio):
    """A dumb-bell of squares: its neck against the narrower of the two ends."""
    for half in range(1, 10):  # a bar of 2 half - 1 between ends of 19 and 27
        mask = np.zeros((40, 100), bool)
        mask[5:24, 5:24], mask[1:28, 60:87] = True, True
        mask[15 - half : 14 + half, 20:70] = True
        count = instances(mask, method="distance", seed_threshold=ratio).max()
        assert count == (1 if half >= ratio * 10 else 2)


def test_objects_without_a_seed_are_kept():
    soft = np.zeros((5, 12))
    soft[1:4, 1:4], soft[1:4, 6:11] = 0.7, 0.7
    soft[2, 7], soft[2, 9] = 0.9, 0.95
    found = instances(soft, method="watershed")
    assert found.max() == 3
    np.testing.assert_array_equal(found > 0, soft > 0.5)
    np.testing.assert_array_equal(found[2, 6:11], [2, 2, found[2, 8], 3, 3])


def by_queue(height, seeds, mask):
    """Pixels joined one by one, each time over the edge whose lower end is highest."""
    order = sorted(
        map(tuple, np.argwhere(mask)),
        key=lambda p: (seeds[p] == 0, -height[p], nearest(p, seeds)),
    )
    rank = {place: i for i, place in enumerate(order)}
    out = np.where(mask, seeds, 0)

    def edges(place):
        for other in around(place, mask.shape):
            if mask[other]:
                pair = rank[place], rank[other]
                yield max(pair), min(pair), place, other

    queue = [edge for p in map(tuple, np.argwhere(out)) for edge in edges(p)]
    heapq.heapify(queue)
    while queue:
        _, _, place, other = heapq.heappop(queue)
        if not out[other]:
            out[other] = out[place]
            for edge in edges(other):
                heapq.heappush(queue, edge)
    return out


def nearest(place, seeds):
    return min(np.linalg.norm(np.subtract(place, s)) for s in np.argwhere(seeds))


@pytest.mark.parametrize("shape", [(9, 11), (1, 15), (4, 5, 4)])
@pytest.mark.parametrize("levels", [4, 1000])
def test_flooding_by_a_queue(shape, levels):
    for number in range(8):
        rng = np.random.default_rng(number)
        height = rng.integers(0, levels, shape) / levels
        mask = rng.random(shape) < 0.85
        seeds = np.where(mask & (rng.random(shape) < 0.06), 1, 0)
        seeds = seeds * rng.integers(1, 9, shape)  # some of them of one number
        if not seeds.any():
            continue
        found = flood(height, seeds, mask)
        np.testing.assert_array_equal(found, by_queue(height, seeds, mask))
        np.testing.assert_array_equal(found[seeds > 0], seeds[seeds > 0])
        assert not found[~mask].any()
        reached = {p for part in components(mask) if any(seeds[p] for p in part)
                   for p in part}  # fmt: skip
        assert reached == set(map(tuple, np.argwhere(found)))


def test_a_flat_foreground_is_shared_by_distance():
    """Of two seeds in a strip of one height, each takes the half that is nearer."""
    seeds = np.zeros((5, 31), int)
    seeds[2, 3], seeds[2, 23] = 1, 2
    found = flood(np.ones((5, 31)), seeds, np.ones((5, 31), bool))
    assert (found[:, :12] == 1).all() and (found[:, 15:] == 2).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "graph"}, "components, distance, watershed"),
        ({"threshold": 0}, "threshold = 0"),
        ({"method": "watershed", "seed_threshold": 0.4}, "seed_threshold = 0.4"),
        ({"method": "distance", "seed_threshold": 1}, "seed_threshold = 1"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(InputError, match=words):
        instances(np.zeros((3, 3)), **options)


def test_ids_as_files_hold_them():
    assert postprocess.as_ids(np.array([0, 65535])).dtype == np.uint16
    assert postprocess.as_ids(np.array([0, 65536])).dtype == np.uint32
    assert postprocess.as_ids(np.zeros(0, int)).dtype == np.uint16


# --- For a run -----------------------------------------------------------------------


def test_steps_follow_each_other_as_written():
    label = art("1110000 1010110 1110000 0000000")
    prediction = Prediction(label, None)
    run = {"task": "classes", "label_names": ("background", "cell")}
    done = postprocess.build(**run, steps="fill, largest")(prediction)
    np.testing.assert_array_equal(done, art("1110000 1110000 1110000 0000000"))
    done = postprocess.build(**run, steps="small=3")(prediction)
    np.testing.assert_array_equal(done, art("1110000 1010000 1110000 0000000"))
    np.testing.assert_array_equal(postprocess.build(**run)(prediction), label)
    for text, words in (
        ("open", "'open' is not known: use one of fill, largest, small"),
        ("small", "small=30"),
        ("small=x", "small=30"),
        ("fill=3", "'fill=3' is not understood"),
    ):
        with pytest.raises(InputError, match=words):
            postprocess.build(**run, steps=text)
    with pytest.raises(InputError, match="'graph' is not known"):
        postprocess.build(**run, instances="graph")


def test_objects_of_classes_and_of_labels():
    label = art("1102200 1102200 0001100")
    hot = (label[..., None] == np.arange(3)).astype(np.float32)
    prediction = Prediction(label, hot)
    names = ("background", "a", "b")
    build = postprocess.build
    for method in ("components", "watershed"):
        post = build(task="classes", label_names=names, instances=method)
        # Of the first class, then of the second, which another class parts.
        np.testing.assert_array_equal(post(prediction), art("1103300 1103300 0002200"))
    # Another class is the background.
    post = build(task="classes", label_names=names[::-1], instances="components")
    assert set(post(prediction)[label == 2]) == {0}
    assert post(prediction).max() == 4
    # Labels have planes of their own.
    planes = np.stack([label > 0, label == 2], axis=-1).astype(np.uint8)
    post = build(
        task="labels", label_names=("a", "b"), steps="small=3", instances="watershed"
    )
    found = post(Prediction(planes, planes.astype(np.float32)))
    np.testing.assert_array_equal(found[..., 0], art("1102200 1102200 0002200"))
    np.testing.assert_array_equal(found[..., 1], art("0001100 0001100 0000000"))
    single = build(task="labels", label_names=("a",), instances="components")
    assert single(Prediction(planes[..., 0], None)).shape == label.shape
    with pytest.raises(InputError, match="probabilities = True"):
        post(Prediction(planes, None))


def test_objects_grow_by_the_probability_of_their_own_class():
    label = np.ones((1, 7), np.uint8)
    own = np.array([[0.9, 0.7, 0.6, 0.55, 0.65, 0.7, 0.9]], np.float32)
    prediction = Prediction(label, np.stack([1 - own, own], axis=-1))
    post = postprocess.build(
        task="classes", label_names=("background", "a"), instances="watershed"
    )
    assert post(prediction).tolist() in (
        [[1, 1, 1, 2, 2, 2, 2]],
        [[1, 1, 1, 1, 2, 2, 2]],
    )
    post = postprocess.build(
        task="labels", label_names=("a",), instances="watershed", min_size=4
    )
    assert post(Prediction(label, own[..., None])).max() == 1
