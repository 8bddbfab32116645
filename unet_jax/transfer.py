"""Weights to start from: a whole net's, or those of an encoder alone.

A net's come from a workdir (of train.py or of ``unet-jax convert``) or from a PyTorch
file, an encoder's from the state dict of a torchvision ResNet or of a net of
segmentation_models_pytorch. What they do not have in the net that is to be trained,
such as the head for another number of classes, starts anew.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models, torch_weights
from unet_jax.checkpoint import Meta, load_for_inference
from unet_jax.models import UNet
from unet_jax.torch_weights import Imported, containers, smp
from unet_jax.torch_weights.family import Shapes, listed
from unet_jax.torch_weights.tensors import Entry, plan, structure, to_variables
from unet_jax.training import TrainState
from unet_jax.types import InputError, NumpyArray, PyTree

OWN = ("dropout", "dropout_levels", "remat", "dtype", "kernel_init")
"""The keys of a config's model that apply to a net of other weights: its shapes and its
answer stay."""


class Weights(NamedTuple):
    """A net with its weights.

    Attributes:
        where: What messages call it.
        name: Of the net, in `unet_jax.models.MODELS`.
        model: The net.
        variables: Its variables.
        channels: Of the image.
        rank: Spatial axes of the image.
        torch: As in `unet_jax.checkpoint.Meta`.
        normalisation: That of its run, or empty.
    """

    where: str
    name: str
    model: UNet
    variables: PyTree
    channels: int
    rank: int
    torch: dict[str, Any]
    normalisation: dict[str, Any]


class Start(NamedTuple):
    """What a run starts from.

    Attributes:
        name: Of the net, in `unet_jax.models.MODELS`; "" for that of the config.
        model: The net to train.
        variables: What is taken; what is not in them starts anew.
        text: What was taken from where and what starts anew, as a line.
        torch: As in `unet_jax.checkpoint.Meta`.
        normalisation: What the weights were trained with, or empty.
    """

    name: str
    model: UNet
    variables: PyTree
    text: str
    torch: dict[str, Any]
    normalisation: dict[str, Any]


# --- Whole nets ----------------------------------------------------------------------


def origin(found: Imported, path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint remembers of a PyTorch file, to write one like it again."""
    return {
        "family": found.family,
        "layout": found.layout,
        "dtype": found.dtype,
        "source": Path(path).name,
    }


def read(path: str | os.PathLike[str]) -> Weights:
    """Weights of a workdir (the best checkpoint) or of a PyTorch file.

    Raises:
        InputError: There are none, or they are of no net that is known.
    """
    if Path(path).is_dir():
        model, variables, meta, step = load_for_inference(path)
        return Weights(
            where=f"{os.fspath(path)} (step {step})",
            name=meta.model["name"],
            model=model,
            variables=variables,
            channels=meta.channels,
            rank=meta.rank,
            torch=meta.torch,
            normalisation=meta.normalisation,
        )
    found = torch_weights.read(path)
    return Weights(
        where=f"{os.fspath(path)} ({found.family})",
        name="unet",
        model=found.model,
        variables=found.variables,
        channels=found.channels,
        rank=found.rank,
        torch=origin(found, path),
        normalisation={},
    )


def adapted(model: UNet, fields: Mapping[str, Any]) -> UNet:
    """A net with what a config may say about one that has weights (`OWN`).

    Args:
        model: The net.
        fields: The config's model.

    Raises:
        InputError: A field that this net cannot have.
    """
    model = model.clone(**{key: fields[key] for key in OWN if key in fields})
    models.check(model)
    return model


def with_classes(model: UNet, num_classes: int) -> UNet:
    """The net with logits of so many channels."""
    fields: dict[str, Any] = {"num_classes": num_classes}
    if model.head_kernel == 0:  # the decoder's finest level gives the logits
        fields["decoder_features"] = (num_classes, *(model.decoder_features or ())[1:])
    model = model.clone(**fields)
    models.check(model)
    return model


def start(
    path: str | os.PathLike[str],
    fields: Mapping[str, Any],
    *,
    num_classes: int,
    channels: int,
    rank: int,
) -> Start:
    """A run's start from the weights of a whole net: ``model.weights``.

    Args:
        path: A workdir or a PyTorch file.
        fields: The config's model, of which `OWN` applies.
        num_classes: Of the data; heads for another number start anew.
        channels: Of the data's images.
        rank: Spatial axes of the data's images.

    Raises:
        InputError: No such weights, or of a net for other images.
    """
    weights = read(path)
    if (weights.channels, weights.rank) != (channels, rank):
        raise InputError(
            f"model.weights = {os.fspath(path)} is a net for {weights.rank}-D images of"
            f" {weights.channels} channel(s), and the data has {rank}-D images of"
            f" {channels}: set the channels of the data (data.SOURCE.channels), or use"
            " other weights."
        )
    model = with_classes(adapted(weights.model, fields), num_classes)
    taken, anew = fitting(model, weights.variables, channels=channels, rank=rank)
    text = f"weights: {_count(taken)} of {weights.where}; " + (
        f"{listed(anew)} starts anew, for {num_classes} class(es) instead of"
        f" {weights.model.num_classes}"
        if anew
        else "nothing starts anew"
    )
    name, torch = weights.name, weights.torch
    return Start(name, model, taken, text, torch, weights.normalisation)


