"""Tiles: an image through nets in windows of one shape, put together row by row.

Windows of every view and of every net are added to the same band of the image, in the
order in which they lie along its longest axis. Once no window to come reaches a part of
the band it is complete, is handed on, and its memory is used again: of an image of
H x W pixels and K classes never more than a band of about a tile's rows, times W and K,
is there at once. The image is read window by window, so that it may lie on disk.

How the windows of a net that pads are joined (``blend``):

    gaussian    they overlap, and each counts by a Gaussian of an eighth of its size
                around its centre
    linear      they overlap, and each counts by a triangle
    exact       they overlap by all that a logit sees (`geometry.Axis.halo`), and a
                pixel is taken from the one that sees all of it: the result is that of
                the whole image

Those of a net with valid padding abut and are exact by themselves.

Reference: Ronneberger et al. 2015, arXiv 1505.04597, figure 2 (overlap tiles); Isensee
et al. 2021, doi 10.1038/s41592-020-01008-z (the Gaussian).
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models
from unet_jax.blocks import SqueezeExcite
from unet_jax.bottlenecks import Transformer
from unet_jax.geometry import Axis
from unet_jax.layers import mirror
from unet_jax.models import UNet
from unet_jax.norms import GroupedNorm
from unet_jax.tta import View
from unet_jax.types import InputError, NumpyArray, PyTree, Shape

BLENDS = ("gaussian", "linear", "exact")

Box = tuple[slice, ...]
"""A part of an image: a slice for each spatial axis."""


class Tiling(NamedTuple):
    """How an image is cut.

    Attributes:
        tile: Output pixels of a window along each axis, rounded up to what the net can
            do; 0: the whole axis in one window.
        overlap: The part of a window that overlaps the next, in [0, 1), where blended.
        blend: One of `BLENDS`.
        batch_size: Windows run together.
    """

    tile: Shape
    overlap: float = 0.5
    blend: str = "gaussian"
    batch_size: int = 1


class Cuts(NamedTuple):
    """How windows of one size cover one axis of the padded image.

    Attributes:
        begins: Where each window begins, in the padded image and in its output.
        window: Pixels that the net reads.
        before: Pixels mirrored before the image; as many are after it as it takes.
        skips: Output pixels of each window before those that are used.
        shares: ``f32[n]`` a window: what it contributes to n output pixels, those from
            its begin and its skip on. The shares of an output pixel add up to 1.
    """

    begins: tuple[int, ...]
    window: int
    before: int
    skips: tuple[int, ...]
    shares: tuple[NumpyArray, ...]


def cut(axis: Axis, size: int, *, tile: int, overlap: float, blend: str) -> Cuts:
    """Windows over one axis, all beginning at multiples of the strides' product.

    Then max-pooling sees the same pairs as in the whole image.

    With a tile, the window has one size whatever the image's, which is mirrored up to
    it where it is smaller, so that images of all sizes share one program. (An image
    shorter than an ``exact`` window is one window of its own size: a net that pads sees
    zeros beyond its border, and no mirror image.)

    Args:
        axis: The net along this axis (`unet_jax.models.covering_axes`).
        size: Pixels of the image, without padding.
        tile: As one number of `Tiling`.
        overlap, blend: As in `Tiling`; not of nets with valid padding.
    """
    step, edge, valid = axis.step, axis.margin, axis.valid
    before, after = axis.pads(size)
    whole = window = before + size + after
    halo = _halo(axis) if tile and blend == "exact" and not valid else 0
    if tile:
        tile = max(tile, step)
        window = tile + sum(axis.pads(tile)) + 2 * halo
        if halo:
            window += -window % (step * axis.parts)
            window = min(window, whole)
        whole = max(whole, window)
    out, rest = window - 2 * edge, whole - window
    abut = valid or blend == "exact"
    stride = (out - 2 * halo if abut else int(out * (1 - overlap))) // step * step
    count = -(-rest // max(stride, step)) + 1 if rest else 1
    # Spread evenly; the differences stay multiples of step and at most the stride.
    begins = [k * (rest // step) // max(count - 1, 1) * step for k in range(count)]
    if abut or count == 1:
        skips = [0] + [halo] * (count - 1)
        starts = [begin + skip for begin, skip in zip(begins, skips, strict=True)]
        ends = [*starts[1:], rest + out]
        pairs = zip(starts, ends, strict=True)
        shares = [np.ones(end - start, np.float32) for start, end in pairs]
    else:
        skips, weight = [0] * count, _weight(out, blend)
        total = np.zeros(rest + out)
        for begin in begins:
            total[begin : begin + out] += weight
        # Divided along each axis by itself, no weight of a corner comes near zero.
        shares = [(weight / total[b : b + out]).astype(np.float32) for b in begins]
    return Cuts(tuple(begins), window, before, tuple(skips), tuple(shares))


@functools.lru_cache
def _halo(axis: Axis) -> int:
    return axis.halo  # 90 ms for a UNet++ with a ResNet-34, and asked for often


def _weight(size: int, blend: str) -> NumpyArray:
    """``f64[size]``, the importance of a window's output pixels, above 0."""
    if blend == "linear":
        return np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1)).astype(float)
    place = (np.arange(size) - (size - 1) / 2) / (size / 8)
    return np.exp(-0.5 * place**2)  # e^-8 at the ends


