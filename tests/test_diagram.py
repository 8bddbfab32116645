"""Diagrams against the paper's figures and against the nets themselves."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from unet_jax import diagram, models
from unet_jax.diagram import drawing
from unet_jax.types import InputError


def describe(size=(48, 48), channels=1, name="unet", **fields):
    return diagram.describe(models.build(name, num_classes=2, **fields), size, channels)


@pytest.fixture(scope="module")
def paper():
    return describe((572, 572), name="unet_2015")


# --- What a net is -------------------------------------------------------------------


def test_the_papers_net_is_its_figure_1(paper):
    down = [(572, 568), (284, 280), (140, 136), (68, 64), (32, 28)]
    for row, (entering, out) in enumerate(down):
        node = paper.encoder[row]
        assert node.entering == (entering, entering, 32 * 2**row if row else 1)
        assert node.shape == (out, out, 64 * 2**row)
    up = [(392, 388), (200, 196), (104, 100), (56, 52)]
    for row, (size, out) in enumerate(up):
        node, width = paper.node(row, 4 - row), 64 * 2**row
        assert node.up == node.fitted == (size, size, width)
        assert node.entering == (size, size, 2 * width)
        assert node.shape == (out, out, width)
        [skip] = node.skips
        assert skip.shape == paper.encoder[row].shape
        assert skip.used == (size, size, width) and skip.gate is None
        assert node.how == "concat"
    assert paper.logits == (388, 388, 2)
    assert [node.field[0] for node in paper.encoder] == [5, 14, 32, 68, 140]
    assert paper.field == (204, 204)


def test_costs_by_hand(paper):
    first, last = paper.encoder[0].cost, paper.node(3, 1)
    assert first.parameters == 9 * 64 + 64 + 9 * 64 * 64 + 64
    assert first.flops == 2 * 9 * 64 * (570**2 + 64 * 568**2)
    assert last.up_cost.parameters == 4 * 1024 * 512 + 512
    assert last.up_cost.flops == 2 * 56**2 * 1024 * 512
    assert last.cost.flops == 2 * 9 * 512 * (1024 * 54**2 + 512 * 52**2)
    assert last.merge_cost == diagram.Cost()
    [head] = paper.heads
    assert head.cost == diagram.Cost(130, 2 * 388**2 * 64 * 2)


def size_of(name):
    """A small image, larger for valid nets."""
    along = models.axis(models.build(name, num_classes=2), 0, 2)
    return next(along.working_sizes(64))


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_named_net_adds_up_and_fits_the_page(name):
    size = size_of(name)
    model = models.build(name, num_classes=2)
    found = diagram.describe(model, (size, size), 1)
    image = jax.ShapeDtypeStruct((1, size, size, 1), jnp.float32)
    (logits, aux), variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x), image
    )
    assert found.logits == logits.shape[1:]
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    nodes = (*found.encoder, *found.decoder)
    costs = [c for n in nodes for c in (n.cost, n.up_cost, n.merge_cost)]
    costs += [head.cost for head in found.heads]
    costs += [found.bottleneck.cost] if found.bottleneck else []
    assert found.total == sum(costs, diagram.Cost())
    assert found.total.parameters == total
    pyramid = [node.shape for node in found.encoder]
    assert pyramid == [x.shape[1:] for x in aux["encoder"]]
    for row, value in enumerate(aux["decoder"]):
        assert found.node(row, found.depth - row).shape == value.shape[1:]
    written = diagram.text(found)
    assert max(map(len, written.split("\n"))) <= 100
    assert written.isascii()
    assert f"parameters: {total:,} = encoder" in written
    check_layout(found)


def test_the_grid_of_unetpp_is_its_paper():
    found = describe(name="unetpp_2018", features=(4, 8, 16, 32))
    nodes = {(node.row, node.column) for node in (*found.encoder, *found.decoder)}
    assert nodes == {(i, j) for i in range(4) for j in range(4 - i)}
    node = found.node(0, 3)
    assert [skip.column for skip in node.skips] == [0, 1, 2]
    assert [skip.shape for skip in node.skips] == [(48, 48, 4)] * 3
    assert node.up == (48, 48, 4) and node.entering == (48, 48, 16)
    assert [head.column for head in found.heads] == [1, 2, 3]
    written = diagram.text(found)
    assert "X[0,3]  3 x 4 + 4 up  48x48x16" in written
    assert "logits 48 x 48 x 2, the mean of the heads'" in written


def test_cut_off_and_valid_unetpp():
    fields = {"features": (4, 8, 16), "padding": "valid", "level": 1}
    found = describe((44, 44), name="unetpp", **fields)
    assert found.depth == 1 and [head.name for head in found.heads] == ["head1"]
    assert found.node(0, 1).skips[0].used == (32, 32, 4)
    assert "X[0,1]: 40 x 40 cropped to 32 x 32" in diagram.text(found)
    assert found.field == (18, 18)


def test_what_a_resnet_lacks():
    found = describe((64, 64), 3, name="unetpp_resnet34")
    assert found.encoder[0].shape == (64, 64, 0)
    assert found.encoder[0].entering == (64, 64, 3)
    assert found.node(0, 1) is None and found.node(0, 5).skips[0].shape[-1] == 0
    assert found.node(0, 5).how == "no skip" and found.node(1, 4).how == "concat"
    assert [node.shape[0] for node in found.encoder] == [64, 32, 16, 8, 4, 2]
    # Level 1 is the 7x7 stem: its convolution and norm.
    assert found.encoder[1].cost.parameters == 7 * 7 * 3 * 64 + 2 * 64


def test_odd_sizes_are_padded_in_a_volume():
    found = describe((9, 10, 7), features=(2, 4), up="nearest_conv", remat=2)
    node = found.node(0, 1)
    assert found.encoder[1].entering == (4, 5, 3, 2)
    assert node.up == (8, 10, 6, 2) and node.fitted == (9, 10, 7, 2)
    written = diagram.text(found)
    assert "padded to 9 x 10 x 7" in written
    assert "sees" in written and "receptive field of a logit: 20 x 20 x 20" in written
    plain = describe((9, 10, 7), features=(2, 4), up="nearest_conv")
    assert dataclasses.replace(found, title="") == dataclasses.replace(plain, title="")
    smaller = describe((9, 9), features=(2, 4), down="strided", block="residual")
    assert smaller.node(0, 1).up == (10, 10, 2)
    assert "cut to 9 x 9" in diagram.text(smaller)


def test_other_merges_and_what_sees_everything():
    small = {"features": (4, 8), "norm": "instance", "excite": "se"}
    summed = describe(merge="sum", bottleneck="transformer", **small)
    assert summed.node(0, 1).how == "sum"
    assert summed.node(0, 1).entering == (48, 48, 4)
    assert summed.bottleneck.shape == (24, 24, 8)
    written = diagram.text(summed)
    for part in ("self-attention", "squeeze-and-excitation", "instance norm"):
        assert f"and more: {part}" in written
    assert "bottleneck 24 x 24 x 8" in written
    alone = describe(merge="none", **small)
    assert alone.node(0, 1).how == "no skip"
    assert "(no skip)" in diagram.text(alone)


def test_gates_are_shown():
    found = describe(name="attention_unet", features=(4, 8, 16), norm="none")
    assert [node.how for node in found.decoder] == ["gated", "concat"]
    assert found.node(1, 1).skips[0].gate == (24, 24, 1)
    assert found.node(1, 1).merge_cost.parameters > 0
    assert "gate 24 x 24" in diagram.text(found)
    full = describe(name="unetpp", merge="gated_full", features=(4, 8, 16))
    assert "X[0,2]: gates for X[0,0], X[0,1]" in diagram.text(full)


def test_what_no_image_is():
    with pytest.raises(InputError, match="two or three numbers"):
        describe((572,))
    with pytest.raises(InputError, match="at least one channel"):
        describe((32, 32), 0)
    with pytest.raises(InputError, match="use 556 or 572"):
        describe((571, 572), name="unet_2015")


# --- In a terminal -------------------------------------------------------------------


def test_the_papers_net_in_a_terminal(paper):
    lines = diagram.text(paper).split("\n")
    rows = [line for line in lines if "->" in line or "cropped" in line]
    assert any("cropped to 392 x 392" in line for line in rows)
    for shape in (
        "image 572 x 572 x 1",
        "in  284 x 284 x 64",
        "out 28 x 28 x 1024",
        "up  56 x 56 x 512",
        "concat 56 x 56 x 1024",
        "out 388 x 388 x 64",
        "logits 388 x 388 x 2",
        "up: 2,097,664 params, 3.29 GFLOPs",
        "37,568 params, 24.16 GFLOPs",
        "31,030,658 = encoder 18,842,048 + decoder 12,188,480 + head 130",
        "FLOPs: 300.86 G",
        "receptive field of a logit: 204 x 204 pixels",
    ):
        assert any(shape in line for line in lines), shape
    # Down on the left, up on the right: each level is further in.
    down = [line.index("in ") for line in lines if " in  " in line]
    up = [line.index("up  ") for line in lines if " up  " in line]
    assert down == [3, 4, 5, 6, 7]
    assert up == sorted(up, reverse=True) and len(up) == 4


# --- As a picture --------------------------------------------------------------------


def check_layout(found):
    """No text lies on another text, on a box or beyond the sheet."""
    figure = drawing._sheet(found).figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    [axes] = figure.axes
    texts = [t for t in axes.texts + axes.artists if isinstance(t, Text)]
    texts = texts or [t for t in axes.get_children() if isinstance(t, Text)]
    texts = [t for t in texts if t.get_text()]
    boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
    spans = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    assert len(spans) > 20 and len(boxes) > 4
    for (a, one), (b, other) in itertools.combinations(spans, 2):
        # A pixel or two of ascenders may touch the line above.
        assert not one.padded(-1.5).overlaps(other.padded(-1.5)), (a, b)
    for box in boxes:
        frame = box.get_window_extent(renderer)
        for words, span in spans:
            assert not frame.overlaps(span.padded(-1)), (words, frame)
    width, height = figure.canvas.get_width_height()
    for words, span in spans:
        assert span.x0 >= 0 and span.x1 <= width, words
        assert span.y0 >= 0 and span.y1 <= height, words


@pytest.mark.parametrize(
    ("size", "fields"),
    [
        ((97, 130), {"merge": "none"}),
        ((33, 64, 65), {"features": (8, 16, 32), "merge": "gated_full"}),
        ((2048, 2048), {"name": "unetpp", "features": (8, 16, 32), "merge": "gated"}),
        ((33, 35), {"features": (4, 8), "bottleneck": "transformer"}),
        ((4000, 4000, 4000), {"features": (64, 2048), "block": "recurrent"}),
    ],
)
def test_nothing_lies_on_anything_else(size, fields):
    found = describe(size, **fields)
    assert max(map(len, diagram.text(found).split("\n"))) <= 100
    check_layout(found)


def test_pictures_are_png_or_svg(tmp_path, paper):
    diagram.draw(paper, tmp_path / "deep" / "net.png")
    sheet = np.asarray(Image.open(tmp_path / "deep" / "net.png"))
    assert sheet.shape[0] > 1000 and sheet.shape[1] > 1500
    blue = (sheet[..., :3] == (185, 211, 236)).all(-1)
    assert 0.01 < blue.mean() < 0.2
    diagram.draw(paper, tmp_path / "net.SVG")
    content = (tmp_path / "net.SVG").read_bytes()
    assert b"<svg" in content
    diagram.draw(paper, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == content
    with pytest.raises(InputError, match=r"net\.pdf .* \.png or \.svg"):
        diagram.draw(paper, tmp_path / "net.pdf")


def test_print_and_draw(tmp_path, capsys):
    model = models.build("unetpp", num_classes=2, features=(4, 8))
    diagram.print_and_draw(model, (16, 16), 1)
    assert "X[0,1]" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    diagram.print_and_draw(model, (16, 16), 1, tmp_path / "net.png")
    assert str(tmp_path / "net.png") in capsys.readouterr().out
    assert (tmp_path / "net.png").stat().st_size > 1000
