"""What a run shows of itself: its net as a table, pictures and curves."""

import io
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import optim
from unet_jax.log import read_table, replace_file
from unet_jax.models import UNet
from unet_jax.pictures import PALETTE, picture
from unet_jax.types import Array, InputError, NumpyArray, PyTree, Shape

__all__ = [
    "count_flops",
    "count_parameters",
    "curves",
    "model_table",
    "picture",
]

# --- The model table -----------------------------------------------------------------


def _grouped(counts: Mapping[str, int], depth: int | None) -> dict[str, int]:
    """Counts added up by the first ``depth`` parts of their paths."""
    sums: dict[str, int] = {}
    for path, count in counts.items():
        key = "/".join(path.split("/")[:depth])
        sums[key] = sums.get(key, 0) + count
    return sums


def count_parameters(params: PyTree, *, depth: int | None = 2) -> dict[str, int]:
    """How many parameters each part of a net owns.

    Args:
        params: The parameters, arrays or their shapes, as nested dicts.
        depth: Parts of a module's path that tell groups apart: 1 gives ``encoder``,
            2 ``encoder/level0``, None every module by itself.

    Returns:
        Path to count.
    """
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        module = "/".join(str(getattr(part, "key", part)) for part in path[:-1])
        counts[module] = counts.get(module, 0) + math.prod(leaf.shape)
    return _grouped(counts, depth)


def _equation_flops(equation: Any) -> int:
    """Of one convolution or matrix product; 0 of anything else."""
    name, params = equation.primitive.name, equation.params
    if name not in ("conv_general_dilated", "dot_general"):
        return 0
    out, (left, right) = equation.outvars[0].aval, (v.aval for v in equation.invars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        taps = math.prod(left.shape[axis] for axis in contracted)
    else:
        features = right.shape[params["dimension_numbers"].rhs_spec[0]]
        taps = math.prod(right.shape) // features
    return 2 * math.prod(out.shape) * taps


def _inner(equation: Any) -> Iterator[tuple[Any, int]]:
    """The jaxprs inside an equation, and how often each runs."""
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)  # of a closed jaxpr, or itself
            if hasattr(jaxpr, "eqns"):
                yield jaxpr, times


def _walk(jaxpr: Any, prefix: str, times: int) -> Iterator[tuple[str, int]]:
    """(name stack, FLOPs) of the equations of a jaxpr and of all inside it."""
    for equation in jaxpr.eqns:
        stack = f"{prefix}/{equation.source_info.name_stack}"
        flops = _equation_flops(equation)
        if flops:
            yield stack, flops * times
        inner = [list(_walk(j, stack, times * n)) for j, n in _inner(equation)]
        if equation.primitive.name == "cond" and inner:
            inner = [max(inner, key=lambda branch: sum(n for _, n in branch))]
        for found in inner:
            yield from found


def _module_path(stack: str) -> str:
    """``/jvp(UNet)/encoder/checkpoint/level0`` -> ``UNet/encoder/level0``."""
    stack = re.sub(r"\w+\(|\)", "", stack)
    marks = ("", "checkpoint", "rematted_computation")
    return "/".join(part for part in stack.split("/") if part not in marks)


def count_flops(
    fn: Callable[..., Any], *args: Any, depth: int | None = None
) -> dict[str, int]:
    """Floating-point operations of a function's convolutions and matrix products.

    A multiply-add counts as 2. Counted from the function's jaxpr, so nothing runs or
    compiles, and what XLA fuses or leaves out is counted as written. A scan counts as
    often as it runs, of a ``cond`` the dearest branch, a ``while`` loop once.

    Args:
        fn: The function.
        *args: Its arguments, arrays or `jax.ShapeDtypeStruct`.
        depth: Parts of a path that tell groups apart, None for all of it.

    Returns:
        Path of modules and named scopes (``UNet/encoder/level0/conv0``) to count, in
        order of execution.
    """
    counts: dict[str, int] = {}
    for stack, flops in _walk(jax.make_jaxpr(fn)(*args).jaxpr, "", 1):
        path = _module_path(stack)
        counts[path] = counts.get(path, 0) + flops
    return _grouped(counts, depth)