# --- Windows of the image ------------------------------------------------------------


class _Piece(NamedTuple):
    """A window along one axis of the image.

    ``picks``: the pixel of the image that each pixel of the window is. ``begin``: the
    first pixel of the image that it contributes to; ``share``: how much to it and those
    after it; ``kept``: where these are in the window's output, in this order.
    """

    picks: NumpyArray
    begin: int
    share: NumpyArray
    kept: slice

    @property
    def end(self) -> int:
        return self.begin + len(self.share)


class _Window(NamedTuple):
    """A window of a view, its pieces by axis of the image."""

    view: View
    pieces: tuple[_Piece, ...]

    def read(self, image: NumpyArray) -> NumpyArray:
        """``[*S, C]`` -> ``[*window, C]``."""
        picks = [piece.picks for piece in self.pieces]
        if all(np.all(np.diff(pick) == 1) for pick in picks):
            x = image[tuple(slice(int(pick[0]), int(pick[-1]) + 1) for pick in picks)]
        else:
            x = image[np.ix_(*picks)]
        return x.transpose(*self.view.axes, len(picks))

    def add(self, out: NumpyArray, total: NumpyArray, along: int, part: float) -> None:
        """Adds what the net says, ``[*out, K]``, to the band of the image.

        ``total`` holds pixel p of the axis ``along`` at p modulo its length.
        """
        pieces, axes = self.pieces, self.view.axes
        out = out[tuple(pieces[a].kept for a in axes)]
        out = out.transpose(*self.view.inverse.axes, len(axes))
        shares = [piece.share for piece in pieces]
        if part != 1 or any(share.min() < 1 for share in shares):
            out = out * functools.reduce(np.multiply.outer, shares)[..., None]
            out *= np.float32(part)
        box = [slice(piece.begin, piece.end) for piece in pieces]
        span = pieces[along]
        for there, here in _segments(span.begin, span.end, total.shape[along]):
            box[along] = there
            taken = [slice(None)] * out.ndim
            taken[along] = here
            place = total[tuple(box)]
            place += out[tuple(taken)]


