"""Predicting: one image of any size in, its label and its probabilities out.

    predictor = unet_jax.Predictor("runs/cells")
    label, probability = predictor(image)

A workdir is all it needs, or several, or one of folds or seeds, whose probabilities are
averaged. The image is
mirrored, run and cut exactly as in evaluation (`unet_jax.models.pads`), so its numbers
are those of the evaluation. `unet_jax.tiles` bounds the memory, `unet_jax.tta` averages
over views of the image, and `unet_jax.predict_files` does it all for files.
"""

import collections
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models, sharding, tiles, tta
from unet_jax.checkpoint import Meta, load_for_inference, members_of
from unet_jax.data.images import stored, to_channels
from unet_jax.layers import per_axis
from unet_jax.models import UNet
from unet_jax.normalisation import Stats, normalise, standardise
from unet_jax.training import trim
from unet_jax.types import Array, InputError, NumpyArray, PyTree, Shape, Task, choose

_LOG = logging.getLogger("unet_jax")


class Prediction(NamedTuple):
    """What a net says about one image.

    Attributes:
        label: Class ids ``[*S]``, u8 or (more than 256 classes) u16; or u8 zeros and
            ones: ``[*S, K]`` of several labels, ``[*S]`` of a single one.
        probability: ``f32[*S, K]``: softmax over K classes, or a sigmoid each of K
            labels; None where it was not asked for.
    """

    label: NumpyArray
    probability: NumpyArray | None


class Net(NamedTuple):
    """A trained net.

    Attributes:
        model: The net.
        variables: What ``model.apply`` takes.
        meta: Of which task, label names, normalisation, channels, rank, spacing and
            threshold are read.
        step: The training step the weights are of.
        name: What messages call it.
    """

    model: UNet
    variables: PyTree
    meta: Meta
    step: int = 0
    name: str = "the net"


def make_probability_fn(
    model: UNet, *, task: Task, stats: Stats
) -> Callable[[PyTree, Array], Array]:
    """The pure function behind a prediction, to be jitted.

    On a mesh (`unet_jax.sharding.within`), the images may be split over devices.

    Args:
        model: The net.
        task: ``classes`` or ``labels``.
        stats: The normalisation (`unet_jax.normalisation.measure`).

    Returns:
        ``(variables, image [B, *S, C] as stored) -> f32[B, *S', K]``.
    """
    squash = jax.nn.softmax if task == "classes" else jax.nn.sigmoid

    def probability(variables: PyTree, image: Array) -> Array:
        image = trim(model, {"image": image})["image"]
        logits, _ = model.apply(variables, normalise(image, stats), train=False)
        return squash(logits.astype(jnp.float32))

    return probability


def decide(probability: NumpyArray, *, task: Task, threshold: float) -> NumpyArray:
    """The label that follows from probabilities, as in `Prediction`.

    Args:
        probability: ``f32[*S, K]``.
        task: ``classes``: argmax, the lowest class of equal ones. ``labels``: above the
            threshold.
        threshold: In (0, 1).
    """
    classes = probability.shape[-1]
    if task == "classes":
        dtype = np.uint8 if classes <= 256 else np.uint16
        return np.argmax(probability, axis=-1).astype(dtype)
    label = (probability > np.float32(threshold)).astype(np.uint8)
    return label[..., 0] if classes == 1 else label


