"""The parameters of a net as PyTorch's tensors, one to one, both ways.

A name table says which module of ours is which of theirs, ``{"encoder/level0/conv0":
"inc.double_conv.0"}``; what kind of module it is says how its tensors are laid out:

    Conv        kernel [*k, in, out]   <-> weight [out, in, *k]
    Dense       kernel [in, out]       <-> weight [out, in, 1, 1], `Linear` [out, in]
    UpConv      kernel [*k, in, out]   <-> weight [in, out, *k]
    norms       scale, bias, mean, var <-> weight, bias, running_mean, running_var
    PReLU       negative_slope []      <-> weight [1]

No kernel is flipped here: `unet_jax.resample.UpConv` and `WideUpConv` place their taps
as PyTorch does (``flax.linen.ConvTranspose`` does not).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models
from unet_jax.models import UNet
from unet_jax.resample import PixelShuffle, UpConv, WideUpConv
from unet_jax.types import InputError, NumpyArray, PyTree

Names = Mapping[str, str]
"""Path of a module of ours -> name of theirs, such as ``inc.double_conv.0``."""

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""

Convert = Callable[[NumpyArray], NumpyArray]


class Linear(str):
    """The name of a ``torch.nn.Linear``, whose weight has no spatial axes."""

    __slots__ = ()


class Entry(NamedTuple):
    """One tensor of a checkpoint and the parameter that it is.

    Attributes:
        path: Of the leaf in the variables, ``("params", "encoder", ..., "kernel")``.
        shape: Of the tensor.
        to_jax: Tensor -> parameter.
        to_torch: Parameter -> tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    to_jax: Convert
    to_torch: Convert


class Nameless(InputError):
    """A name table lacks names.

    Attributes:
        modules: Paths of ours that have none.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        super().__init__(
            f"the name table has no name for {', '.join(modules)}: add"
            ' {"' + modules[0] + '": "name.of.the.torch.module"}.'
        )


Plan = dict[str, Entry]
"""Every tensor that a net needs, by its name."""

_LEAVES = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "kernel": "weight",
    "negative_slope": "weight",
}
FIRST = ("conv_stem", "project", "conv0")
"""What the first convolution of an encoder, or of a block, may be called."""


class Module(NamedTuple):
    """What a leaf's layout depends on.

    Attributes:
        kind: Its class.
        shuffle: The strides of the pixel shuffle that it feeds, or ().
    """

    kind: type
    shuffle: tuple[int, ...] = ()


def image_of(model: UNet, variables: PyTree) -> tuple[int, int]:
    """The channels and the spatial axes of the images that some variables are for.

    Args:
        model: The net.
        variables: Its variables; only their shapes are read.

    Returns:
        ``(channels, rank)``.

    Raises:
        InputError: They are not of a net of this library.
    """
    params = variables["params"]
    kernels = [x for x in jax.tree.leaves(params) if len(x.shape) > 3]
    encoder = params.get("encoder", {})
    first = next((i for i, n in enumerate(model.features) if n), 0)
    blocks = (encoder, encoder.get(f"level{first}", {}))
    found = [
        block[name]["kernel"].shape[-2]
        for block in blocks
        for name in FIRST
        if name in block
    ]
    if not kernels or not found:
        raise InputError("these variables are not those of a UNet of this library.")
    return found[0], len(kernels[0].shape) - 2


def structure(
    model: UNet, channels: int, rank: int
) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], Module]]:
    """What a net owns, without computing anything.

    Args:
        model: The net.
        channels: Of the image.
        rank: Spatial axes of the image.

    Returns:
        The shape of every leaf by its path (with the collection first), and the module
        at each path (without it).
    """
    modules: dict[tuple[str, ...], Module] = {}

    def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):  # noqa: ANN202
        module = context.module
        if module.scope is not None:  # a net also asks parts that run nowhere
            parent = module.parent
            shuffle = parent.stride if isinstance(parent, PixelShuffle) else ()
            modules.setdefault(tuple(module.path), Module(type(module), shuffle))
        return call(*args, **kwargs)

    size = [1 + sum(pad) for pad in models.pads(model, (1,) * rank)]
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    with nn.intercept_methods(note), jax.numpy_dtype_promotion("standard"):
        tree = jax.eval_shape(model.init, jax.random.key(0), image)
    leaves = {
        tuple(str(part.key) for part in path): leaf.shape  # pyright: ignore
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return leaves, modules


def _permuted(order: Sequence[int], shape: Sequence[int]) -> tuple[Convert, Convert]:
    back = np.argsort(order)
    return (
        lambda x: np.transpose(x, back),
        lambda x: np.ascontiguousarray(np.transpose(x, order)),
    )


def _layout(
    module: Module, leaf: str, shape: tuple[int, ...], rank: int, *, linear: bool
) -> tuple[tuple[int, ...], Convert, Convert]:
    """The tensor's shape, and the ways to the parameter and back."""
    if leaf == "negative_slope":
        return (1,), lambda x: x.reshape(()), lambda x: x.reshape(1)
    if leaf != "kernel":
        return shape, lambda x: x, lambda x: x
    if module.kind is nn.Dense:
        ends = () if linear else (1,) * rank
        old = (shape[1], shape[0], *ends)
        return (
            old,
            lambda x: x.reshape(shape[1], shape[0]).T,
            lambda x: np.ascontiguousarray(x.T).reshape(old),
        )
    space = tuple(range(len(shape) - 2))
    last = (len(shape) - 2, len(shape) - 1)
    if module.kind in (UpConv, WideUpConv):
        order = (*last, *space)
    elif module.kind is nn.Conv:
        order = (*last[::-1], *space)
    else:
        raise InputError(f"a {module.kind.__name__} has no PyTorch layout here.")
    to_jax, to_torch = _permuted(order, shape)
    return tuple(shape[i] for i in order), to_jax, to_torch