def _segments(begin: int, end: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Where pixels begin to end lie in a ring, and where in the run of them."""
    at = begin
    while at < end:
        place = at % length
        n = min(end - at, length - place)
        yield slice(place, place + n), slice(at - begin, at - begin + n)
        at += n


def _pieces(cuts: Cuts, size: int, *, flipped: bool) -> list[_Piece]:
    """The windows along an axis of the image, in its order."""
    whole = cuts.begins[-1] + cuts.window
    pads = (cuts.before, whole - cuts.before - size)
    pixels = mirror(np.arange(size), (pads,), axis=0)
    pieces = []
    for begin, skip, share in zip(cuts.begins, cuts.skips, cuts.shares, strict=True):
        first = begin + skip
        share = share[: size - first]  # what is beyond the image is dropped
        picks, last = pixels[begin : begin + cuts.window], skip + len(share)
        kept = slice(skip, last)
        if flipped:
            picks, first, share = (
                size - 1 - picks,
                size - first - len(share),
                share[::-1],
            )
            kept = slice(last - 1, skip - 1 if skip else None, -1)
        pieces.append(_Piece(picks, first, share, kept))
    return pieces[::-1] if flipped else pieces


def _windows(
    view: View, axes: Sequence[Axis], size: Shape, tiling: Tiling, along: int
) -> tuple[Shape, Iterator[_Window]]:
    """The windows' shape as the net reads them, and they, in order along an axis."""
    lines: dict[int, list[_Piece]] = {}
    shape = []
    for axis, image_axis, flip in zip(axes, view.axes, view.flips, strict=True):
        n = size[image_axis]
        cuts = cut(
            axis,
            n,
            tile=tiling.tile[image_axis],
            overlap=tiling.overlap,
            blend=tiling.blend,
        )
        lines[image_axis] = _pieces(cuts, n, flipped=flip)
        shape.append(cuts.window)
    order = [along, *(a for a in range(len(size)) if a != along)]

    def windows() -> Iterator[_Window]:
        for chosen in itertools.product(*(lines[a] for a in order)):
            by_axis = dict(zip(order, chosen, strict=True))
            yield _Window(view, tuple(by_axis[a] for a in range(len(size))))

    return tuple(shape), windows()


# --- Running -------------------------------------------------------------------------


class Reader(NamedTuple):
    """A net and the image as it reads it.

    Attributes:
        net: ``[B, *window, C]`` -> ``f32[B, *out, K]``, to be averaged.
        image: ``[*S, C]``, any array that can be indexed.
        axes: Of the net (`unet_jax.models.covering_axes`).
    """

    net: Callable[[NumpyArray], Any]
    image: NumpyArray
    axes: tuple[Axis, ...]


class _Batch(NamedTuple):
    """Windows to run together; ``until``: what lies before is complete after them."""

    reader: int
    shape: Shape
    windows: list[_Window]
    until: int


def _batches(
    axes: Sequence[Sequence[Axis]], views: Sequence[View], size: Shape, tiling: Tiling
) -> Iterator[_Batch]:
    """The windows of all nets and views: always those next that lie furthest back."""
    along = _along(size, tiling)

    def begin(window: _Window) -> int:
        return window.pieces[along].begin

    queues: list[tuple[int, Shape, Iterator[_Window]]] = []
    for reader, of_net in enumerate(axes):
        streams: dict[Shape, list[Iterator[_Window]]] = {}
        for view in views:
            shape, windows = _windows(view, of_net, size, tiling, along)
            streams.setdefault(shape, []).append(windows)
        for shape, several in streams.items():
            queues.append((reader, shape, heapq.merge(*several, key=begin)))
    ahead = [next(windows) for _, _, windows in queues]
    heads: dict[int, _Window] = dict(enumerate(ahead))
    while heads:
        number = min(heads, key=lambda i: begin(heads[i]))
        reader, shape, windows = queues[number]
        group = [heads.pop(number), *itertools.islice(windows, tiling.batch_size - 1)]
        following = next(windows, None)
        if following is not None:
            heads[number] = following
        until = min(map(begin, heads.values()), default=size[along])
        yield _Batch(reader, shape, group, until)


def _along(size: Shape, tiling: Tiling) -> int:
    """The axis along which bands are completed: cut most often, it leaves least."""
    pairs = list(zip(size, tiling.tile, strict=True))
    return max(
        range(len(size)), key=lambda a: pairs[a][0] / (pairs[a][1] or pairs[a][0])
    )


def _rows(tiling: Tiling, views: Sequence[View]) -> Tiling:
    """With the rows of a batch that there can be use for.

    Without tiles the views of an image are all that one program is run with.
    """
    most = tiling.batch_size if any(tiling.tile) else len(views)
    return tiling._replace(batch_size=min(tiling.batch_size, most))


def held(
    axes: Sequence[Sequence[Axis]],
    views: Sequence[View],
    size: Shape,
    tiling: Tiling,
    *,
    channels: int,
    whole: bool,
) -> int:
    """Bytes of probabilities that `run` has on the host at most.

    The band, or the whole output, two batches of windows as they come from the nets,
    and one window by its share.

    Args:
        axes: Of each net.
        views, size, tiling, channels: As for `run`.
        whole: Whether the whole output is kept.
    """
    tiling = _rows(tiling, views)
    along, most = _along(size, tiling), 0
    length = size[along] if whole else _length(axes, views, size, tiling)
    for reader, shape, _, _ in _batches(axes, views, size, tiling):
        margins = [axis.margin for axis in axes[reader]]
        out = (n - 2 * edge for n, edge in zip(shape, margins, strict=True))
        most = max(most, math.prod(out))
    band = math.prod(size) // size[along] * length
    return 4 * channels * (band + (2 * tiling.batch_size + 1) * most)


def _length(
    axes: Sequence[Sequence[Axis]], views: Sequence[View], size: Shape, tiling: Tiling
) -> int:
    """Pixels along the longest axis between what is complete and what is reached."""
    along, begin, most = _along(size, tiling), 0, 1
    for batch in _batches(axes, views, size, tiling):
        end = max(window.pieces[along].end for window in batch.windows)
        most, begin = max(most, end - begin), batch.until
    return most


def run(
    readers: Sequence[Reader],
    views: Sequence[View],
    tiling: Tiling,
    *,
    channels: int,
    total: NumpyArray | None = None,
) -> Iterator[tuple[Box, NumpyArray]]:
    """The mean output of some nets over some views of an image, part by part.

    Args:
        readers: The nets, whose images have one size.
        views: Of the image; each is cut as if it were the image itself.
        tiling: How.
        channels: K, of the output.
        total: ``f32[*S, K]`` of zeros, which will be the whole output. Without it, only
            a band is there at any time.

    Yields:
        Where in the image, and ``f32[*part, K]`` there, to be used before the next is
        asked for. The parts are bands across the longest axis and cover the image once.
    """
    size, tiling = readers[0].image.shape[:-1], _rows(tiling, views)
    along, axes = _along(size, tiling), [reader.axes for reader in readers]
    keep = total is not None
    if total is None:
        band = list(size)
        band[along] = _length(axes, views, size, tiling)
        total = np.zeros((*band, channels), np.float32)
    part, done = 1 / (len(readers) * len(views)), 0
    for batch, outputs in _outputs(readers, views, size, tiling):
        for number, window in enumerate(batch.windows):
            window.add(outputs[number], total, along, part)
        del outputs  # before the next are there
        box = [slice(None)] * len(size)
        for there, here in _segments(done, batch.until, total.shape[along]):
            box[along] = there
            rows = total[tuple(box)]
            box[along] = slice(done + here.start, done + here.stop)
            yield tuple(box), rows
            if not keep:
                rows[...] = 0
        done = max(done, batch.until)


def _outputs(
    readers: Sequence[Reader], views: Sequence[View], size: Shape, tiling: Tiling
) -> Iterator[tuple[_Batch, NumpyArray]]:
    """Every batch and what its net says; the next one runs while one is used."""
    waiting: tuple[_Batch, Any] | None = None
    axes = [reader.axes for reader in readers]
    for batch in _batches(axes, views, size, tiling):
        net, image, _ = readers[batch.reader]
        # Rows without a window stay zero: one shape, one compilation. A new array each
        # time, as what was handed to JAX may be read until its output is there.
        shape = (tiling.batch_size, *batch.shape, image.shape[-1])
        given = np.zeros(shape, image.dtype)
        for row, window in enumerate(batch.windows):
            given[row] = window.read(image)
        running = net(given)
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])
        waiting = batch, running
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])


