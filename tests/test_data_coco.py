"""unet_jax.data.coco, coco_json and polygons: outlines, runs, and what is refused."""

import copy
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from PIL import Image

from unet_jax import data
from unet_jax.data import coco, folder, polygons
from unet_jax.types import InputError

H, W = 20, 30


def whole(patch: polygons.Patch, shape: tuple = (H, W)) -> np.ndarray:
    """A patch in its image."""
    answer = np.zeros(shape, bool)
    answer[patch.rows, patch.columns] = patch.inside
    return answer


def filled(points: np.ndarray, shape: tuple = (H, W)) -> np.ndarray:
    return whole(polygons.fill(np.asarray(points, np.float64), shape), shape)


def runs_of(mask: np.ndarray) -> list[int]:
    """The counts of a mask: where it changes, down the columns."""
    flat = np.r_[False, mask.T.ravel()]
    edges = np.flatnonzero(np.diff(flat))
    return np.diff([0, *edges, mask.size]).tolist()


def packed(counts: list[int]) -> str:
    """The text of counts, as pycocotools writes it."""
    text = ""
    for i, count in enumerate(counts):
        x = count - (counts[i - 2] if i > 2 else 0)
        more = True
        while more:
            bits = x & 0x1F
            x >>= 5
            more = x != -1 if bits & 0x10 else x != 0
            text += chr((bits | (0x20 if more else 0)) + 48)
    return text


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


# ---- polygons


def test_rectangle_covers_its_pixels():
    expected = np.zeros((H, W), bool)
    expected[3:7, 5:15] = True
    corners = np.reshape(rectangle(5, 3, 10, 4), (-1, 2))
    np.testing.assert_array_equal(filled(corners), expected)
    # Centres decide: half a pixel less on every side holds the same ones.
    for shift in ((0.49, -0.49), (0.5, 0.5)):
        np.testing.assert_array_equal(filled(corners + np.asarray(shift)), expected)
    np.testing.assert_array_equal(filled(corners[::-1]), expected)
    assert filled(corners + np.asarray((0, 100))).sum() == 0
    # What is outside of the image is cut off.
    out = filled(corners + np.asarray((20, 15)))
    assert out.sum() == out[18:, 25:].sum() == 2 * 5


def test_fill_against_points_in_polygons(rng):
    y, x = np.mgrid[:H, :W] + 0.5
    centres = np.stack([x.ravel(), y.ravel()], -1)
    for _ in range(60):
        n = int(rng.integers(3, 15))
        angle = np.sort(rng.uniform(0, 2 * math.pi, n))
        radius = rng.uniform(1, 20, n)
        middle = rng.uniform((0, 0), (W, H))
        star = middle + (radius * [np.cos(angle), np.sin(angle)]).T
        inside = Outline(np.r_[star, star[:1]], closed=True).contains_points(centres)
        np.testing.assert_array_equal(filled(star), inside.reshape(H, W))
        # Edges that cross each other: the number of them to the left is odd.
        wild = rng.uniform((-5, -5), (W + 5, H + 5), (n, 2))
        (x0, y0), (x1, y1) = wild.T[..., None], np.roll(wild, -1, 0).T[..., None]
        px, py = centres.T
        spans = (y0 <= py) != (y1 <= py)
        left = x0 + (py - y0) * (x1 - x0) / (y1 - y0) <= px
        odd = (spans & left).sum(0) % 2 == 1
        np.testing.assert_array_equal(filled(wild), odd.reshape(H, W))


def test_neighbours_share_no_pixel_and_leave_none_out(rng):
    # Corners on pixel centres too, which belong to one side only.
    xs = np.sort(rng.integers(0, 2 * W, 12)) / 2
    line = np.stack([xs, rng.integers(0, 2 * H, 12) / 2], -1)
    left, right = (line[0, 0], line[-1, 0])
    upper = np.r_[line, [[right, 0], [left, 0]]]
    lower = np.r_[line[::-1], [[left, H], [right, H]]]
    both = filled(upper).astype(int) + filled(lower)
    band = filled([[left, 0], [right, 0], [right, H], [left, H]])
    np.testing.assert_array_equal(both, band)


def test_fill_is_bounded(monkeypatch):
    monkeypatch.setattr(polygons, "MOST_CROSSINGS", 100)
    zigzag = np.asarray([(i % W, H * (i % 2)) for i in range(12)], np.float64)
    with pytest.raises(InputError, match="crosses 240 rows"):
        polygons.fill(zigzag, (H, W), "a.json: annotations[0]")


