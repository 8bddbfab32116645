"""nnU-Net v2 (dynamic-network-architectures): PlainConvUNet and ResidualEncoderUNet.

``encoder.stages`` goes down; ``decoder.transpconvs``, ``decoder.stages`` and
``decoder.seg_layers`` (coarsest first, all always there) go up. Every convolution and
norm is there once more as ``all_modules.N`` of its unit, and the whole encoder as
``decoder.encoder``. The up-sampled map comes first.
"""

import math
import re
from typing import Any

from unet_jax.layers import per_axis
from unet_jax.models import UNet
from unet_jax.torch_weights.family import (
    Family,
    Net,
    Shapes,
    kernels_of,
    norm_named,
    shared,
    units,
)
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError

_UNIT = r"(.+)\.all_modules\.(\d+)\.(\w+)"


def _canonical(key: str) -> str:
    """The name outside ``decoder.encoder`` and ``all_modules``."""
    if key.startswith("decoder.encoder."):
        key = key.removeprefix("decoder.")
    match = re.fullmatch(_UNIT, key)
    if not match:
        return key
    return f"{match[1]}.{'norm' if int(match[2]) else 'conv'}.{match[3]}"


def _aliases(key: str, layout: dict[str, Any]) -> tuple[str, ...]:
    match = re.fullmatch(r"(.+)\.(conv|norm)\.(\w+)", key)
    found = [key]
    if match:
        place = layout.get("norm_place", 1) if match[2] == "norm" else 0
        found.append(f"{match[1]}.all_modules.{place}.{match[3]}")
    if key.startswith("encoder."):
        found += [f"decoder.{name}" for name in found]
    return tuple(found[1:])


def _stage(shapes: Shapes, level: int) -> str:
    """The name of a level's convolutions: after a pooling it is the second part."""
    places = shapes.numbers(rf"encoder\.stages\.{level}\.(\d+)\.convs\.0\.conv\.weight")
    return f"encoder.stages.{level}.{places[0] if places else 0}"


def _read(shapes: Shapes, *, norm: str | None = None, **fields: Any) -> Net:
    # Where the norm stands in a unit: after the convolution, unless there is a dropout.
    norms = {
        int(match[2])
        for key, shape in shapes.items()
        if (match := re.fullmatch(_UNIT, key)) and len(shape) == 1 and match[2] != "0"
    }
    # A file without copies may have kept any of a tensor's names.
    shapes = Shapes({_canonical(key): shape for key, shape in shapes.items()})
    depth = shapes.count(r"decoder\.transpconvs\.(\d+)\.weight")
    residual = shapes.has(r"encoder\.stages\.0\.blocks\..+")
    ups = [f"decoder.transpconvs.{depth - 1 - level}" for level in range(depth)]
    blocks = [f"decoder.stages.{depth - 1 - level}" for level in range(depth)]
    found: dict[str, Any] = {"down": "strided"}
    if residual:
        for key in shapes:
            if ".conv3." in key or ".squeeze_excitation." in key:
                raise InputError(
                    f"{key} is of bottleneck blocks or of squeeze and excitation, which"
                    " no ResidualEncoderUNet here has."
                )
        levels = [f"encoder.stages.{level}" for level in range(depth + 1)]
        counts = [
            shapes.count(rf"{re.escape(name)}\.blocks\.(\d+)\.conv1\.conv\.weight")
            for name in levels
        ]
        firsts = [f"{name}.blocks.0.conv1" for name in levels]
        lasts = [f"{name}.blocks.0.conv2" for name in levels]
        found |= {"block": "residual_stage", "decoder_block": "plain"}
        first = "encoder.stem.convs.0"
    else:
        levels = [_stage(shapes, level) for level in range(depth + 1)]
        counts = [
            shapes.count(rf"{re.escape(name)}\.convs\.(\d+)\.conv\.weight")
            for name in levels
        ]
        firsts = [f"{name}.convs.0" for name in levels]
        lasts = [f"{n}.convs.{c - 1}" for n, c in zip(levels, counts, strict=True)]
        first = firsts[0]
        if not all(name.endswith(".0") for name in levels):
            found["down"] = "max"
    beside = [
        shapes.count(rf"{re.escape(name)}\.convs\.(\d+)\.conv\.weight")
        for name in blocks
    ]
    found |= {
        "num_classes": shapes.out("decoder.seg_layers.0"),
        "features": tuple(shapes.out(f"{name}.conv") for name in lasts),
        "decoder_features": tuple(
            shapes.out(f"{n}.convs.{c - 1}.conv")
            for n, c in zip(blocks, beside, strict=True)
        ),
        "units": tuple(counts),
        "decoder_units": tuple(beside),
        "strides": shared([shapes.kernel(name) for name in ups], 2),
        "up_bias": f"{ups[0]}.bias" in shapes,
        "merge": "concat_up_first",
        "norm": norm_named(shapes, f"{first}.norm", norm, absent="none"),
        "conv_bias": f"{first}.conv.bias" in shapes,
        "act": "leaky_relu",
        "head_bias": "decoder.seg_layers.0.bias" in shapes,
        "deep_supervision": True,
        **kernels_of(
            [shapes.kernel(f"{name}.conv") for name in firsts],
            [shapes.kernel(f"{name}.convs.0.conv") for name in blocks],
        ),
    }
    layout = {"norm_place": norms.pop()} if len(norms) == 1 else {}
    channels, rank = shapes.into(f"{first}.conv"), len(shapes.kernel(f"{first}.conv"))
    return Net({**found, **fields}, channels, rank, layout)