# --- Nets that windows cannot be exact of --------------------------------------------

_WHOLE_MAP: tuple[tuple[type[nn.Module], str], ...] = (
    (GroupedNorm, "takes its mean and deviation of the whole map"),
    (nn.GroupNorm, "takes its mean and deviation of the whole map"),
    (nn.InstanceNorm, "takes its mean and deviation of the whole map"),
    (SqueezeExcite, "takes the mean of the whole map"),
    (Transformer, "attends to the whole map"),
    (nn.MultiHeadDotProductAttention, "attends to the whole map"),
)


def check_exact(model: UNet, variables: PyTree, *, channels: int, rank: int) -> None:
    """Refuses ``blend = "exact"`` of nets whose output depends on the whole image.

    The net is traced, and not run, so that parts of one's own are looked into as well.

    Args:
        model: The net.
        variables: Of it.
        channels: Of the image.
        rank: Spatial axes of the image.

    Raises:
        InputError: Names the part.
    """
    refusal = "blend = 'exact' needs a net whose output depends on the pixels around it"
    remedy = "use blend = 'gaussian', or no tiles."
    try:
        models.check_joins(model)
    except InputError as error:
        raise InputError(
            f"{refusal} to a distance that can be computed, which model.decoder ="
            f" {model.decoder!r} does not tell: {remedy}"
        ) from error
    axes = models.axes(model, rank)
    if any(step.method == "linear_aligned" for axis in axes for step in axis.up):
        raise InputError(
            f"{refusal} alone, and model.up = {model.up!r} aligns the corners of each"
            f" map, so that every pixel depends on the size of the image: {remedy}"
        )
    found: list[str] = []

    def look(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        for kind, does in _WHOLE_MAP:
            if isinstance(context.module, kind):
                path = "/".join(context.module.path)
                found.append(f"{path} ({type(context.module).__name__}) {does}")
        return call(*args, **kwargs)

    size = [1 + sum(pad) for pad in models.pads(model, (1,) * rank)]
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(lambda v, x: model.apply(v, x)[0], variables, image)
    if found:
        raise InputError(f"{refusal} alone, and {found[0]}: {remedy}")