def test_union():
    a = polygons.fill(np.reshape(rectangle(1, 1, 4, 4), (-1, 2)), (H, W))
    b = polygons.fill(np.reshape(rectangle(3, 3, 9, 9), (-1, 2)), (H, W))
    none = polygons.fill(np.full((3, 2), 0.2), (H, W))
    np.testing.assert_array_equal(
        whole(polygons.union([a, none, b])), whole(a) | whole(b)
    )
    assert polygons.union([none, none]).inside.size == 0


# ---- runs


def test_runs(rng):
    for density in (0, 0.03, 0.5, 1):
        mask = rng.random((H, W)) < density
        counts = runs_of(mask)
        for form in (counts, packed(counts)):
            read, shape = polygons.read_runs({"size": [H, W], "counts": form}, "x")
            assert shape == (H, W) and read.tolist() == counts
        np.testing.assert_array_equal(whole(polygons.from_runs(read, (H, W))), mask)
    # Runs of no length, as some programs write them.
    counts = np.asarray([40, 5, 0, 7, 3, 0, 20, 5, 0, 0, H * W - 80])
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    np.testing.assert_array_equal(
        whole(polygons.from_runs(counts, (H, W))), flat.reshape(W, H).T
    )


def test_packed_runs_of_pycocotools():
    mask = np.zeros((H, W), bool)
    mask[3:9, 4:20], mask[12:15, 10] = True, True
    text = "c26>00000000000EM536000000000000000U6"
    read, _ = polygons.read_runs({"size": [H, W], "counts": text}, "x")
    np.testing.assert_array_equal(whole(polygons.from_runs(read, (H, W))), mask)
    assert packed(runs_of(mask)) == text


# ---- the source


def content() -> dict:
    """Three images: of two classes and a crowd, of nothing, of an L in two parts."""
    l_shape = [rectangle(2, 2, 3, 12), rectangle(2, 11, 10, 3)]
    crowd = np.zeros((H, W), bool)
    crowd[0:10, 0:10] = True
    rows = [
        {"image_id": 7, "category_id": 5, "segmentation": [rectangle(8, 8, 12, 10)]},
        {"image_id": 3, "category_id": 2, "segmentation": l_shape, "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "segmentation": [rectangle(10, 10, 4, 4)]},
        {
            "image_id": 7,
            "category_id": 2,
            "iscrowd": 1,
            "segmentation": {"size": [H, W], "counts": runs_of(crowd)},
        },
    ]
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "height": H, "width": W},
            {"id": 3, "file_name": "c.png", "height": H, "width": W},
            {"id": 1, "file_name": "a.png"},
        ],
        "annotations": [{"id": i, **row} for i, row in enumerate(rows)],
        "categories": [{"id": 5, "name": "cell"}, {"id": 2, "name": "nucleus"}],
    }


