"""nnU-Net v1 (MIC-DKFZ/nnUNet before 2023): Generic_UNet.

``conv_blocks_context`` goes down, ``tu`` and ``conv_blocks_localization`` up (coarsest
first), ``seg_outputs`` are heads (coarsest first, all always there). The coarsest block
and those of the decoder are two stacks, of which the second has one convolution. The
skip comes second. A block of the decoder has the kernel of the level it comes from.
"""

import re
from collections.abc import Sequence
from typing import Any

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

_PARTS = {"conv": "conv", "norm": "instnorm", "act": "lrelu"}


def stacks(shapes: Shapes, place: str) -> list[str]:
    """The names of the units of a block, in order: one stack, or two.

    Args:
        shapes: Of the checkpoint.
        place: The block's name.
    """
    ends = [
        match[1]
        for key in shapes
        if (
            match := re.fullmatch(
                rf"{re.escape(place)}((\.\d+)?\.blocks\.\d+)\..+", key
            )
        )
    ]
    order = sorted(set(ends), key=lambda end: [int(n) for n in re.findall(r"\d+", end)])
    return [place + end for end in order]


def stacked(place: str, count: int, *, split: bool) -> Any:
    """The names of a block's parts, as a function of kind and number.

    Args:
        place: The block's name.
        count: How many convolutions it has.
        split: Whether it is two stacks, the second of one convolution.
    """

    def theirs(what: str, i: int) -> str:
        end = f"blocks.{i}"
        if split:
            end = "1.blocks.0" if i == count - 1 else f"0.{end}"
        return f"{place}.{end}.{_PARTS[what]}"

    return theirs


def context(level: int) -> str:
    """The name of a level's block in the encoder."""
    return f"conv_blocks_context.{level}"


def generic_fields(
    shapes: Shapes, decoder: Sequence[Sequence[str]], ups: Sequence[str]
) -> dict[str, Any]:
    """What the Generic_UNet and its UNet++ have in common.

    Args:
        shapes: Of the checkpoint.
        decoder: The units of the decoder's blocks, finest first.
        ups: The up-convolutions to each level.
    """
    levels = [stacks(shapes, context(i)) for i in range(len(decoder) + 1)]
    first = levels[0][0]
    return {
        "num_classes": shapes.out("seg_outputs.0"),
        "features": tuple(shapes.out(f"{level[-1]}.conv") for level in levels),
        "decoder_features": tuple(shapes.out(f"{b[-1]}.conv") for b in decoder),
        "units": tuple(len(level) for level in levels),
        "decoder_units": tuple(len(block) for block in decoder),
        "down": "strided",
        "strides": shared([shapes.kernel(up) for up in ups], 2),
        "up_bias": f"{ups[0]}.bias" in shapes,
        "norm": norm_named(shapes, f"{first}.instnorm", None),
        "conv_bias": f"{first}.conv.bias" in shapes,
        "act": "leaky_relu",
        "head_bias": "seg_outputs.0.bias" in shapes,
        "deep_supervision": True,
        **kernels_of(
            [shapes.kernel(f"{level[0]}.conv") for level in levels],
            [shapes.kernel(f"{block[0]}.conv") for block in decoder],
        ),
    }


def context_names(model: UNet) -> Names:
    """The names of the encoder."""
    deepest = len(model.features) - 1
    names: dict[str, str] = {}
    for level in range(deepest + 1):
        count = model.units[level] if model.units else 2
        theirs = stacked(context(level), count, split=level == deepest)
        names |= units(f"encoder/level{level}", theirs, count)
    return names


def _read(shapes: Shapes, **fields: Any) -> Net:
    depth = shapes.count(r"tu\.(\d+)\.weight")
    coarse_first = [
        stacks(shapes, f"conv_blocks_localization.{u}") for u in range(depth)
    ]
    ups = [f"tu.{depth - 1 - level}" for level in range(depth)]
    found = generic_fields(shapes, coarse_first[::-1], ups)
    found["merge"] = "concat_up_first"
    first = f"{context(0)}.blocks.0.conv"
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    depth = model.depth
    names = dict(context_names(model))
    for level in range(depth):
        number = depth - 1 - level
        count = model.decoder_units[level] if model.decoder_units else 2
        place = f"conv_blocks_localization.{number}"
        names |= units(
            f"decoder/level{level}", stacked(place, count, split=True), count
        )
        names[f"decoder/up{level}/conv"] = f"tu.{number}"
        names[f"head{level}"] = f"seg_outputs.{number}"
    return names


FAMILY = Family(
    name="nnunet_v1",
    title="MIC-DKFZ/nnUNet v1: Generic_UNet",
    signature=(
        r"conv_blocks_context\.0\.blocks\.0\.conv\.weight",
        r"conv_blocks_localization\.0\.1\.blocks\.0\.conv\.weight",
        r"tu\.0\.weight",
        r"seg_outputs\.0\.weight",
    ),
    read=_read,
    names=_names,
    options={"act": "leaky_relu", "act_slope": 0.01},
)