def again(stored: Meta, fields: Mapping[str, Any]) -> UNet:
    """The net of a run that goes on and once started from weights.

    Args:
        stored: What the run is.
        fields: The config's model, of which `OWN` applies.
    """
    return adapted(stored.build_model(), fields)


# --- What fits -----------------------------------------------------------------------


def fitting(
    model: UNet, variables: PyTree, *, channels: int, rank: int
) -> tuple[dict[str, Any], list[str]]:
    """The variables of one net that fit another.

    Args:
        model: The net that is to get them.
        variables: Of a net that has most of its modules.
        channels: Of the image.
        rank: Spatial axes of the image.

    Returns:
        Those of the modules of which all shapes are the same, and the paths of the
        modules that start anew.
    """
    shapes, _ = structure(model, channels, rank)
    owned = {
        tuple(str(part.key) for part in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    anew = {
        path[1:-1]
        for path, shape in shapes.items()
        if path not in owned or owned[path].shape != shape
    }
    taken: dict[str, Any] = {}
    for path in shapes:
        if path[1:-1] not in anew:
            node = taken
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = owned[path]
    return taken, sorted("/".join(path) for path in anew)


def _count(variables: PyTree) -> str:
    leaves = jax.tree.leaves(variables.get("params", {}))
    return f"{sum(x.size for x in leaves):,} parameters"


def overlay(fresh: PyTree, taken: PyTree) -> PyTree:
    """Variables with what is taken instead of their own, where it is.

    Args:
        fresh: Nested dicts of arrays.
        taken: The same dicts, with fewer entries; on whatever device.

    Returns:
        The tree of ``fresh``, each array where that of ``fresh`` is and its own copy.
    """
    if isinstance(fresh, Mapping):
        return {
            key: overlay(value, taken[key]) if key in taken else value
            for key, value in fresh.items()
        }
    # A copy, because a donated state may not hold memory that others hold.
    # By way of the host, because what one process holds is no part of a global array.
    return jnp.copy(jax.device_put(np.asarray(taken), fresh.sharding))


def into(state: TrainState, variables: PyTree) -> TrainState:
    """A state at step 0 that starts from what is taken, its average as well."""
    params = overlay(state.params, variables["params"])
    stats = overlay(state.batch_stats, variables.get("batch_stats", {}))
    average = {"params": params, "batch_stats": stats}
    ema = jax.tree.map(jnp.copy, average) if state.ema is not None else None
    return dataclasses.replace(state, params=params, batch_stats=stats, ema=ema)


def completed(
    model: UNet, variables: PyTree, *, channels: int, rank: int, seed: int = 0
) -> PyTree:
    """Variables with what they lack in a net, initialised.

    Args:
        model: The net.
        variables: What is taken (`fitting`).
        channels: Of the image.
        rank: Spatial axes of the image.
        seed: Of what starts anew.
    """
    size = [1 + sum(pad) for pad in models.pads(model, (1,) * rank)]
    image = jnp.zeros((1, *size, channels), jnp.float32)

    def lacking(tree: PyTree, taken: PyTree) -> PyTree:
        if not isinstance(tree, Mapping):
            return None
        return {
            key: lacking(value, taken[key]) if key in taken else value
            for key, value in tree.items()
        }

    def init(key: jax.Array) -> PyTree:
        return lacking(model.init(key, image), variables)

    def joined(fresh: PyTree, taken: PyTree) -> PyTree:
        if not isinstance(fresh, Mapping):
            return taken
        return {
            key: joined(value, taken[key]) if key in taken else value
            for key, value in fresh.items()
        }

    # Compiled, so that only what is lacking is computed.
    return joined(jax.jit(init)(jax.random.key(seed)), variables)


# --- Encoders ------------------------------------------------------------------------


def encoder(
    model: UNet, path: str | os.PathLike[str], *, channels: int, rank: int
) -> Start:
    """A run's start from a pretrained ResNet encoder: ``model.encoder_weights``.

    Args:
        model: The net to train, with a ResNet encoder.
        path: A state dict of torchvision's, or of segmentation_models_pytorch.
        channels: Of the data's images; `for_channels` says what the stem then sees.
        rank: Spatial axes of the data's images.

    Raises:
        InputError: Another encoder, or norms that running statistics do not fit.
    """
    where = os.fspath(path)
    if not str(model.encoder).startswith("resnet"):
        raise InputError(
            f"model.encoder_weights = {where} is for a ResNet encoder, and"
            f" model.encoder = {model.encoder!r}: use model.name=unet_resnet34, or"
            " leave it out."
        )
    if model.norm not in ("batch", "batch_unbiased"):
        raise InputError(
            f"model.encoder_weights = {where} has batch norms, and model.norm ="
            f" {model.norm!r}: use batch or batch_unbiased."
        )
    if rank != 2:
        raise InputError(
            f"model.encoder_weights = {where} is of a 2-D net, and the data has"
            f" {rank}-D images: leave it out."
        )
    prefix, tensors = _resnet(path)
    _check_kind(model, where, prefix, tensors)
    _, modules = structure(model, channels, rank)
    # The table must name every module; those beside the encoder go by their own path.
    names = {"/".join(p): "/".join(p) for p in modules}
    names |= smp.encoder_names(model, prefix)
    own = {
        key: entry
        for key, entry in plan(model, names, channels=channels, rank=rank).items()
        if entry.path[1] == "encoder" and not key.startswith("encoder/")
    }
    stem = f"{prefix}conv1.weight"
    old = tensors[stem].shape[1]
    tensors[stem] = for_channels(tensors[stem], channels)
    _check_tensors(where, own, tensors)
    taken = to_variables(own, tensors)
    _, anew = fitting(model, taken, channels=channels, rank=rank)
    parts = ["/".join(p.split("/")[: 1 + p.startswith("encoder/")]) for p in anew]
    text = f"encoder_weights: {_count(taken)} of {where} ({model.encoder})"
    if channels != old:
        text += f", its first kernel made for {channels} channel(s) instead of {old}"
    text += f"; {listed(dict.fromkeys(parts))} starts anew"
    return Start("", model, taken, text, {}, {})


def _resnet(path: str | os.PathLike[str]) -> tuple[str, dict[str, NumpyArray]]:
    """The tensors of a ResNet in a file, and what stands before their names."""
    tensors, _ = containers.read(path)
    for _, stage, _ in containers.unwrapped(tensors):
        for prefix in ("encoder.", ""):
            first = (f"{prefix}conv1.weight", f"{prefix}layer1.0.conv1.weight")
            if all(name in stage for name in first):
                return prefix, {
                    key: value
                    for key, value in stage.items()
                    if key.startswith(prefix)
                    and not key.startswith(f"{prefix}fc.")
                    and not key.endswith("num_batches_tracked")
                }
    raise InputError(
        f"model.encoder_weights = {os.fspath(path)} holds no ResNet: it has no"
        " conv1.weight and layer1.0.conv1.weight, but"
        f" {listed(tensors)}; give the state dict of a torchvision ResNet."
    )


def _check_kind(
    model: UNet, where: str, prefix: str, tensors: Mapping[str, NumpyArray]
) -> None:
    shapes = Shapes({key: value.shape for key, value in tensors.items()})
    try:
        kind, features = smp.resnet_of(shapes, prefix)
    except InputError as error:
        raise InputError(f"model.encoder_weights = {where}: {error}") from error
    if (kind, features) != (model.encoder, model.features):
        raise InputError(
            f"model.encoder_weights = {where} is a {kind} with model.features ="
            f" {features}, and this config says {model.encoder} with {model.features}:"
            " change the one or the other."
        )


def _check_tensors(
    where: str, own: Mapping[str, Entry], tensors: Mapping[str, NumpyArray]
) -> None:
    missing = [key for key in own if key not in tensors]
    unused = [key for key in tensors if key not in own]
    shaped = [
        f"{key} {tensors[key].shape} and not {entry.shape}"
        for key, entry in own.items()
        if key in tensors and tensors[key].shape != entry.shape
    ]
    for what, found in (
        ("lacks", missing),
        ("has, and the net has no place for,", unused),
        ("has of another shape", shaped),
    ):
        if found:
            raise InputError(
                f"model.encoder_weights = {where} {what} {listed(found)}: it must be a"
                " plain torchvision ResNet, and the net one without model.conv_bias."
            )


def for_channels(weight: NumpyArray, channels: int) -> NumpyArray:
    """A first kernel made for images of another number of channels.

    For one channel, the sum over the old ones: a grey image gets the response that it
    had repeated. For n of them, number i takes the weights of i modulo the old number,
    all times old / n, so that responses keep their size.

    Args:
        weight: ``[out, old, *k]``.
        channels: How many there are to be.

    Returns:
        ``[out, channels, *k]``; the weight itself if it has them.
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    weight = weight.astype("float32")
    if channels == 1:
        return weight.sum(1, keepdims=True)
    return weight[:, [i % old for i in range(channels)]] * (old / channels)
