"""A net from PyTorch beside PyTorch, layer by layer: the same numbers, or where not.

`layers` needs nothing but the file: each layer that owns parameters is run in PyTorch
with the file's own tensors on what it gets in JAX, so that each is proven by itself.
`modules` runs the user's own module on the image as well and compares what comes out of
every layer, in order of execution, and at the end; so the first layer that departs is
where the nets differ. Both need PyTorch.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models
from unet_jax.layers import mirror
from unet_jax.models import UNet
from unet_jax.normalisation import Stats, normalise
from unet_jax.norms import EPSILON, BatchNorm, GroupedNorm
from unet_jax.resample import UpConv, WideUpConv
from unet_jax.torch_weights import Imported
from unet_jax.torch_weights.tensors import structure
from unet_jax.types import Array, InputError, NumpyArray, PyTree, size_text

TOLERANCE = 2e-5
"""Of the largest value of a layer: what float32 sums in another order may differ by."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer in both.

    Attributes:
        path: Ours; or of an output, what of ours it is compared with.
        name: Theirs.
        shape: What comes out, ``[B, *S, C]``.
        difference: The largest, NaN if there is nothing to compare.
        largest: Absolute value of theirs.
        note: What else there is to say, or "".
    """

    path: str
    name: str
    shape: tuple[int, ...]
    difference: float
    largest: float
    note: str = ""

    @property
    def relative(self) -> float:
        """The difference as a part of the largest value."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.largest if self.largest else float("inf")


class _Call(NamedTuple):
    """A layer that ran in JAX."""

    given: NumpyArray
    out: NumpyArray


class _Ran(NamedTuple):
    """A net that ran in JAX: every layer's calls, in order, and what came out."""

    calls: dict[str, list[_Call]]
    modules: dict[str, nn.Module]
    outputs: dict[str, NumpyArray]


def prepared(model: UNet, image: NumpyArray, stats: Stats) -> Array:
    """An image as the net sees it when it is predicted.

    Args:
        model: The net.
        image: ``[*S, C]`` as stored.
        stats: The normalisation.

    Returns:
        ``f32[1, *S', C]``, mirrored up to a size that the net works on.
    """
    padded = mirror(image, models.pads(model, image.shape[:-1]), axis=0)
    return normalise(jnp.asarray(padded[None]), stats)