def _names(model: UNet, rank: int, *, norm_place: int = 1) -> Names:
    depth = model.depth
    names: dict[str, str] = {}
    strides = [per_axis(s, rank, "model.strides") for s in model.strides]
    strides = [(1,) * rank, *(strides or [(2,) * rank] * depth)]
    residual = model.block == "residual_stage"
    parts = {"conv": "conv", "norm": "norm", "act": "nonlin"}

    def block(place: str) -> Any:
        return lambda what, i: f"{place}.convs.{i}.{parts[what]}"

    for level in range(depth + 1):
        strided = math.prod(strides[level]) > 1
        place, ours = f"encoder.stages.{level}", f"encoder/level{level}"
        count = model.units[level] if model.units else 1 if residual else 2
        if not residual:
            place += ".1" if model.down != "strided" and strided else ".0"
            names |= units(ours, block(place), count)
            continue
        for i in range(count):
            unit, theirs = f"{ours}/unit{i}", f"{place}.blocks.{i}"
            names |= units(
                unit,
                lambda what, j, theirs=theirs: f"{theirs}.conv{j + 1}.{parts[what]}",
            )
            skip = f"{theirs}.skip.{int(strided and i == 0)}"
            names[f"{unit}/shortcut"] = f"{skip}.conv"
            names[f"{unit}/shortcut_norm"] = f"{skip}.norm"
    for what, theirs in parts.items():
        names[f"encoder/level0/{what}_stem"] = f"encoder.stem.convs.0.{theirs}"
    for level in range(depth):
        number = depth - 1 - level
        count = model.decoder_units[level] if model.decoder_units else 2
        place = f"decoder.stages.{number}"
        names |= units(f"decoder/level{level}", block(place), count)
        names[f"decoder/up{level}/conv"] = f"decoder.transpconvs.{number}"
        names[f"head{level}"] = f"decoder.seg_layers.{number}"
    return names


FAMILY = Family(
    name="nnunet_v2",
    title="nnU-Net v2 (dynamic-network-architectures): PlainConvUNet,"
    " ResidualEncoderUNet",
    signature=(
        r"(decoder\.)?encoder\.stages\.0\.(\d+\.convs|blocks)\.0\..+\.weight",
        r"decoder\.stages\.0\.convs\.0\..+\.weight",
        r"decoder\.transpconvs\.0\.weight",
        r"decoder\.seg_layers\.0\.weight",
    ),
    read=_read,
    names=_names,
    aliases=_aliases,
    options={"act": "leaky_relu", "act_slope": 0.01, "norm": None},
)
