"""Seeing a net: the maps are the net's, in place, and a pixel finds its cells."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_jax import feature_sheet, features, models
from unet_jax.checkpoint import Meta
from unet_jax.layers import mirror
from unet_jax.predict import Predictor
from unet_jax.types import InputError

NAMES = ("background", "cell")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Compiles with fewer optimisations: each net here runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def make(name="unet", *, rank=2, channels=1, task="classes", names=NAMES, **fields):
    """A predictor of a tiny net with random weights."""
    wide = {"features": (3, 4, 5), **fields, "num_classes": len(names)}
    model = models.build(name, **wide)
    meta = Meta(
        model={"name": name, **wide},
        task=task,
        label_names=names,
        normalisation={
            "kind": "range",
            "dtype": "uint8",
            "shift": (0.0,) * channels,
            "scale": (1 / 255,) * channels,
        },
        channels=channels,
        rank=rank,
    )
    size = [1 + sum(pair) for pair in models.pads(model, (1,) * rank)]
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), shapes
    )
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(np.ones_like, variables["batch_stats"])
    return Predictor.from_model(model, variables, meta)


RESNET = {"features": (0, 4, 4, 4, 4, 8), "decoder_features": (4,) * 5}
NETS = {
    "unet": {},
    "unet_2015": {},
    "unet_bilinear": {"decoder_features": (3, 4)},
    "unetpp": {},
    "attention_unet": {},
    "r2attention_unet": {},
    "resunet": {},
    "unet_transformer": {},
    "unet_3d": {},
    "unet_resnet18": RESNET,
}


def picture_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_net_can_be_seen(name):
    predictor, image = make(name, **NETS[name]), picture_of(11, 18)
    maps = features.feature_maps(predictor, image)
    label, probability = predictor(image)
    np.testing.assert_allclose(maps.probability, probability, rtol=1e-3, atol=1e-4)
    assert maps.label.shape == label.shape
    assert maps.logits.shape == (11, 18, 2)
    for m in maps.maps:
        assert m.value.dtype == np.float32 and m.value.shape[-1] > 0
    drawn = feature_sheet.picture(maps, channels=2, pixel=(10, 0))
    assert drawn.dtype == np.uint8 and drawn.shape[2] == 3
    text = features.trace(maps, (10, 0))
    names = [m.name for m in maps.maps]
    assert [line.split(":")[0] for line in text.split("\n\n")[1:-1]] == names
    assert ("gate of the skip" in text) == ("attention" in name)
    if name == "unetpp":
        assert names == ["X[0,0]", "X[1,0]", "X[2,0]", "X[0,1]", "X[1,1]", "X[0,2]"]
        assert "logits of head 2" in text
    elif "resnet" in name:  # the full size has no channels on the way down
        assert names == [f"down {i}" for i in range(1, 6)] + [
            f"up {i}" for i in range(4, -1, -1)
        ]
    else:
        assert names == ["down 0", "down 1", "down 2", "up 1", "up 0"]


def test_maps_are_cut_to_the_cells_that_have_pixels():
    maps = features.feature_maps(make("attention_unet"), picture_of(9, 14))
    assert [m.shape[:-1] for m in maps.encoder] == [(9, 14), (5, 7), (3, 4)]
    assert [m.shape[:-1] for m in maps.decoder] == [(9, 14), (5, 7)]
    assert [gate.shape for level in maps.gates for gate in level] == [(5, 7)]
    assert maps.given.shape == (12, 16, 1)
    assert maps.place((5, 7), 1) == ((0, 0), (2, 2))


def test_the_papers_sizes_where_nothing_is_mirrored():
    predictor = make("unet_2015", features=(2, 2, 2, 2, 2))
    image = picture_of(204, 188)
    maps = features.feature_maps(predictor, image, pads=((0, 0), (0, 0)))
    assert [m.shape[0] for m in maps.encoder] == [200, 96, 44, 18, 5]
    assert [m.shape[0] for m in maps.decoder] == [20, 12, 8, 6]
    assert maps.logits.shape == (20, 4, 2)
    assert maps.begin == (92, 92)
    # Mirroring first gives what mirroring inside does.
    whole = mirror(image, models.pads(predictor.model, (204, 188)), axis=0)
    again = features.feature_maps(predictor, whole, pads=((0, 0), (0, 0)))
    probability = predictor(image).probability
    np.testing.assert_allclose(
        again.probability[:204, :188], probability, rtol=1e-3, atol=1e-4
    )
    visits = features.visits(maps, (92, 95))
    assert visits[-1].cell == (0, 3)
    with pytest.raises(InputError, match=r"91,95 .* rows 92 to 111 and columns 92"):
        features.trace(maps, (91, 95))
    with pytest.raises(InputError, match="use 188 or 204"):
        features.feature_maps(predictor, picture_of(190, 188), pads=((0, 0), (0, 0)))


@pytest.mark.parametrize(
    ("name", "pixel"),
    [("unet", (13, 2)), ("unet_2015", (9, 20)), ("attention_unet", (6, 11))],
)
def test_a_cell_depends_on_what_it_is_said_to_see_and_on_nothing_else(name, pixel):
    act = {"act": "elu", "down": "average", "norm": "none"}  # no gradient is just 0
    predictor = make(name, **act)
    maps = features.feature_maps(predictor, picture_of(32, 28))
    visits = features.visits(maps, pixel)

    def cells(given):
        _, aux = predictor.model.apply(predictor.variables, given[None], train=False)
        trees = [(aux["decoder"] if v.map.up else aux["encoder"]) for v in visits]
        values = [
            tree[v.map.level][0][v.cell] for v, tree in zip(visits, trees, strict=True)
        ]
        return jnp.stack([jnp.sum(value) for value in values]), values

    jacobian, values = jax.jit(jax.jacrev(cells, has_aux=True))(maps.given)
    for row, value, visit in zip(jacobian[..., 0], values, visits, strict=True):
        np.testing.assert_allclose(visit.values, value, rtol=1e-3, atol=1e-4)
        seen = np.abs(np.asarray(row)) > 0
        for axis, (first, last) in enumerate(visit.field):
            found = np.flatnonzero(seen.any(1 - axis))
            assert (found[0], found[-1]) == (first, last), (visit.map.name, axis)
        # The pixel's own place is among it, within the half of a cell.
        assert seen[tuple(p + pad[0] for p, pad in zip(pixel, maps.pads, strict=True))]
        assert tuple(visit.cell) == tuple(
            (p - b) // j
            for p, b, j in zip(
                pixel,
                *maps.place(visit.map.value.shape[:-1], visit.map.level),
                strict=True,
            )
        )


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_gate_of_a_pixel_is_that_of_its_cell_on_the_way_down(padding):
    predictor = make("r2attention_unet", padding=padding, block="plain", merge="gated")
    maps = features.feature_maps(predictor, picture_of(14, 16))
    visits = features.visits(maps, (7, 5))
    down, up = visits[1], visits[3]
    assert (down.map.name, up.map.name) == ("down 1", "up 1")
    ((gate,),) = (level for level in maps.gates if level)
    cut = [(n - m) // 2 for n, m in zip(down.map.value.shape, gate.shape, strict=False)]
    assert any(cut) == (padding == "valid")
    y, x = (c - k for c, k in zip(down.cell, cut, strict=True))
    assert up.gates == (float(gate[y, x]),)
    assert 0 < up.gates[0] < 1


def test_the_trace_says_what_the_arrays_hold():
    image = picture_of(21, 30)
    maps = features.feature_maps(make("unet_2015"), image)
    text = features.trace(maps, (3, 7), name="a.png")
    assert f"pixel (3, 7) of a.png, 21 x 30: {image[3, 7]} as stored" in text
    assert f"{image[3, 7] / 255:.4g} normalised" in text
    assert "mirrored beyond its border to 64 x 72, where the pixel is (23, 27)" in text
    assert "down 0: 60 x 68, 3 channels; at (21, 25)" in text
    assert "sees 5 x 5: rows 1 to 5, columns 5 to 9" in text
    a, b = maps.logits[3, 7]
    assert f"logits: background {a:.4f}, cell {b:.4f}" in text
    p, q = maps.probability[3, 7]
    assert f"softmax: background {p:.4f}, cell {q:.4f}" in text
    assert f"decision: {NAMES[maps.label[3, 7]]}" in text
    value = maps.encoder[0][21, 25]
    k = int(np.argmax(np.abs(value)))
    assert f"strongest: #{k} {value[k]:.3f}" in text


def test_what_sees_everything_is_said():
    text = functools.partial(features.trace, pixel=(1, 1))
    some = picture_of(8, 8)
    plain = text(features.feature_maps(make(), some))
    assert "see everything" not in plain
    other = make("unet_transformer", norm="instance")
    assert "instance norm and the bottleneck's attention, which see everything" in text(
        features.feature_maps(other, some)
    )


def test_labels_are_decided_one_by_one():
    predictor = make(task="labels", names=("cell", "wall"))
    maps = features.feature_maps(predictor, picture_of(8, 12))
    text = features.trace(maps, (2, 2))
    on = [n for n, k in zip(("cell", "wall"), maps.label[2, 2], strict=True) if k]
    assert f"decision: {', '.join(on) or 'none'}, above 0.5" in text
    assert "sigmoid: cell" in text
    assert feature_sheet.picture(maps, channels=1).ndim == 3
    one = features.feature_maps(make(task="labels", names=("cell",)), picture_of(8, 8))
    assert "sigmoid: cell" in features.trace(one, (0, 0))
    assert feature_sheet.picture(one, channels=1).ndim == 3


def test_of_a_volume_a_slice_is_shown():
    predictor = make(rank=3)
    volume = picture_of(5, 10, 7)
    maps = features.feature_maps(predictor, volume)
    assert maps.encoder[2].shape[:-1] == (2, 3, 2)
    middle = feature_sheet.picture(maps, channels=2)
    np.testing.assert_array_equal(middle, feature_sheet.picture(maps, channels=2))
    first = feature_sheet.picture(maps, channels=2, pixel=(0, 5, 3))
    third = feature_sheet.picture(maps, channels=2, pixel=(2, 5, 3))
    assert first.shape == third.shape == middle.shape
    assert (first != third).any()
    text = features.trace(maps, (4, 5, 3))
    assert "down 0: 5 x 10 x 7, 3 channels; at (4, 5, 3)" in text
    assert "slices 2 to 6, rows 3 to 7, columns 1 to 5" in text


def test_colour_images_show_the_channels_the_net_is_given():
    predictor = make(channels=3)
    maps = features.feature_maps(predictor, picture_of(8, 12))  # grey becomes colour
    assert maps.given.shape[-1] == 3
    colour = features.feature_maps(predictor, picture_of(8, 12, 3))
    shapes = [feature_sheet.picture(m, channels=1).shape for m in (maps, colour)]
    assert shapes[0] == shapes[1]
    assert "as stored" in features.trace(colour, (0, 0)).split("\n")[0]


def test_the_strongest_channels_come_first():
    values = np.float32([[[0.1, -5, 0, 2]], [[0.1, 3, 0, 3]]])
    assert features.strongest(values, 3) == [1, 3, 0]
    assert features.strongest(values[0, 0], 9) == [1, 3, 0, 2]


def test_places_in_the_picture_are_those_of_the_image():
    """A net whose maps are the image, from a corner that is bright."""
    model = models.build("unet", num_classes=2, features=(1, 1), norm="none")
    predictor = make(features=(1, 1), norm="none")

    def identity(path, x):
        value = np.zeros_like(x)
        if path[-1].key == "kernel":
            value[..., 0, 0] = 0
            centre = tuple(n // 2 for n in x.shape[:-2]) if x.shape[0] == 3 else ()
            value[(*centre, 0, 0) if centre else (..., 0, 0)] = 1
        return value

    variables = jax.tree_util.tree_map_with_path(identity, predictor.variables)
    predictor = Predictor.from_model(model, variables, predictor.meta)
    image = np.zeros((8, 8), np.uint8)
    image[:2, 4:6] = 255
    maps = features.feature_maps(predictor, image)
    np.testing.assert_array_equal(
        maps.encoder[1][..., 0], [[0, 0, 1, 0]] + [[0] * 4] * 3
    )
    row = feature_sheet._map_row(
        maps, features.visits(maps, (0, 4))[1], (0, 4), 1, boxed=False
    )
    panel = np.asarray(feature_sheet._drawn(row.panels[1], (8, 8))).astype(int).sum(-1)
    bright = np.argwhere(panel == panel.max())
    side = feature_sheet.SIDE
    assert bright.min(0).tolist() == [0, side // 2]
    assert bright.max(0).tolist() == [side // 4 - 1, side * 3 // 4 - 1]


def test_marks_are_drawn_for_a_pixel_only():
    maps = features.feature_maps(make(), picture_of(16, 16))
    mark = np.array(feature_sheet.MARK, np.uint8)
    plain = feature_sheet.picture(maps, channels=1)
    marked = feature_sheet.picture(maps, channels=1, pixel=(8, 8))
    assert not (plain == mark).all(-1).any()
    assert (marked == mark).all(-1).sum() > 50


def test_a_file_becomes_a_png(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture_of(12, 16)).save(path)
    out = tmp_path / "seen" / "a.png"
    assert feature_sheet.write(make(), path, out, channels=3) == ""
    with Image.open(out) as drawn:
        assert (
            drawn.size
            == feature_sheet.picture(
                features.feature_maps(make(), picture_of(12, 16)), channels=3
            ).shape[1::-1]
        )
    text = feature_sheet.write(
        make(), path, out, pixel=feature_sheet.parse_pixel("3, 4")
    )
    assert text.startswith(f"pixel (3, 4) of {path}, 12 x 16: ")


def test_of_a_stack_a_flat_net_gets_the_middle_page(tmp_path):
    volume = picture_of(5, 8, 9)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume, photometric="minisblack")
    np.testing.assert_array_equal(feature_sheet.read(make(), path)[..., 0], volume[2])
    whole = feature_sheet.read(make(rank=3), path)
    np.testing.assert_array_equal(whole[..., 0], volume)
    single = tmp_path / "b.tif"
    tifffile.imwrite(single, volume[0], photometric="minisblack")
    np.testing.assert_array_equal(feature_sheet.read(make(), single)[..., 0], volume[0])


def test_mistakes_are_named(tmp_path):
    maps = features.feature_maps(make(), picture_of(8, 12))
    for pixel, words in (
        ((8, 0), r"8,0 is outside the image of 8 x 12: .*rows 0 to 7 and columns 0"),
        ((-1, 0), "-1,0 is outside"),
        ((1, 2, 3), "3 numbers and the image 2 axes, rows and columns"),
    ):
        with pytest.raises(InputError, match=words):
            features.trace(maps, pixel)
        with pytest.raises(InputError, match=words):
            feature_sheet.picture(maps, pixel=pixel)
    with pytest.raises(InputError, match="channels = 0"):
        feature_sheet.picture(maps, channels=0)
    for text in ("1,b", "", "1,,2", "-1,2"):
        with pytest.raises(InputError, match="--pixel=40,57"):
            feature_sheet.parse_pixel(text)
    path = tmp_path / "a.png"
    Image.fromarray(picture_of(8, 8)).save(path)
    Image.fromarray(picture_of(8, 8)).save(tmp_path / "b.png")
    for out, words in ((tmp_path / "a.jpg", "no PNG"), (path, "the image itself")):
        with pytest.raises(InputError, match=words):
            feature_sheet.write(make(), path, out)
    with pytest.raises(InputError, match="holds 2 images"):
        feature_sheet.read(make(), tmp_path)
    with pytest.raises(InputError, match="takes volumes"):
        feature_sheet.read(make(rank=3), path)
    with pytest.raises(InputError, match="cannot be written"):
        feature_sheet.write(make(), path, path / "x.png")


def test_what_the_walkthrough_shows_is_there():
    docs = Path(features.__file__).parent.parent / "docs"
    links = re.findall(r"\]\(([^)#:]+)\)", (docs / "walkthrough.md").read_text())
    assert len(links) > 3
    for link in links:
        assert (docs / link).exists(), link
    shown = [p.name for p in (docs / "walkthrough").iterdir()]
    assert all(f"walkthrough/{name}" in links for name in shown)
    assert sum(p.stat().st_size for p in (docs / "walkthrough").iterdir()) < 700_000