def torch() -> Any:
    """PyTorch.

    Raises:
        InputError: It is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise InputError(
            "--check compares with PyTorch, which is not installed: pip install torch."
        ) from error


def _names(found: Imported) -> dict[str, str]:
    """Path of each of our modules with parameters -> name of theirs."""
    return {
        "/".join(entry.path[1:-1]): key.rpartition(".")[0]
        for key, entry in found.plan.items()
    }


def _run(model: UNet, variables: PyTree, image: Array, paths: set[str]) -> _Ran:
    """Runs the net as it is predicted with, and keeps what passes its layers."""
    modules: dict[str, nn.Module] = {}  # in order of execution
    model = model.clone(remat=0)  # whose traces do not leave the block

    def run(variables: PyTree, image: Array) -> Any:
        calls: dict[str, list[tuple[Array, Array]]] = {}

        def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            # A net also asks parts that run nowhere, and these have no path.
            if context.method_name == "__call__" and context.module.scope is not None:
                path = "/".join(context.module.path)
                if path in paths:
                    modules[path] = context.module
                    calls.setdefault(path, []).append((args[0], out))
            return out

        with nn.intercept_methods(note):
            logits, aux = model.apply(variables, image, train=False)
        return calls, logits, aux.get("heads", ())

    # An accelerator's default may round what is multiplied; PyTorch's does not.
    with jax.default_matmul_precision("highest"):
        found, logits, heads = jax.device_get(jax.jit(run)(variables, image))
    calls = {path: [_Call(*pair) for pair in found[path]] for path in modules}
    outputs = {"logits": logits, **{f"head {i}": h for i, h in enumerate(heads)}}
    return _Ran(calls, modules, outputs)


def _compared(
    path: str, name: str, pairs: Sequence[tuple[NumpyArray, NumpyArray]]
) -> Row:
    """A row of what came out, ours and theirs (channels last), of every call."""
    shape, worst, largest = pairs[0][0].shape, 0.0, 0.0
    for ours, theirs in pairs:
        if ours.shape != theirs.shape and ours.size == theirs.size:
            theirs = theirs.reshape(ours.shape)  # [B, C] beside [B, 1, 1, C]
        if ours.shape != theirs.shape:
            note = f"{size_text(theirs.shape[1:])} there"
            return Row(path, name, shape, float("inf"), 1.0, note)
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        # NaN on one side only is the worst there is, and max() would lose it.
        here = float(np.nan_to_num(difference.max(initial=0.0), nan=np.inf))
        worst = max(worst, here)
        largest = max(largest, float(np.abs(theirs).max(initial=0.0)))
    return Row(path, name, shape, worst, largest)


# --- Each layer by itself ------------------------------------------------------------


def layers(found: Imported, image: Array, variables: PyTree | None = None) -> list[Row]:
    """Every layer with parameters, each by itself, in order of execution.

    What is between them (activations, pooling, interpolation, joining) is not compared.

    Args:
        found: Of `unet_jax.torch_weights.read`.
        image: ``f32[B, *S, C]``, as `prepared` gives it.
        variables: Of the net; None for those of the file.

    Raises:
        InputError: PyTorch is not installed.
    """
    there, names = torch(), _names(found)
    variables = found.variables if variables is None else variables
    ran = _run(found.model, variables, image, set(names))
    _, kinds = structure(found.model, found.channels, found.rank)
    keys: dict[str, dict[str, str]] = {}
    for key, entry in found.plan.items():
        keys.setdefault("/".join(entry.path[1:-1]), {})[key.rpartition(".")[2]] = key
    rows = []
    for path, calls in ran.calls.items():
        tensors = {
            leaf: there.from_numpy(np.array(found.tensors[key], np.float32))
            for leaf, key in keys[path].items()
        }
        function = _function(there, ran.modules[path], tensors)
        shuffle = kinds[tuple(path.split("/"))].shuffle
        pairs = []
        for call in calls:
            with there.no_grad():
                theirs = function(_channels_first(there, call.given)).numpy()
            pairs.append((call.out, _channels_last(theirs, shuffle)))
        rows.append(_compared(path, names[path], pairs))
    return rows


def _channels_first(there: Any, x: NumpyArray) -> Any:
    return there.from_numpy(np.array(np.moveaxis(x, -1, 1), np.float32, order="C"))


def _channels_last(x: NumpyArray, shuffle: Sequence[int] = ()) -> NumpyArray:
    """Their layout as ours; a pixel shuffle's channels are (feature, tap) there."""
    x = np.moveaxis(x, 1, -1)
    if not shuffle:
        return x
    split = x.reshape(*x.shape[:-1], -1, int(np.prod(shuffle)))
    return np.swapaxes(split, -1, -2).reshape(x.shape)


