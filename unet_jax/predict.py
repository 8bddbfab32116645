"""Predicting: one image of any size in, its label and its probabilities out.

    predictor = unet_jax.Predictor("runs/cells")
    label, probability = predictor(image)

A workdir is all it needs. The image is mirrored, run and cut exactly as in evaluation
(`unet_jax.models.pads`), so its numbers are those of the evaluation. `unet_jax.
predict_files` does the same for files.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models, tiles
from unet_jax.checkpoint import Meta, load_for_inference
from unet_jax.data.images import stored, to_channels
from unet_jax.layers import mirror
from unet_jax.models import UNet
from unet_jax.normalisation import Stats, normalise, standardise
from unet_jax.types import Array, InputError, NumpyArray, PyTree, Task

_LOG = logging.getLogger("unet_jax")


class Prediction(NamedTuple):
    """What a net says about one image.

    Attributes:
        label: Class ids ``[*S]``, u8 or (more than 256 classes) u16; or u8 zeros and
            ones: ``[*S, K]`` of several labels, ``[*S]`` of a single one.
        probability: ``f32[*S, K]``: softmax over K classes, or a sigmoid each of K
            labels.
    """

    label: NumpyArray
    probability: NumpyArray


def make_probability_fn(
    model: UNet, *, task: Task, stats: Stats
) -> Callable[[PyTree, Array], Array]:
    """The pure function behind a prediction, to be jitted.

    Args:
        model: The net.
        task: ``classes`` or ``labels``.
        stats: The normalisation (`unet_jax.normalisation.measure`).

    Returns:
        ``(variables, image [B, *S, C] as stored) -> f32[B, *S', K]``.
    """
    squash = jax.nn.softmax if task == "classes" else jax.nn.sigmoid

    def probability(variables: PyTree, image: Array) -> Array:
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
    """A net with its weights, its normalisation and its task, ready for any image.

    Args:
        workdir: Where train.py wrote; nothing else is needed.
        which: ``best`` or ``latest``, or a step.
        tile: Images longer than this along any axis are worked through in tiles of so
            many pixels an axis (rounded up to a multiple of 2^depth); 0 for never.
            Tiles of a net with same padding overlap, and their probabilities are
            blended linearly. Those of a net with valid padding, which also read the
            margin around them, give the whole image's output (not if the net has
            instance or group norm, which depend on the window).
        overlap: Part of a tile that overlaps the next, in [0, 1), for same padding.
        batch_size: Tiles run together.

    Raises:
        InputError: No checkpoint there, or an option out of its range.
    """

    model: UNet
    variables: PyTree
    meta: Meta

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        which: str = "best",
        tile: int = 0,
        overlap: float = 0.25,
        batch_size: int = 1,
    ) -> None:
        model, variables, meta, step = load_for_inference(workdir, which=which)
        self._set(model, variables, meta, step, tile, overlap, batch_size)

    @classmethod
    def from_model(
        cls,
        model: UNet,
        variables: PyTree,
        meta: Meta,
        *,
        step: int = 0,
        tile: int = 0,
        overlap: float = 0.25,
        batch_size: int = 1,
    ) -> "Predictor":
        """A predictor of a net in memory; see the class for the options.

        Args:
            model: The net.
            variables: What ``model.apply`` takes.
            meta: Of which task, label names, normalisation, channels, rank, spacing and
                threshold are read.
            step: The training step the weights are of.
            tile, overlap, batch_size: As for the class.
        """
        self = cls.__new__(cls)
        self._set(model, variables, meta, step, tile, overlap, batch_size)
        return self

    def _set(
        self,
        model: UNet,
        variables: PyTree,
        meta: Meta,
        step: int,
        tile: int,
        overlap: float,
        batch_size: int,
    ) -> None:
        if tile < 0 or batch_size < 1 or not 0 <= overlap < 1:
            raise InputError(
                f"tile = {tile}, overlap = {overlap} and batch_size = {batch_size}: use"
                " a tile of 0 or more pixels, an overlap from 0 to below 1, and a batch"
                " of at least 1."
            )
        self.model, self.meta, self.step = model, meta, step
        self.variables = jax.device_put(variables)
        self.tile, self.overlap, self.batch_size = tile, overlap, batch_size
        self._run = jax.jit(
            make_probability_fn(model, task=meta.task, stats=meta.normalisation)
        )
        self._noted: set[str] = set()

    def __call__(self, image: Any, *, name: str = "the image") -> Prediction:
        """Predicts one image.

        Args:
            image: ``[*S, C]``, or ``[*S]`` of one channel; any size from 1 up and any
                real dtype. Grey becomes RGB and RGB grey where the net needs it; whole
                numbers of another width than those trained on (u16 for u8) are scaled
                from one range to the other.
            name: What messages call it.

        Raises:
            InputError: A shape that is not one image for this net, NaN or infinite
                pixels, or more than the device's memory holds.
        """
        pixels = self.prepare(image, name=name)
        try:
            probability = self._probability(pixels)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"{name} of size {pixels.shape[:-1]} does not fit into the memory of"
                f" {jax.devices()[0].device_kind} at once: use a smaller tile"
                " (--tile=512, or less)."
            ) from error
        meta = self.meta
        label = decide(probability, task=meta.task, threshold=meta.threshold)
        return Prediction(label, probability)

    def prepare(self, image: Any, *, name: str = "the image") -> NumpyArray:
        """An image as the run's data source would have given it.

        Args:
            image: As for a call.
            name: What messages call it.

        Returns:
            ``[*S, C]``, u8, u16 or f32.

        Raises:
            InputError: As for a call.
        """
        meta, array = self.meta, np.asarray(image)
        if array.ndim == meta.rank:
            array = array[..., None]
        if array.ndim != meta.rank + 1 or not array.size:
            axes = "height, width" if meta.rank == 2 else "depth, height, width"
            raise InputError(
                f"{name} has the shape {np.shape(image)}: this net takes one image at a"
                f" time, of shape ({axes}, channels), or without the channels."
            )
        array = to_channels(stored(array, name), meta.channels, name=name)
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

    def _note(self, name: str, text: str) -> None:
        """Logs what was assumed about the pixels, once."""
        if text not in self._noted:
            self._noted.add(text)
            _LOG.warning("%s: %s, which the run was trained on.", name, text)

    def _probability(self, image: NumpyArray) -> NumpyArray:
        """``[*S, C]`` -> ``f32[*S, K]``."""
        size = image.shape[:-1]
        axes = models.covering_axes(self.model, len(size))
        cuts = [
            tiles.cut(axis, n, tile=self.tile, overlap=self.overlap)
            for axis, n in zip(axes, size, strict=True)
        ]
        padded = mirror(image, models.pads(self.model, size), axis=0)
        if all(len(c.begins) == 1 for c in cuts):
            out = np.asarray(self._run(self.variables, padded[None]))[0]
        else:
            out = tiles.run(
                functools.partial(self._run, self.variables),
                padded,
                cuts,
                channels=self.model.num_classes,
                batch_size=self.batch_size,
            )
        # A copy: what comes from JAX is read-only, and a view would keep the rest.
        return out[tuple(slice(0, n) for n in size)].copy()