def write(root: Path, what: dict | None = None, path: str = "train.json") -> None:
    """The JSON, and its images in root/images."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(content() if what is None else what))
    (root / "images").mkdir(exist_ok=True)
    for k, name in enumerate("abc"):
        array = np.full((H, W, 3), 50 * k + 20, np.uint8)
        Image.fromarray(array).save(root / "images" / f"{name}.png")


def test_classes(tmp_path):
    write(tmp_path)
    source = coco.open(root=tmp_path, split="train")
    assert source.label_names == ("background", "nucleus", "cell")
    assert [source.name(i) for i in range(3)] == [f"images/{n}.png" for n in "abc"]
    assert source.size(1) == (H, W) and not source.overlapping
    assert source[0]["label"].max() == 0 and "weight" not in source[0]
    # The nucleus lies on the larger cell, whichever comes first.
    numbers = np.zeros((H, W), np.int32)
    numbers[8:18, 8:20] = 1
    numbers[10:14, 10:14] = 2
    np.testing.assert_array_equal(source.instances(1), numbers)
    example = source[1]
    assert example["image"].shape == (H, W, 3) and example["image"][0, 0, 0] == 70
    np.testing.assert_array_equal(example["label"], np.asarray([0, 2, 1])[numbers])
    weight = np.ones((H, W), np.float32)
    weight[:10, :10] = numbers[:10, :10] > 0
    np.testing.assert_array_equal(example["weight"], weight)
    assert 0 < weight.sum() < H * W
    l_shape = np.zeros((H, W), np.uint8)
    l_shape[2:14, 2:5] = l_shape[11:14, 2:12] = 1
    np.testing.assert_array_equal(source[2]["label"], l_shape)


def test_of_equal_objects_the_later_is_on_top(tmp_path):
    what = content()
    what["annotations"] = [
        {"image_id": 1, "category_id": c, "segmentation": [rectangle(x, 2, 6, 6)]}
        for c, x in ((2, 2), (5, 4))
    ]
    write(tmp_path, what)
    label = coco.open(root=tmp_path, split="train")[0]["label"]
    assert label[3].tolist() == [0, 0, 1, 1, *[2] * 6, *[0] * 20]


def test_overlap(tmp_path):
    write(tmp_path)
    source = coco.open(root=tmp_path, split="train", overlap=True)
    assert source.overlapping and source.label_names == ("nucleus", "cell")
    label, weight = source[1]["label"], source[1]["weight"]
    assert label.shape == weight.shape == (H, W, 2) and label.dtype == np.uint8
    cell = np.zeros((H, W), np.uint8)
    cell[8:18, 8:20] = 1
    np.testing.assert_array_equal(label[..., 1], cell)
    np.testing.assert_array_equal(
        label[..., 0].nonzero(), np.pad(np.ones((4, 4)), ((10, 6), (10, 16))).nonzero()
    )
    # The crowd is of nuclei: cells count there as anywhere.
    assert weight[..., 1].min() == 1 and weight[..., 0].sum() == H * W - 100


def test_chosen_categories(tmp_path):
    write(tmp_path)
    source = coco.open(root=tmp_path, split="train", label_names=("cell",), channels=1)
    assert source.label_names == ("background", "cell")
    assert source[1]["image"].shape == (H, W, 1)
    assert source[1]["label"].sum() == 120 and "weight" not in source[1]
    both = coco.open(root=tmp_path, split="train", label_names=("cell", "nucleus"))
    assert both[1]["label"][9, 9] == 1 and both[1]["label"][11, 11] == 2
    with pytest.raises(InputError, match=r"'leaf' .*choose from cell, nucleus"):
        coco.open(root=tmp_path, split="train", label_names=("leaf",))


def test_build(tmp_path):
    write(tmp_path)
    parts = {"train": "train[:2]", "evaluation": "train[2:]", "root": str(tmp_path)}
    found = data.build(source="coco", task="classes", **parts)
    assert found.label_names == ("background", "nucleus", "cell")
    assert (len(found.train), len(found.evaluation)) == (2, 1)
    found = data.build(source="coco", task="labels", coco={"overlap": True}, **parts)
    assert found.label_names == ("nucleus", "cell")
    assert found.train[1]["label"].shape == (H, W, 2)
    with pytest.raises(InputError, match="overlap"):
        data.build(source="coco", task="classes", coco={"overlap": True}, **parts)


# ---- where things are


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("val.json", "val[:2]"),
        ("annotations/instances_val2017.json", "val"),
        ("annotations/instances_val2017.json", "val2017"),
        ("val/_annotations.coco.json", "val"),
        ("annotations.json", "all[not fold 1/3]"),
        ("result.json", "train"),
        ("annotations/instances_default.json", "all"),
    ],
)
@pytest.mark.parametrize("images", ["{split}", "images/{split}", "images", ".", "at"])
def test_layouts(tmp_path, path, split, images):
    write(tmp_path, path=path)
    name = split.split("[")[0]
    place = tmp_path / images.replace("{split}", name)
    if images == "at":
        place = (tmp_path / path).parent
    place.mkdir(parents=True, exist_ok=True)
    for file in (tmp_path / "images").glob("*.png"):
        file.rename(place / file.name)
    source = coco.open(root=tmp_path, split=split)
    assert Path(tmp_path, source.name(0)).parent == place
    named = {"annotations": path.replace(name, "{split}"), "images": images}
    if images != "at":
        assert len(coco.open(root=tmp_path, split=split, **named)) == len(source)


def test_which_file(tmp_path):
    def refused(match: str, **options: str) -> None:
        with pytest.raises(InputError, match=match):
            coco.open(root=tmp_path, **{"split": "train", **options})

    refused("there is none")
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train", "captions_train", "small"):
        write(tmp_path, path=f"annotations/{name}.json")
    assert coco.open(root=tmp_path, split="train").annotations.stem[:4] == "inst"
    refused(r"several, that .* there are annotations/captions_train", split="all")
    refused(r"annotations/captions_train.json, annotations/instances_tr", split="val")
    write(tmp_path, path="annotations/instances_train2.json")
    refused("name one in data.coco.annotations")
    one = "annotations/small.json"
    assert len(coco.open(root=tmp_path, split="all[1:]", annotations=one)) == 2
    refused("one list, which has no split 'val'", split="val", annotations=one)
    refused(r"no.json does not exist.*annotations/small.json", annotations="no.json")
    refused("none is no folder", annotations=one, images="none")
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    refused("names the image 'b.png', which is in none of", annotations=one)


def test_links(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    write(other)
    (root / "images").mkdir(parents=True)
    (root / "train.json").write_text(json.dumps(content()))
    for name in "abc":
        (root / "images" / f"{name}.png").symlink_to(other / "images" / f"{name}.png")
    with pytest.raises(InputError, match=r"set data\.links=True"):
        coco.open(root=root, split="train", on_error="skip")
    assert len(coco.open(root=root, split="train", links=True)) == 3


# ---- what is wrong


def change(*path: int | str, to: object = None) -> dict:
    """The content with the entry at a path another one; ... removes it."""
    what = content()
    place = what
    for key in path[:-1]:
        place = place[key]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return what


BROKEN = [
    ("annotations", 0, "image_id", 9, r"annotations\[0\] belongs to the image 9"),
    ("annotations", 1, "category_id", 9, r"annotations\[1\] has the category 9"),
    ("annotations", 1, "category_id", ..., r"annotations\[1\] has no `category_id`"),
    ("annotations", 1, "segmentation", ..., "no outline .* at most a box"),
    ("annotations", 1, "segmentation", [], "no outline"),
    ("annotations", 1, "segmentation", [[1, 2, 3, 4, 5]], "polygon of 5 numbers"),
    ("annotations", 1, "segmentation", [[1, 2, 3, 4]], "polygon of 4 numbers"),
    ("annotations", 1, "segmentation", [[1, 2, 3, 4, 5, "6"]], "no list of numbers"),
    ("annotations", 1, "segmentation", [[1, 2, 3, 4, 5, math.nan]], "NaN or infinite"),
    ("annotations", 1, "segmentation", [[1, 2, 3, 4, 5, 1e9]], r"corner x=5, y=1e\+09"),
    ("annotations", 1, "iscrowd", 2, r"annotations\[1\] has iscrowd=2"),
    ("images", 1, "file_name", "../c.png", "leads out of"),
    ("images", 1, "file_name", "d.png", "d.png does not exist"),
    ("images", 1, "file_name", "b.png", r"images\[0\] has, too"),
    ("images", 1, "id", 7, r"images\[1\] has the id 7 .*images\[0\] has, too"),
    ("images", 1, "height", 10**9, "c.png has the size 20 x 30, but .*1000000000 x 30"),
    ("images", 1, "width", "30", "the width '30'"),
]
RLES = [
    ({"size": [H, W], "counts": [H * W - 1]}, "add up to 599"),
    ({"size": [H, W], "counts": [H * W + 5, -5]}, "-5 the least"),
    ({"size": [H, W], "counts": []}, "add up to 0"),
    ({"size": [H, W], "counts": [1.0, 599]}, "neither whole numbers"),
    ({"size": [H, W], "counts": "o"}, "cannot be read"),
    ({"size": [H, W], "counts": "o" * 60 + "0"}, "cannot be read"),
    ({"size": [H, W], "counts": "é1"}, "cannot be read"),
    ({"size": [W, H], "counts": [H * W]}, "RLE of the size 30 x 20, but .*20 x 30"),
    ({"size": [10**5, 10**5], "counts": [10**10]}, "RLE of the size 100000 x 100000"),
    ({"size": [H], "counts": [H]}, r"RLE size \[20\]"),
]
BROKEN += [("annotations", 1, "segmentation", rle, match) for rle, match in RLES]


@pytest.mark.parametrize(("key", "i", "field", "value", "match"), BROKEN)
def test_broken_entries(tmp_path, caplog, key, i, field, value, match):
    write(tmp_path, change(key, i, field, to=value))
    with pytest.raises(InputError, match=rf"(?s)train\.json.*{match}|{match}"):
        coco.open(root=tmp_path, split="train")
    with caplog.at_level(logging.WARNING):
        source = coco.open(root=tmp_path, split="train", on_error="skip")
    names = [source.name(k) for k in range(len(source))]
    assert "images/a.png" in names
    unknown = field == "image_id"  # an annotation of no image, which harms none
    assert ("images/c.png" in names) == unknown
    count = 1 + (field == "id")  # the annotations of the id that is gone
    kinds = "image or annotation of" if count == 1 else "images or annotations of"
    assert len(caplog.messages) == 1 and f"{count} faulty {kinds}" in caplog.text


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ([], "no list `images`"),
        (change("annotations", to=...), "no list `annotations`"),
        (change("categories", to=[]), "no categories"),
        (change("images", to=[]), "lists no images"),
        (change("categories", 0, "name", to="nucleus"), r"categories\[1\] .*'nucleus'"),
        (change("categories", 0, "id", to=2), r"categories\[1\] has the id 2"),
        (change("categories", 0, "name", to="background"), "called background"),
        (change("categories", 0, "name", to=3), r"categories\[0\] .*the name 3"),
    ],
)
def test_broken_files(tmp_path, what, match):
    write(tmp_path, what)
    for on_error in ("stop", "skip"):
        with pytest.raises(InputError, match=match):
            coco.open(root=tmp_path, split="train", on_error=on_error)


def test_all_left_out(tmp_path):
    write(tmp_path)
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"All images .* are faulty, 3 .*a\.png"):
        coco.open(root=tmp_path, split="train", on_error="skip")
    with pytest.raises(InputError, match="on_error"):
        coco.open(root=tmp_path, split="train", on_error="ignore")


def paths(node: object, at: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else ()
    items = enumerate(node) if isinstance(node, list) else items
    return [at, *(path for key, child in items for path in paths(child, (*at, key)))]


NASTY = [None, True, -1, 2**70, 1e308, math.nan, "", "x" * 300, "\0", "\ud800"]
NASTY += [[], [[]], {}, [{}]]


def test_nothing_but_sentences(tmp_path):
    """Whatever stands anywhere in the file, reading it works or ends in InputError."""
    write(tmp_path)
    what, worked = content(), 0
    numbers = [p for p in paths(what)[1:] if not (len(p) == 5 and p[-1])]
    for path in numbers:
        for nasty in NASTY:
            (tmp_path / "train.json").write_text(json.dumps(change(*path, to=nasty)))
            try:
                source = coco.open(root=tmp_path, split="train")
                for i in range(len(source)):
                    source.instances(i)
                worked += 1
            except InputError as error:
                assert len(str(error)) < 1500
    assert worked > 20
    assert what == copy.deepcopy(content())


# ---- the real nuclei


def nuclei() -> Path:
    here = Path(__file__).resolve().parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    if not (Path(place) / "dsb2018").is_dir():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return Path(place) / "dsb2018"


def test_dsb2018_as_runs(tmp_path):
    """Nuclei written as runs come back as the numbers they were."""
    source = folder.open(
        root=nuclei(),
        split="all[:2]",
        images="stage1_train/*/images/*.png",
        masks="derived_labels/*.png",
        mask="instances",
    )
    what = {"images": [], "annotations": [], "categories": [{"id": 0, "name": "n"}]}
    for i in range(2):
        height, width = source.size(i)
        name = source.name(i)
        what["images"].append(
            {"id": i, "file_name": name, "height": height, "width": width}
        )
        numbers = source.instances(i)
        for k in range(1, int(numbers.max()) + 1):
            rle = {"size": [height, width], "counts": packed(runs_of(numbers == k))}
            row = {"image_id": i, "category_id": 0, "segmentation": rle}
            what["annotations"].append(row)
    (tmp_path / "x.json").write_text(json.dumps(what))
    (tmp_path / "stage1_train").symlink_to(nuclei() / "stage1_train")
    again = coco.open(root=tmp_path, split="all", links=True)
    for i in range(2):
        np.testing.assert_array_equal(again.instances(i), source.instances(i))
        np.testing.assert_array_equal(again[i]["label"], source[i]["label"])
        np.testing.assert_array_equal(again[i]["image"], source[i]["image"])