def _shuffled(stride: tuple[int, ...], convert: Convert, *, axis: int) -> Convert:
    """Channels of a pixel shuffle: theirs are (feature, tap), ours (tap, feature)."""
    taps = math.prod(stride)

    def to_jax(x: NumpyArray) -> NumpyArray:
        x = convert(x)
        split = x.reshape(*x.shape[:-1], x.shape[-1] // taps, taps)
        return np.swapaxes(split, -1, -2).reshape(x.shape)

    def to_torch(x: NumpyArray) -> NumpyArray:
        split = x.reshape(*x.shape[:-1], taps, x.shape[-1] // taps)
        return convert(np.swapaxes(split, -1, -2).reshape(x.shape))

    return to_jax if axis else to_torch


def plan(model: UNet, names: Names, *, channels: int, rank: int) -> Plan:
    """Which tensor is which parameter.

    Args:
        model: The net.
        names: The name table; names of modules that the net does not have are ignored.
        channels: Of the image.
        rank: Spatial axes of the image.

    Returns:
        An entry for each leaf of the net's variables.

    Raises:
        Nameless: The table has no name for a module.
        InputError: It has one name for two.
    """
    leaves, modules = structure(model, channels, rank)
    found: Plan = {}
    absent = []
    for path, shape in leaves.items():
        *owner, leaf = path[1:]
        module = modules[tuple(owner)]
        name = names.get("/".join(owner))
        if name is None:
            absent.append("/".join(owner))
            continue
        key = f"{name}.{_LEAVES[leaf]}"
        linear = isinstance(name, Linear)
        old, to_jax, to_torch = _layout(module, leaf, shape, rank, linear=linear)
        if module.shuffle:
            to_jax = _shuffled(module.shuffle, to_jax, axis=1)
            to_torch = _shuffled(module.shuffle, to_torch, axis=0)
        if key in found:
            raise InputError(
                f"the name table gives {key} to {'/'.join(found[key].path[1:])} and to"
                f" {'/'.join(path[1:])}: give each module a name of its own."
            )
        found[key] = Entry(path, old, to_jax, to_torch)
    if absent:
        raise Nameless(sorted(set(absent)))
    return found


def counters(plan: Plan) -> list[str]:
    """The names of the ``num_batches_tracked`` that PyTorch keeps beside statistics."""
    ends = ".running_var"
    return [
        f"{key.removesuffix(ends)}.num_batches_tracked"
        for key in plan
        if key.endswith(ends)
    ]


def to_variables(
    plan: Plan, tensors: Mapping[str, NumpyArray], dtype: Any = np.float32
) -> dict[str, Any]:
    """Tensors -> variables.

    Args:
        plan: Of `plan`.
        tensors: Every tensor of the plan, of its shape.
        dtype: Of the variables.

    Returns:
        ``{"params": ..., "batch_stats": ...}``, the latter where there are any.
    """
    variables: dict[str, Any] = {}
    for key, entry in plan.items():
        value = entry.to_jax(np.asarray(tensors[key]).astype(dtype))
        node = variables
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = jnp.asarray(value)
    return variables


def to_tensors(
    plan: Plan, variables: PyTree, dtype: Any = None
) -> dict[str, NumpyArray]:
    """Variables -> tensors, with a count of 0 for each batch norm.

    Args:
        plan: Of `plan`.
        variables: Of the plan's net.
        dtype: Of the tensors; None for that of the variables.
    """
    found: dict[str, NumpyArray] = {}
    for key, entry in plan.items():
        node = variables
        for part in entry.path:
            node = node[part]
        value = entry.to_torch(np.asarray(node))
        found[key] = value.astype(dtype or value.dtype)
    for key in counters(plan):
        found[key] = np.zeros((), np.int64)
    return found