class Predictor:
    """One or several nets with their normalisation and task, ready for any image.

    The probabilities of several nets, and of the views of test-time augmentation, are
    averaged, each with the same weight.

    Args:
        workdir: Where train.py wrote; nothing else is needed. Or several of them.
        which: ``best`` or ``latest``, or a step.
        tile: Work through the image in tiles of so many output pixels an axis (rounded
            up to a multiple of 2^depth); a number for each axis, or one for all; 0 for
            the whole axis at once. Images of all sizes then run through one program; a
            smaller image is mirrored up to the tile.
        overlap: Part of a tile that overlaps the next, in [0, 1), where blended.
        blend: How tiles of nets with same padding are joined (`unet_jax.tiles`):
            ``gaussian`` or ``linear`` by weights; ``exact`` gives the whole image's
            output, from tiles that also read all around them that the net sees. Those
            of a net with valid padding always give the whole image's output (not if the
            net has instance or group norm, which depend on the window).
        tta: Test-time augmentation: ``none``, ``flips``, ``symmetries`` or
            ``rotations`` (`unet_jax.tta`).
        batch_size: Tiles, or views of an image, run together.
        mesh: The devices that share the work (`unet_jax.sharding.make_mesh`): every
            image or tile is split over ``space`` along its first axis, so that one
            that no device has the memory for is predicted as a whole, and a batch over
            ``data``. The image is then mirrored up to ``space`` times the multiple that
            one device needs. None: the first device alone.

    Attributes:
        nets: The nets.
        model, variables, meta, step: Of the first one. Where there are several, the
            threshold of ``meta`` is the mean of theirs.
        held: The most bytes of probabilities that a call has had on the host.

    Raises:
        InputError: No checkpoint there, nets that do not answer the same question, an
            option out of its range, or ``exact`` tiles of a net that has none.
    """

    nets: tuple[Net, ...]
    model: UNet
    variables: PyTree
    meta: Meta
    step: int
    held: int

    def __init__(
        self,
        workdir: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        which: str = "best",
        tile: int | Sequence[int] = 0,
        overlap: float = 0.5,
        blend: str = "gaussian",
        tta: str = "none",
        batch_size: int = 1,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        one = isinstance(workdir, str | os.PathLike)
        nets = [
            Net(*load_for_inference(path, which=which), name=os.fspath(path))
            for given in ([workdir] if one else workdir)
            for path in members_of(given)
        ]
        self._set(nets, tile, overlap, blend, tta, batch_size, mesh)

    @classmethod
    def from_model(
        cls,
        model: UNet,
        variables: PyTree,
        meta: Meta,
        *,
        step: int = 0,
        **options: Any,
    ) -> "Predictor":
        """A predictor of a net in memory; see the class for the options.

        Args:
            model, variables, meta, step: As in `Net`.
            **options: ``tile`` to ``mesh``, as for the class.
        """
        return cls.from_nets([Net(model, variables, meta, step)], **options)

    @classmethod
    def from_nets(
        cls,
        nets: Sequence[Net],
        *,
        tile: int | Sequence[int] = 0,
        overlap: float = 0.5,
        blend: str = "gaussian",
        tta: str = "none",
        batch_size: int = 1,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "Predictor":
        """A predictor of nets in memory; see the class for the options.

        Args:
            nets: At least one.
            tile, overlap, blend, tta, batch_size, mesh: As for the class.
        """
        self = cls.__new__(cls)
        self._set(nets, tile, overlap, blend, tta, batch_size, mesh)
        return self

    def _set(
        self,
        nets: Sequence[Net],
        tile: int | Sequence[int],
        overlap: float,
        blend: str,
        kind: str,
        batch_size: int,
        mesh: jax.sharding.Mesh | None,
    ) -> None:
        _check_alike(nets)
        meta = nets[0].meta
        size = per_axis(tile, meta.rank, "tile")
        if min(size) < 0 or batch_size < 1 or not 0 <= overlap < 1:
            raise InputError(
                f"tile = {tile}, overlap = {overlap} and batch_size = {batch_size}: use"
                " a tile of 0 or more pixels, an overlap from 0 to below 1, and a batch"
                " of at least 1."
            )
        choose(tiles.BLENDS, blend, "blend =")
        where = None if mesh is None else sharding.replicated(mesh)
        self.nets = tuple(
            net._replace(variables=jax.device_put(net.variables, where)) for net in nets
        )
        self.model, self.variables, _, self.step, _ = self.nets[0]
        thresholds = [net.meta.threshold for net in nets]
        if len(set(thresholds)) > 1:
            threshold = sum(thresholds) / len(thresholds)
            meta = dataclasses.replace(meta, threshold=threshold)
        self.meta, self.tta = meta, kind
        self._views = tta.views(kind, meta.rank)
        # Each of the devices that share a batch has something to do.
        rows = batch_size if mesh is None else sharding.round_up(mesh, batch_size)
        self._tiling = tiles.Tiling(size, overlap, blend, rows)
        space = 1 if mesh is None else mesh.shape["space"]
        self._axes = [
            models.covering_axes(net.model, meta.rank, space=space) for net in nets
        ]
        functions = [
            make_probability_fn(net.model, task=meta.task, stats=net.meta.normalisation)
            for net in nets
        ]
        self._runs = [
            jax.jit(fn) if mesh is None else _over(mesh, fn) for fn in functions
        ]
        if blend == "exact" and any(size):
            for net in self.nets:
                tiles.check_exact(
                    net.model, net.variables, channels=meta.channels, rank=meta.rank
                )
        self.held = 0
        self._noted: set[str] = set()

    def __call__(
        self, image: Any, *, name: str = "the image", probabilities: bool = True
    ) -> Prediction:
        """Predicts one image.

        Args:
            image: ``[*S, C]``, or ``[*S]`` of one channel; any size from 1 up and any
                real dtype. Grey becomes RGB and RGB grey where the net needs it; whole
                numbers of another width than those trained on (u16 for u8) are scaled
                from one range to the other. With tiles, what needs no conversion is
                read as it is asked for, as of a memory map.
            name: What messages call it.
            probabilities: Whether to return them. Without, they are decided on and
                dropped as tiles complete them: `memory` says how many there are.

        Raises:
            InputError: A shape that is not one image for this net, NaN or infinite
                pixels, or more than the device's memory holds.
        """
        pixels = self._pixels(image, name)
        held = self.memory(pixels[0].shape[:-1], probabilities=probabilities)
        self.held = max(self.held, held)
        try:
            return self._predict(pixels, probabilities)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"{name} of size {pixels[0].shape[:-1]} does not fit into the memory of"
                f" {jax.devices()[0].device_kind} at once: use a smaller tile"
                " (--tile=512, or less)."
            ) from error

    def memory(self, size: Sequence[int], *, probabilities: bool = False) -> int:
        """Bytes of probabilities that a call has on the host at most.

        Args:
            size: Of the image, ``*S``.
            probabilities: Whether the call is to return them.
        """
        size, classes = tuple(size), self.model.num_classes
        whole = 4 * classes * math.prod(size)
        rotated = self.tta == "rotations"
        held = functools.partial(
            tiles.held,
            self._axes,
            self._views,
            tiling=self._tiling,
            channels=classes,
            whole=probabilities or rotated,
        )
        if not rotated:
            return held(size=size)
        # The sum; and a turned map with its tiles, then the same turned back.
        turned = tta.frame(size)
        back = whole + 4 * classes * math.prod(turned)
        return whole + max(held(size=turned), back)

    def prepare(self, image: Any, *, name: str = "the image") -> NumpyArray:
        """An image as the run's data source would have given it, the first net's.

        Args:
            image: As for a call.
            name: What messages call it.

        Returns:
            ``[*S, C]``, u8, u16 or f32.

        Raises:
            InputError: As for a call.
        """
        return self._prepare(self._checked(image, name), self.nets[0].meta, name)

    def _checked(self, image: Any, name: str) -> NumpyArray:
        """``[*S, C]`` of one of the three dtypes, as many channels as the nets take."""
        meta, array = self.meta, np.asarray(image)
        if array.ndim == meta.rank:
            array = array[..., None]
        if array.ndim != meta.rank + 1 or not array.size:
            axes = "height, width" if meta.rank == 2 else "depth, height, width"
            raise InputError(
                f"{name} has the shape {np.shape(image)}: this net takes one image at a"
                f" time, of shape ({axes}, channels), or without the channels."
            )
        return to_channels(stored(array, name), meta.channels, name=name)

    def _prepare(self, array: NumpyArray, meta: Meta, name: str) -> NumpyArray:
        """What a net's normalisation asks for before anything is compiled."""
        if meta.normalisation["kind"] == "example":
            return standardise(array)
        trained = np.dtype(meta.normalisation.get("dtype", array.dtype))
        if trained == array.dtype:
            return array
        if trained.kind == array.dtype.kind == "u":
            ratio = float(np.iinfo(trained).max / np.iinfo(array.dtype).max)
            self._note(name, f"{array.dtype} pixels are scaled to {trained}'s range")
            return array.astype(np.float32) * np.float32(ratio)
        self._note(name, f"{array.dtype} pixels are taken as if they were {trained}")
        return array

    def _pixels(self, image: Any, name: str) -> list[NumpyArray]:
        """The image as each net takes it; once for nets that take it alike."""
        array = self._checked(image, name)
        known: list[tuple[Stats, NumpyArray]] = []
        pixels = []
        for net in self.nets:
            stats = net.meta.normalisation
            found = [x for other, x in known if other == stats]
            if not found:
                found = [self._prepare(array, net.meta, name)]
                known.append((stats, found[0]))
            pixels.append(found[0])
        return pixels

    def _note(self, name: str, text: str) -> None:
        """Logs what was assumed about the pixels, once."""
        if text not in self._noted:
            self._noted.add(text)
            _LOG.warning("%s: %s, which the run was trained on.", name, text)

    def _predict(self, pixels: list[NumpyArray], probabilities: bool) -> Prediction:
        """``[*S, C]`` for each net -> the mean."""
        size, meta = pixels[0].shape[:-1], self.meta
        decided = functools.partial(decide, task=meta.task, threshold=meta.threshold)
        if self.tta == "rotations":
            mean = self._rotated(pixels, size)
            return Prediction(decided(mean), mean if probabilities else None)
        shape = (*size, self.model.num_classes)
        whole = np.zeros(shape, np.float32) if probabilities else None
        # Of the shape and type that deciding makes of one pixel.
        one = decided(np.zeros((*(1,) * len(size), shape[-1]), np.float32))
        label = np.empty((*size, *one.shape[len(size) :]), one.dtype)
        for box, part in self._parts(pixels, whole):
            label[box] = decided(part)
        return Prediction(label, whole)

    def _parts(
        self, pixels: Sequence[NumpyArray], whole: NumpyArray | None
    ) -> Iterator[tuple[tiles.Box, NumpyArray]]:
        """The mean over nets and views, part by part."""
        readers = [
            tiles.Reader(functools.partial(run, net.variables), image, axes)
            for run, net, image, axes in zip(
                self._runs, self.nets, pixels, self._axes, strict=True
            )
        ]
        return tiles.run(
            readers,
            self._views,
            self._tiling,
            channels=self.model.num_classes,
            total=whole,
        )

    def _rotated(self, pixels: Sequence[NumpyArray], size: Shape) -> NumpyArray:
        """The mean over turned images, ``f32[*S, K]``."""
        total = np.zeros((*size, self.model.num_classes), np.float32)
        for angle in tta.ANGLES:
            if not angle:
                collections.deque(self._parts(pixels, total), maxlen=0)
                continue
            turned = [tta.turn(image, angle) for image in pixels]
            whole = np.zeros((*tta.frame(size), total.shape[-1]), np.float32)
            collections.deque(self._parts(turned, whole), maxlen=0)
            total += tta.turn_back(whole, angle, size)
        total /= np.float32(len(tta.ANGLES))
        return total


def _over(
    mesh: jax.sharding.Mesh, fn: Callable[[PyTree, Array], Array]
) -> Callable[[PyTree, NumpyArray], Array]:
    """``fn``, jitted, of images that are split over a mesh."""
    compiled = jax.jit(sharding.within(mesh, fn))

    def run(variables: PyTree, images: NumpyArray) -> Array:
        rows = len(images)
        missing = sharding.round_up(mesh, rows) - rows
        if missing:
            images = np.pad(images, [(0, missing), *[(0, 0)] * (images.ndim - 1)])
        out = compiled(variables, sharding.place(images, mesh))
        return out[:rows] if missing else out

    return run


def _check_alike(nets: Sequence[Net]) -> None:
    """Refuses nets that do not answer one question about one kind of image."""
    if not nets:
        raise InputError("a predictor needs a net: give at least one workdir.")
    first = nets[0]
    for net in nets[1:]:
        for key in ("task", "label_names", "channels", "rank", "spacing"):
            here, there = getattr(net.meta, key), getattr(first.meta, key)
            if here != there:
                raise InputError(
                    f"{net.name} has {key} = {here!r} and {first.name} {there!r}: nets"
                    " whose probabilities are averaged need the same, so leave one out."
                )
