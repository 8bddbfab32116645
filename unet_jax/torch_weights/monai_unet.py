"""MONAI's UNet, with residual units and without.

``model.0`` goes down, ``model.2`` up, ``model.1.submodule`` holds the same again for
the next level, and so on to the coarsest, which is a block alone. Every level strides
at once, also the first: the full size has no features, and the last up-sampling makes
the logits. PReLU and instance norm without tensors unless the file has others; what
shapes do not say are the strides (of residual units, whether but not how far) and the
order of norm and activation.
"""

import math
from collections.abc import Sequence
from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import (
    Family,
    Net,
    Shapes,
    act_named,
    norm_named,
    shared,
    units,
)
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError

_PARTS = {"conv": "conv", "norm": "adn.N", "act": "adn.A"}


def _level(level: int) -> str:
    return "model" + ".1.submodule" * level


def _in_place(shapes: Shapes, level: int) -> bool:
    """Whether a residual unit surely does not stride: what is beside it has 1 tap."""
    name = f"{_level(level)}.0.residual"
    kernel = shapes.kernel(f"{_level(level)}.0.conv.unit0.conv")
    taps = math.prod(shapes.get(f"{name}.weight", (0, 0, 1))[2:])
    return taps == 1 < math.prod(kernel)


def _read(
    shapes: Shapes,
    *,
    strides: int | Sequence[int | Sequence[int]] = 2,
    act: str = "relu",
    act_slope: float | None = None,
    norm: str | None = None,
    **fields: Any,
) -> Net:
    # Only the coarsest level of n is not ``.0``: its name has n - 1 submodules.
    depth = max(key.count(".submodule") for key in shapes)
    residual = "model.0.conv.unit0.conv.weight" in shapes
    first = ".conv.unit0" if residual else ""
    downs = [f"{_level(i)}.0{first}" for i in range(depth)] + [_level(depth) + first]
    ups = [f"{_level(i)}.2" + (".0" if residual else "") for i in range(depth)]
    kernels = [shapes.kernel(f"{name}.conv") for name in downs]
    if isinstance(strides, int):
        strides = tuple(
            1 if residual and _in_place(shapes, level) else strides
            for level in range(depth)
        )
    if len(strides) == depth:  # MONAI's; from the last level to the coarsest it is 1
        strides = (*strides, 1)
    if len(strides) != depth + 1:
        raise InputError(
            f"strides = {tuple(strides)} must be {depth} numbers, as many as the"
            " channels of the net but one."
        )
    # On each level of the up-sampling; to the last but one there is none.
    widths = [shapes[f"{name}.conv.weight"][1] for name in ups]
    channels = tuple(shapes.out(f"{name}.conv") for name in downs)
    found: dict[str, Any] = {
        "num_classes": widths[0],
        "features": (0, *channels),
        "decoder_features": (*widths, channels[-2]),
        "decoder": "late_up",
        "down": "strided",
        "up": "transpose_wide_unit",
        "up_bias": f"{ups[0]}.conv.bias" in shapes,
        "head_kernel": 0,
        "strides": tuple(strides),
        "norm": norm_named(shapes, f"{downs[0]}.adn.N", norm),
        "conv_bias": f"{downs[0]}.conv.bias" in shapes,
        **act_named(shapes, f"{downs[0]}.adn.A", act, act_slope),
    }
    beside = [shapes.kernel(f"{name}.conv") for name in ups]
    if len(set(kernels)) > 1 or len(set(beside)) > 1:
        raise InputError("its levels have kernels of several sizes.")
    found["kernels"] = shared(kernels[:1], 3) * (depth + 2)
    if beside[0] != kernels[0]:
        found["decoder_kernels"] = shared(beside[:1], None) * (depth + 1)
    found["decoder_block"] = "residual_units"
    if residual:
        count = shapes.count(r"model\.0\.conv\.unit(\d+)\.conv\.weight")
        found |= {"block": "residual_units", "units": (count,) * (depth + 2)}
        found["decoder_units"] = (1,) * (depth + 1)
    else:
        found |= {"block": "plain", "units": (1,) * (depth + 2)}
        found["decoder_units"] = (0,) * (depth + 1)
    into = shapes.into(f"{downs[0]}.conv")
    return Net({**found, **fields}, into, len(kernels[0]), {})


def _names(model: UNet, rank: int) -> Names:
    depth = model.depth - 1
    residual = model.block == "residual_units"
    counts = model.units or (2,) * (depth + 2)
    names: dict[str, str] = {}

    def unit(place: str) -> Any:
        if residual:
            return lambda what, i: f"{place}.conv.unit{i}.{_PARTS[what]}"
        return lambda what, i: f"{place}.{_PARTS[what]}"

    for level in range(depth + 1):
        place = _level(level) + (".0" if level < depth else "")
        names |= units(f"encoder/level{level + 1}", unit(place), counts[level + 1])
        names[f"encoder/level{level + 1}/shortcut"] = f"{place}.residual"
    for level in range(depth):
        place = f"{_level(level)}.2"
        up = f"{place}.0" if residual else place
        for what, theirs in _PARTS.items():
            names[f"decoder/up{level}/{what}"] = f"{up}.{theirs}"
        if residual:
            names |= units(f"decoder/level{level}", unit(f"{place}.1"), 1)
    return names


FAMILY = Family(
    name="monai_unet",
    title="MONAI: UNet, num_res_units 0 or more",
    signature=(
        r"model\.0\.(conv\.unit0\.)?conv\.weight",
        r"model\.1\.submodule\..+\.weight",
        r"model\.2\.(0\.)?conv\.weight",
    ),
    read=_read,
    names=_names,
    options={
        "strides": 2,
        "order": "cna",
        "act": "relu",
        "act_slope": None,
        "norm": None,
        "norm_groups": 8,
    },
)