def _function(
    there: Any, module: nn.Module, tensors: Mapping[str, Any]
) -> Callable[[Any], Any]:
    """What PyTorch computes for a layer of ours: ``[B, C, *S]`` -> the same."""
    F = there.nn.functional
    weight, bias = (cast(Any, tensors.get(leaf)) for leaf in ("weight", "bias"))
    rank = getattr(weight, "ndim", 2) - 2
    match module:
        case nn.Conv():
            conv = getattr(F, f"conv{rank}d")
            stride = _each(module.strides, rank)
            groups = module.feature_group_count

            def convolve(x: Any) -> Any:
                pads, mode = _padding(module.padding, weight.shape[2:])
                x = F.pad(x, pads, mode=mode) if any(pads) else x
                return conv(x, weight, bias, stride, groups=groups)

            return convolve
        case UpConv() | WideUpConv():
            stride = _each(module.stride or 2, rank)
            kernel = tuple(weight.shape[2:])
            pads = tuple((k - 1) // 2 for k in kernel)
            ends = tuple(
                s + 2 * p - k for s, p, k in zip(stride, pads, kernel, strict=True)
            )
            if isinstance(module, UpConv):
                pads = ends = (0,) * rank
            elif module.short:
                ends = (0,) * rank
            transpose = getattr(F, f"conv_transpose{rank}d")
            return lambda x: transpose(x, weight, bias, stride, pads, ends)
        case nn.Dense():

            def linear(x: Any) -> Any:
                y = F.linear(x.movedim(1, -1), weight.flatten(1), bias)
                return y.movedim(-1, 1)

            return linear
        case BatchNorm():
            mean, var = tensors["running_mean"], tensors["running_var"]
            return lambda x: F.batch_norm(
                x, mean, var, weight, bias, False, 0.0, EPSILON
            )
        case GroupedNorm():
            groups = module.groups or weight.shape[0]
            return lambda x: F.group_norm(x, groups, weight, bias, EPSILON)
        case nn.PReLU():
            return lambda x: F.prelu(x, weight)
    raise NotImplementedError(f"{type(module).__name__} has no counterpart here yet")


def _each(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _padding(padding: Any, kernel: Sequence[int]) -> tuple[list[int], str]:
    """As ``torch.nn.functional.pad`` takes it: the last axis first."""
    if padding == "VALID":
        return [0] * (2 * len(kernel)), "constant"
    mode = "constant"
    if padding == "REFLECT":
        mode, padding = "reflect", [((k - 1) // 2, k // 2) for k in kernel]
    return [n for pair in reversed(list(padding)) for n in pair], mode


# --- The user's own module -----------------------------------------------------------


def load_module(text: str) -> Any:
    """Runs ``FILE.py:EXPRESSION`` and gives the module that it makes.

    Args:
        text: Such as ``unet.py:UNet(3, 2)``; the expression sees what the file defines.
            A file of a package (with ``__init__.py`` beside it) is imported as such.

    Raises:
        InputError: No such file, code that does not run, or no module.
    """
    there = torch()
    name, colon, expression = text.partition(".py:")
    file = Path(f"{name}.py")
    if not colon or not expression.strip():
        raise InputError(
            f'--module={text} must be a file and an expression: "unet.py:UNet(3, 2)".'
        )
    if not file.is_file():
        raise InputError(f"--module: there is no file {file}.")
    top, parts = file.absolute().parent, [file.stem]
    while (top / "__init__.py").is_file():
        parts.insert(0, top.name)
        top = top.parent
    sys.path.insert(0, str(top))
    try:
        if len(parts) > 1:
            space = vars(importlib.import_module(".".join(parts)))
        else:  # by its path: its name may be that of a module that is loaded
            spec = importlib.util.spec_from_file_location(f"_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = loaded
            spec.loader.exec_module(loaded)
            space = vars(loaded)
        module = eval(expression, dict(space))
    except Exception as error:
        raise InputError(
            f"--module={text} did not run ({type(error).__name__}: {error}): try it in"
            " Python."
        ) from error
    finally:
        sys.path.remove(str(top))
    if not isinstance(module, there.nn.Module):
        raise InputError(
            f"--module={text} gives a {type(module).__name__} and no torch.nn.Module."
        )
    return module


def modules(
    found: Imported, module: Any, image: Array, variables: PyTree | None = None
) -> list[Row]:
    """The user's own module beside the net, end to end.

    Args:
        found: Of `unet_jax.torch_weights.read`.
        module: A ``torch.nn.Module``; it gets the file's tensors and is in evaluation
            mode from then on.
        image: ``f32[B, *S, C]``, as `prepared` gives it.
        variables: Of the net; None for those of the file.

    Returns:
        A row for each layer that both have, in the module's order of execution, and
        one for each of its outputs.

    Raises:
        InputError: The tensors are not those of the module, or the image is not for it.
    """
    there, names = torch(), _names(found)
    variables = found.variables if variables is None else variables
    _, kinds = structure(found.model, found.channels, found.rank)
    ran = _run(found.model, variables, image, set(names))
    theirs, outputs = _run_torch(there, found, module, np.asarray(image))
    paths = {name: path for path, name in names.items()}
    rows = []
    for name, outs in theirs.items():
        path = paths[name]
        calls = ran.calls.get(path, [])
        shuffle = kinds[tuple(path.split("/"))].shuffle
        ours = [call.out for call in calls]
        if len(ours) != len(outs):
            note = f"runs {len(outs)} times there and {len(ours)} times here"
            rows.append(Row(path, name, outs[0].shape, float("inf"), 1.0, note))
            continue
        last = [_channels_last(out, shuffle) for out in outs]
        rows.append(_compared(path, name, list(zip(ours, last, strict=True))))
    for path in ran.calls:
        if names[path] not in theirs:
            shape = ran.calls[path][0].out.shape
            note = "does not run there"
            rows.append(Row(path, names[path], shape, float("nan"), 0.0, note))
    for name, out in outputs.items():
        rows.append(_output(ran.outputs, name, _channels_last(out)))
    return rows


def _run_torch(
    there: Any, found: Imported, module: Any, image: NumpyArray
) -> tuple[dict[str, list[NumpyArray]], dict[str, NumpyArray]]:
    """What comes out of each named layer, in order, and of the whole module."""
    named = set(_names(found).values())
    state = {
        key: there.from_numpy(np.array(value.astype(np.float32)))
        if value.dtype.kind not in "iub"
        else there.from_numpy(np.array(value))
        for key, value in found.tensors.items()
    }
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"the tensors are not those of the module of --module: {text[:600]}"
        ) from error
    seen: dict[str, list[NumpyArray]] = {}
    hooks = []
    for name, part in module.named_modules():
        if name in named:

            def note(_: Any, __: Any, out: Any, name: str = name) -> None:
                # A copy: an activation after it may work in place.
                seen.setdefault(name, []).append(out.detach().clone().numpy())

            hooks.append(part.register_forward_hook(note))
    module.eval()
    try:
        with there.no_grad():
            out = module(_channels_first(there, image))
    except Exception as error:
        raise InputError(
            f"the module of --module did not run on an image of {tuple(image.shape)}"
            f" ({type(error).__name__}: {error})."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return seen, {k: v.detach().numpy() for k, v in _tensors(there, out, "output")}


def _tensors(there: Any, out: Any, name: str) -> list[tuple[str, Any]]:
    """The tensors in what a module returns."""
    if isinstance(out, there.Tensor):
        return [(name, out)]
    if isinstance(out, Mapping):
        return [t for k, v in out.items() for t in _tensors(there, v, f"{name}[{k!r}]")]
    if isinstance(out, Sequence) and not isinstance(out, str):
        return [
            t for i, v in enumerate(out) for t in _tensors(there, v, f"{name}[{i}]")
        ]
    return []


def _output(ours: Mapping[str, NumpyArray], name: str, theirs: NumpyArray) -> Row:
    """An output beside that of ours which is nearest, also after a sigmoid or softmax.

    The logits are ours; some modules end in what follows them.
    """
    ends: dict[str, Callable[[Array], Array]] = {
        "": lambda x: x,
        "sigmoid of ": nn.sigmoid,
        "softmax of ": nn.softmax,
    }
    rows = [
        _compared(
            f"{end}{key}", name, [(np.asarray(function(jnp.asarray(value))), theirs)]
        )
        for end, function in ends.items()
        for key, value in ours.items()
        if value.shape == theirs.shape
    ]
    if not rows:
        note = "none of our outputs has this shape"
        return Row("", name, theirs.shape, float("inf"), 1.0, note)
    return min(rows, key=lambda row: row.relative)


# --- In words ------------------------------------------------------------------------


def first_over(rows: Sequence[Row], tolerance: float = TOLERANCE) -> Row | None:
    """The first row whose relative difference is over the tolerance, or None."""
    return next((row for row in rows if row.relative > tolerance), None)


def table(rows: Sequence[Row], tolerance: float = TOLERANCE) -> str:
    """The rows as text; the first that is over the tolerance is marked.

    Args:
        rows: Of `layers` or `modules`.
        tolerance: Of the largest value of a layer.
    """
    bad = first_over(rows, tolerance)
    head = ["layer", "in PyTorch", "shape", "max |difference|", "relative", ""]
    cells = [head]
    for row in rows:
        numbers = ["", ""]
        if np.isfinite(row.difference):
            numbers = [f"{row.difference:.2e}", f"{row.relative:.2e}"]
        mark = "<- the first over the tolerance" if row is bad else ""
        note = ", ".join(text for text in (row.note, mark) if text)
        cells.append([row.path, row.name, size_text(row.shape[1:]), *numbers, note])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        left = [row[i].ljust(widths[i]) for i in range(2)]
        right = [row[i].rjust(widths[i]) for i in range(2, 5)]
        lines.append("  ".join([*left, *right, row[5]]).rstrip())
    return "\n".join(lines)


def verdict(rows: Sequence[Row], tolerance: float = TOLERANCE) -> str:
    """What the rows say, as a sentence."""
    bad = first_over(rows, tolerance)
    if bad is not None:
        over = [row for row in rows if row.relative > tolerance]
        where = f"{bad.path} ({bad.name})"
        how = (
            f"by {bad.relative:.2e} of its largest value" if not bad.note else bad.note
        )
        return (
            f"{where} is the first that differs: {how}, with a tolerance of"
            f" {tolerance:g}; {len(over)} of {len(rows)} do."
        )
    compared = [row for row in rows if not np.isnan(row.difference)]
    worst = max(compared, key=lambda row: row.relative)
    return (
        f"all {len(compared)} agree to {tolerance:g} of their largest value; the most"
        f" that one differs by is {worst.relative:.2e}, {worst.path}."
    )