def _module_shapes(model: nn.Module, variables: PyTree, image: Any) -> dict[str, Shape]:
    """Each module's path and the shape it gives out, in order of execution."""
    shapes: dict[str, Shape] = {}

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            leaves = jax.tree.leaves(out)
            shapes["/".join(context.module.path)] = leaves[0].shape if leaves else ()
        return out

    with nn.intercept_methods(watch):
        jax.eval_shape(partial(model.apply, train=False), variables, image)
    return shapes


def _levels(paths: Iterable[str]) -> list[str]:
    """The modules that get a row: ``encoder/level0``, and ``head``, which has none."""
    paths = list(paths)
    parents = {path.rpartition("/")[0] for path in paths}
    return [
        p for p in paths if p.count("/") == 1 or ("/" not in p and p not in parents)
    ]


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _flops(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _shares(name: str, counts: Mapping[str, int]) -> str:
    parts = " + ".join(f"{path} {n:,}" for path, n in counts.items() if n)
    return f"{name}: {sum(counts.values()):,}" + (f" = {parts}" if parts else "")


def model_table(
    model: UNet, image_shape: Sequence[int], *, freeze: Sequence[str] = ()
) -> str:
    """A net as a table: a row a level, then its totals. Compiles and runs nothing.

    Args:
        model: The net; any module that is called like one will do.
        image_shape: ``[B, *S, C]`` of a batch; FLOPs are those of one image of it.
        freeze: Paths of parameters that are not trained (`unet_jax.optim.is_frozen`).

    Returns:
        Several lines: each level's output, parameters and forward FLOPs; the
        parameters in all, those that are trained, and the shares of the parts of
        both; the FLOPs in all.

    Raises:
        InputError: A size the net does not work at, or ``freeze`` names nothing.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape[1:]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    params = variables["params"]
    trained = jax.tree.map(
        lambda leaf, frozen: jax.ShapeDtypeStruct(
            (0,) if frozen else leaf.shape, leaf.dtype
        ),
        params,
        optim.is_frozen(params, freeze),
    )
    owned, learnt = (count_parameters(tree) for tree in (params, trained))

    def forward(variables: PyTree, image: Array) -> Array:
        return model.apply(variables, image, train=False)[0]

    counts = {
        path.partition("/")[2]: flops
        for path, flops in count_flops(forward, variables, image).items()
    }
    flops = _grouped(counts, 2)
    shapes = _module_shapes(model, variables, image)
    rows = [["layer", "output", "parameters", "FLOPs"]]
    rows.append(["image", _size(image.shape[1:]), "", ""])
    order = list(dict.fromkeys([*_levels(shapes), *owned, *flops]))
    for path in order:
        count, left = owned.get(path, 0), learnt.get(path, 0)
        size = _size(shapes[path][1:]) if path in shapes else ""
        if not count and path not in flops and size == rows[-1][1]:
            continue  # dropout and the like change nothing that is shown
        mark = "" if left == count else " (partly frozen)" if left else " (frozen)"
        cost = _flops(flops[path]) if path in flops else ""
        rows.append([path + mark, size, f"{count:,}" if count else "", cost])
    lines = _aligned(rows)
    for name, counted in (("parameters", owned), ("trained", learnt)):
        ordered = {path: counted[path] for path in order if path in counted}
        lines.append(_shares(name, _grouped(ordered, 1)))
    lines.append(
        f"forward pass: {_flops(sum(flops.values()))}FLOPs for one image of"
        f" {_size(image.shape[1:])}, a multiply-add counted as 2"
    )
    return "\n".join(lines)


# --- Curves --------------------------------------------------------------------------


def _is_steep(series: Sequence[NumpyArray]) -> bool:
    """Whether a logarithmic axis pays: all positive, and a wide range."""
    values = np.concatenate([s[np.isfinite(s)] for s in series] or [np.zeros(0)])
    return bool(values.size and values.min() > 0 and values.max() > 20 * values.min())


def _draw(axis: Any, series: Mapping[str, Any], title: str) -> None:
    """Lines of (step, value, style) by name; few points are marked, for one is none."""
    for name, (step, value, style) in series.items():
        finite = np.isfinite(value)
        dots = {"marker": "o", "markersize": 3} if finite.sum() < 30 else {}
        axis.plot(step, np.where(finite, value, np.nan), label=name, **dots, **style)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize="small", ncols=1 + len(series) // 8)


def _dice_lines(found: Mapping[str, NumpyArray]) -> dict[str, Any]:
    """The lines of Dice by class, and of their mean where that is another one."""
    # As in the pictures, but for the colours that white swallows.
    shown = ["#{:02x}{:02x}{:02x}".format(*c) for c in (*PALETTE[:4], *PALETTE[5:7])]
    lines: dict[str, Any] = {}
    names = [key.removeprefix("dice/") for key in found if key.startswith("dice/")]
    for i, name in enumerate(n for n in names if n != "background"):
        dash = ("-", "--", ":", "-.")[i // len(shown) % 4]
        style = {"color": shown[i % len(shown)], "linestyle": dash}
        lines[name] = (found["step"], found[f"dice/{name}"], style)
    if len(lines) != 1 and "dice" in found:
        lines["mean"] = (found["step"], found["dice"], {"color": "black"})
    if "background" in names:
        style = {"color": "#999999"}
        lines["background"] = (found["step"], found["dice/background"], style)
    return lines


def curves(workdir: str | os.PathLike[str]) -> Path:
    """Draws a run's loss, Dice and learning rate over its steps.

    Args:
        workdir: A folder with ``train.csv`` or ``evaluation.csv``
            (`unet_jax.log.RunLog`). NaN leaves a gap.

    Returns:
        The path of the PNG, ``workdir/curves.png``.

    Raises:
        InputError: Neither file is there, or both are empty.
    """
    from matplotlib.figure import Figure

    folder = Path(workdir)
    train, found = (read_table(folder / f"{k}.csv") for k in ("train", "evaluation"))
    if not any(len(table.get("step", ())) for table in (train, found)):
        raise InputError(
            f"there is nothing to draw in {folder}: train.csv and evaluation.csv are"
            " missing or empty; give the --workdir of a run that has logged a step."
        )
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss_axis, dice_axis, rate_axis = figure.subplots(1, 3)
    blue, orange = {"color": "#0072b2"}, {"color": "#d55e00"}
    losses = {
        name: (table["step"], table["loss"], style)
        for name, table, style in (
            ("training", train, blue),
            ("evaluation", found, orange),
        )
        if "loss" in table
    }
    _draw(loss_axis, losses, "loss")
    if _is_steep([value for _, value, _ in losses.values()]):
        loss_axis.set_yscale("log")
    _draw(dice_axis, _dice_lines(found), "Dice on the evaluation split")
    dice_axis.set_ylim(0, 1.02)
    rate = {}
    if "learning_rate" in train:
        rate["learning rate"] = (train["step"], train["learning_rate"], blue)
    _draw(rate_axis, rate, "learning rate")
    rate_axis.set_ylim(bottom=0)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    replace_file(folder / "curves.png", content.getvalue())
    return folder / "curves.png"


def rates(
    path: Path,
    rate: NumpyArray,
    loss: Sequence[float],
    smooth: NumpyArray,
) -> None:
    """Draws the losses of a search for the learning rate.

    Args:
        path: The PNG to write.
        rate: ``f64[N]``.
        loss, smooth: At each of them, as measured and smoothed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    # What is far above the lowest is cut off, or it would flatten all else.
    axis.semilogx(rate, np.clip(loss, None, 3 * smooth.max()), alpha=0.4, label="loss")
    axis.semilogx(rate, smooth, label="smoothed")
    axis.set_xlabel("learning rate")
    axis.grid(alpha=0.3)
    axis.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    replace_file(path, data.getvalue())
