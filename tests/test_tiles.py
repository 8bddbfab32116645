"""Tiles: an image covered exactly, one shape, a band of memory, the whole's output."""

import functools
import tracemalloc

import flax.linen as nn
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax import models, tiles
from unet_jax.layers import mirror
from unet_jax.models import UNet
from unet_jax.tiles import Tiling
from unet_jax.tta import views
from unet_jax.types import InputError


def net_along(depth=1, padding="same", **fields):
    fields = {"features": (1,) * (depth + 1), "norm": "none", **fields}
    return UNet(fields.pop("num_classes", 2), padding=padding, **fields)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 400),
    tile=st.integers(0, 200),
    overlap=st.floats(0, 0.95),
    depth=st.integers(1, 3),
    padding=st.sampled_from(["same", "valid"]),
    blend=st.sampled_from(tiles.BLENDS),
)
def test_windows_cover_the_axis(size, tile, overlap, depth, padding, blend):
    model = net_along(depth, padding)
    axis, step = models.axes(model, 2)[0], 2**depth
    exact = blend == "exact" and padding == "same" and tile > 0
    cuts = tiles.cut(axis, size, tile=tile, overlap=overlap, blend=blend)
    (before, after), _ = models.pads(model, (size, 1))
    assert cuts.begins[0] == 0 and cuts.before == before
    assert all(begin % step == 0 for begin in cuts.begins)
    assert all(np.diff(cuts.begins) > 0)
    models.output_size(model, (cuts.window,) * 2)  # a size that the net works at
    # The image is mirrored as far as the net needs it, or up to one window.
    whole = cuts.begins[-1] + cuts.window
    assert whole == max(before + size + after, cuts.window)
    out = cuts.window - 2 * axis.margin
    total = np.zeros(whole - 2 * axis.margin)
    for begin, skip, share in zip(cuts.begins, cuts.skips, cuts.shares, strict=True):
        assert share.min() > 0 and skip >= 0 and skip + len(share) <= out
        total[begin + skip : begin + skip + len(share)] += share
        if exact:  # as far from where the window is cut off as a logit sees
            first = skip if begin else axis.halo
            last = out - skip - len(share) if begin + out < whole else axis.halo
            assert first >= axis.halo and last >= axis.halo
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    if not tile:
        assert cuts.begins == (0,)
    elif exact:
        assert cuts.window <= max(tile, step) + step + 2 * axis.halo
    else:  # one window whatever the size
        other = tiles.cut(axis, 1 + size // 3, tile=tile, overlap=overlap, blend=blend)
        assert other.window == cuts.window
        assert tile <= out < max(tile, step) + 2 * step


@pytest.mark.parametrize(("overlap", "begins"), [(0.0, (0, 16, 32)), (0.5, 5)])
@pytest.mark.parametrize("blend", ["gaussian", "linear"])
def test_overlap_sets_the_number_of_windows(overlap, begins, blend):
    axis, _ = models.axes(net_along(), 2)
    cuts = tiles.cut(axis, 48, tile=16, overlap=overlap, blend=blend)
    if isinstance(begins, tuple):
        assert cuts.begins == begins
    else:
        assert len(cuts.begins) == begins


def test_a_gaussian_and_a_triangle():
    """Two windows of 16 that overlap by half: their shares in closed form."""
    axis, _ = models.axes(net_along(), 2)
    place = np.arange(16) - 7.5
    for blend, weight in (
        ("gaussian", np.exp(-(place**2) / (2 * (16 / 8) ** 2))),
        ("linear", 8.5 - np.abs(place)),
    ):
        first, second = tiles.cut(axis, 24, tile=16, overlap=0.5, blend=blend).shares
        np.testing.assert_array_equal(first[:8], 1)
        expected = weight[8:] / (weight[8:] + weight[:8])
        np.testing.assert_allclose(first[8:], expected, rtol=1e-5)
        np.testing.assert_allclose(second, first[::-1], rtol=1e-5)


# --- Running -------------------------------------------------------------------------


def lopsided(batch, margin=(0, 0)):
    """A net that looks further to one side than to the other: [B, *S, C] -> C + 1."""
    x = batch.astype(np.float32)
    moved = x
    for axis, n in enumerate(margin, start=1):
        if n:
            moved = moved + 3 * axis * np.roll(x, n, axis=axis)
    box = (slice(None), *(slice(n, -n or None) for n in margin))
    return np.concatenate([moved, x[..., :1] ** 2], axis=-1)[box]


def whole_by_views(net, image, axes, views):
    """The mean over views, each image predicted whole: nothing of `tiles` in it."""
    total = 0
    for view in views:
        moved = view.apply(image)
        size = moved.shape[:-1]
        pads = tuple(axis.pads(n) for axis, n in zip(axes, size, strict=True))
        out = net(mirror(moved, pads, axis=0)[None])[0]
        out = out[tuple(slice(0, n) for n in size)]
        total = total + view.inverse.apply(out).astype(np.float64)
    return total / len(views)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.lists(st.integers(1, 37), min_size=2, max_size=3),
    tile=st.lists(st.integers(0, 21), min_size=3, max_size=3),
    kind=st.sampled_from(["none", "flips", "symmetries"]),
    padding=st.sampled_from(["same", "valid"]),
    blend=st.sampled_from(tiles.BLENDS),
    batch_size=st.integers(1, 5),
    keep=st.booleans(),
)
def test_windows_of_all_views_are_the_whole_image(
    size, tile, kind, padding, blend, batch_size, keep
):
    """Of a net that loses its border and of one that sees single pixels."""
    rank, size = len(size), tuple(size)
    axes = models.axes(net_along(1, padding), rank)
    net = functools.partial(lopsided, margin=[axis.margin for axis in axes])
    rng = np.random.default_rng(sum(size))
    image = rng.integers(0, 9, (*size, 2)).astype(np.uint8)
    chosen = views(kind, rank)
    reader = tiles.Reader(net, image, axes)
    total = np.zeros((*size, 3), np.float32) if keep else None
    found = np.full((*size, 3), np.nan)
    tiling = Tiling(tuple(tile[:rank]), 0.4, blend, batch_size)
    for box, part in tiles.run([reader], chosen, tiling, channels=3, total=total):
        assert np.isnan(found[box]).all()  # each part once
        found[box] = part
    expected = whole_by_views(net, image, axes, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if total is not None:
        np.testing.assert_array_equal(total, found.astype(np.float32))


def test_one_shape_for_images_of_all_sizes():
    axes = models.axes(net_along(2), 2)
    shapes = set()

    def net(batch):
        shapes.add((batch.shape, batch.dtype))
        return batch

    for size in [(40, 26), (3, 90), (1, 1), (17, 16)]:
        image = np.ones((*size, 1), np.uint8)
        reader = tiles.Reader(net, image, axes)
        tiling = Tiling((14, 14), 0.3, "gaussian", 3)
        parts = tiles.run([reader], views("symmetries", 2), tiling, channels=1)
        for _, part in parts:
            np.testing.assert_allclose(part, 1, rtol=1e-5)
    assert shapes == {((3, 16, 16, 1), np.dtype(np.uint8))}


def test_several_nets_of_different_sizes_are_averaged(rng):
    image = rng.normal(size=(61, 23, 1)).astype(np.float32)
    readers = []
    for factor, depth, padding in ((1, 1, "same"), (4, 2, "valid"), (7, 3, "same")):
        axes = models.axes(net_along(depth, padding), 2)
        edge = axes[0].margin
        box = slice(edge, -edge or None)

        def net(batch, factor=factor, box=box):
            return factor * batch[:, box, box]

        readers.append(tiles.Reader(net, image, axes))
    found = np.zeros((61, 23, 1), np.float32)
    parts = tiles.run(
        readers, views("flips", 2), Tiling((9, 9), 0.5, "linear", 2), channels=1
    )
    for box, part in parts:
        found[box] = part
    np.testing.assert_allclose(found, 4 * image, rtol=1e-5, atol=1e-5)


class Counted:
    """An image that remembers how much was read of it at once."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, "uint8", 0

    def __getitem__(self, index):
        part = self.array[index]
        self.most = max(self.most, part.size)
        return part


@pytest.mark.parametrize("size", [(64, 800), (800, 64)])
def test_memory_is_a_band_and_is_stated(size):
    """400 classes of 64 x 800 pixels are 82 MB; at once 4.9 MB of them are there."""
    axes, classes = models.axes(net_along(), 2), 400
    image = Counted(np.zeros((*size, 1), np.uint8))
    tiling, chosen = Tiling((16, 16), 0.25, "gaussian", 2), views("none", 2)
    answer = np.zeros((2, 16, 16, classes), np.float32)
    reader = tiles.Reader(lambda batch: answer.copy(), image, axes)
    held = functools.partial(tiles.held, [axes], chosen, size, tiling, channels=classes)
    # 64 by 28 for the band: a tile and the 12 after which the next row of them begins,
    # as a batch may have tiles of both. And those of two batches, and one weighed.
    assert held(whole=False) == 4 * classes * (64 * 28 + 5 * 16 * 16)
    assert held(whole=True) == 4 * classes * (64 * 800 + 5 * 16 * 16)
    tracemalloc.start()
    for _ in tiles.run([reader], chosen, tiling, channels=classes):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held(whole=False) <= peak < 1.05 * held(whole=False)
    assert image.most == 256  # and the image was read tile by tile


# --- Exact tiles ---------------------------------------------------------------------


def column(**fields):
    """A net that works along one axis only, in float64."""
    fields = {"features": (1, 2, 1), "norm": "none", "dtype": "float64", **fields}
    levels = len(fields["features"])
    for key, default, count in (("kernels", 3, levels), ("strides", 2, levels - 1)):
        numbers = fields.pop(key, (default,) * count)
        fields[key] = tuple((n, 1) for n in numbers)
    return UNet(num_classes=1, **fields)


def exact_error(model, less=0, monkeypatch=None):
    """How far tiles of one step are from the whole, relatively, at most.

    Weights and pixels are positive, so that nothing that a logit sees is without
    effect. With ``less`` the halo is so many steps narrower.
    """
    axes = models.covering_axes(model, 2)
    step, halo = axes[0].step, axes[0].halo
    size = (2 * halo + 7 * step - 3, model.head_kernel)
    rng = np.random.default_rng(0)
    image = rng.uniform(0.5, 1, (*size, 1))
    pads = models.pads(model, size)
    padded = [n + sum(pad) for n, pad in zip(size, pads, strict=True)]
    zeros = jax.ShapeDtypeStruct((1, *padded, 1), np.float32)
    shapes = jax.eval_shape(model.clone(dtype="float32").init, jax.random.key(0), zeros)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 0.3, x.shape), shapes)
    fast = {"xla_backend_optimization_level": 0}
    net = jax.jit(lambda x: model.apply(variables, x)[0], compiler_options=fast)
    if less:
        monkeypatch.setattr(tiles, "_halo", lambda axis: halo - less * step)

    def predict(tile):
        total = np.zeros((*size, 1))
        reader, tiling = tiles.Reader(net, image, axes), Tiling(tile, 0, "exact", 1)
        parts = tiles.run([reader], views("none", 2), tiling, channels=1, total=total)
        count = len(list(parts))
        assert less or count == (1 if tile == (0, 0) else 7)
        return total

    return np.abs(predict((step, 0)) / predict((0, 0)) - 1).max()


EXACT = [
    {},
    {"decoder": "unetpp", "kernels": (5, 1, 3), "strides": (3, 2)},
    {"block": "residual", "down": "strided", "up": "nearest_conv"},
    {"merge": "gated", "up": "bilinear", "padding": "reflect"},
    {"up": "pixel_shuffle_blurred", "kernels": (1, 1, 1)},
    {"up": "transpose_wide", "down": "average", "head_kernel": 3},
    {"block": "residual_stage", "down": "strided", "kernels": (1, 1, 1)},
]


@pytest.mark.parametrize("fields", EXACT)
def test_exact_tiles_are_the_whole_image(fields):
    if fields.get("block") == "residual_stage":
        fields = fields | {"units": (1, 1, 1)}
    with jax.enable_x64(True):
        assert exact_error(column(**fields)) < 1e-12


@pytest.mark.parametrize(
    ("fields", "less"),
    # One step less is too little for the blur, which no field counts.
    [({"down": "average"}, 2), (EXACT[4], 1), (EXACT[2], 2)],
)
def test_a_narrower_halo_is_not_exact(fields, less, monkeypatch):
    with jax.enable_x64(True):
        assert exact_error(column(**fields), less, monkeypatch) > 1e-9


class OwnNorm(nn.Module):
    """A bottleneck of one's own, with a norm of flax."""

    kit: object = None

    @nn.compact
    def __call__(self, x):
        return nn.GroupNorm(num_groups=1)(x)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"norm": "instance"}, r"norm0 \(GroupedNorm\) takes its mean"),
        ({"norm": "group", "norm_groups": 1}, r"\(GroupedNorm\)"),
        ({"excite": "scse"}, r"excite/channel \(SqueezeExcite\) takes the mean"),
        ({"block": "single_instance_prelu"}, r"\(GroupedNorm\)"),
        ({"bottleneck": "transformer"}, r"bottleneck \(Transformer\) attends"),
        ({"bottleneck": OwnNorm}, r"bottleneck/GroupNorm_0 \(GroupNorm\)"),
        ({"up": "bilinear_aligned"}, "model.up = 'bilinear_aligned'"),
        (
            {
                "decoder": "late_up",
                "features": (0, 4, 4),
                "decoder_features": (2, 4),
                "down": "strided",
                "up": "transpose_wide",
                "decoder_block": "residual_units",
                "head_kernel": 0,
            },
            "model.decoder = 'late_up'",
        ),
        ({"norm": "batch"}, None),
        ({"decoder": "unetpp", "deep_supervision": True}, None),
        ({"padding": "valid"}, None),
    ],
)
def test_what_sees_the_whole_map_is_refused_by_name(fields, part):
    model = net_along(**{"features": (2, 4), **fields})
    size = [1 + sum(pad) for pad in models.pads(model, (1, 1))]
    image = jax.ShapeDtypeStruct((1, *size, 1), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    check = functools.partial(tiles.check_exact, model, variables, channels=1, rank=2)
    if part is None:
        check()
        return
    with pytest.raises(InputError, match=part) as error:
        check()
    assert "use blend = 'gaussian'" in str(error.value)
