"""MONAI's DynUNet, with residual blocks and without.

``input_block``, ``downsamples``, ``bottleneck``, ``upsamples`` (coarsest first),
``output_block``, and under deep supervision ``deep_supervision_heads`` (the finest of
the coarse levels first). Every tensor but the head's is there once more inside
``skip_layers``, each level inside the one above it. The up-sampled map comes first. A
block of the decoder has the kernel of the level it comes from.
"""

import re
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
from unet_jax.types import InputError


def _depth(shapes: Shapes) -> int:
    nested = max(key.count(".next_layer") for key in shapes)
    return max(shapes.count(r"downsamples\.(\d+)\..+") + 1, nested)


def _canonical(key: str, depth: int) -> str:
    """The name outside ``skip_layers``."""
    match = re.fullmatch(r"skip_layers((?:\.next_layer)*)\.(.+)", key)
    if not match:
        return key
    level, rest = match[1].count(".next_layer"), match[2]
    kind, _, end = rest.partition(".")
    if kind == "downsample":
        return f"{_encoder(level, depth)}.{end}"
    if kind == "upsample":
        return f"upsamples.{depth - 1 - level}.{end}"
    if kind == "super_head":
        return f"deep_supervision_heads.{level - 1}.{end}"
    return f"bottleneck.{rest}"


def _aliases(key: str, layout: dict[str, Any]) -> tuple[str, ...]:
    depth = layout["depth"]

    def inside(level: int, rest: str) -> tuple[str, ...]:
        return (f"skip_layers{'.next_layer' * level}.{rest}",)

    kind, _, end = key.partition(".")
    if kind == "input_block":
        return inside(0, f"downsample.{end}")
    if kind == "bottleneck":
        return inside(depth, end)
    number, _, end = end.partition(".")
    if kind == "downsamples":
        return inside(int(number) + 1, f"downsample.{end}")
    if kind == "upsamples":
        return inside(depth - 1 - int(number), f"upsample.{end}")
    if kind == "deep_supervision_heads":
        return inside(int(number) + 1, f"super_head.{end}")
    return ()


def _encoder(level: int, depth: int) -> str:
    if level == 0:
        return "input_block"
    return "bottleneck" if level == depth else f"downsamples.{level - 1}"


def _read(shapes: Shapes, *, norm: str | None = None, **fields: Any) -> Net:
    depth = _depth(shapes)
    # A file without copies may have kept the inner names.
    shapes = Shapes({_canonical(key, depth): shape for key, shape in shapes.items()})
    levels = [_encoder(i, depth) for i in range(depth + 1)]
    ups = [f"upsamples.{depth - 1 - i}" for i in range(depth)]
    if "input_block.lrelu.weight" in shapes:
        raise InputError(
            "input_block.lrelu.weight is of an activation that is learnt and shared"
            " within a block, which no net here has."
        )
    kernels = [shapes.kernel(f"{name}.conv1.conv") for name in levels]
    strides = [shapes.kernel(f"{name}.transp_conv.conv") for name in ups]
    for name, kernel, stride in zip(levels[1:], kernels[1:], strides, strict=True):
        if any((k - s + 1) // 2 != k // 2 for k, s in zip(kernel, stride, strict=True)):
            raise InputError(
                f"{name}.conv1 has a kernel of {kernel} and a stride of {stride}, which"
                " DynUNet pads by less than half a kernel."
            )
    heads = shapes.count(r"deep_supervision_heads\.(\d+)\.conv\.conv\.weight")
    residual = any(f"{name}.conv3.conv.weight" in shapes for name in levels)
    found: dict[str, Any] = {
        "num_classes": shapes.out("output_block.conv.conv"),
        "features": tuple(shapes.out(f"{name}.conv2.conv") for name in levels),
        "decoder_features": tuple(
            shapes.out(f"{name}.conv_block.conv2.conv") for name in ups
        ),
        "block": "residual" if residual else "plain",
        "decoder_block": "plain",
        "down": "strided",
        "strides": shared(strides, 2),
        "up_bias": f"{ups[0]}.transp_conv.conv.bias" in shapes,
        "merge": "concat_up_first",
        "norm": norm_named(shapes, "input_block.norm1", norm),
        "conv_bias": "input_block.conv1.conv.bias" in shapes,
        "head_bias": "output_block.conv.conv.bias" in shapes,
        **kernels_of(
            kernels,
            [shapes.kernel(f"{name}.conv_block.conv1.conv") for name in ups],
        ),
        "act": "leaky_relu",
    }
    if heads:
        found |= {"deep_supervision": True, "heads": heads + 1}
    into = shapes.into("input_block.conv1.conv")
    return Net({**found, **fields}, into, len(kernels[0]), {"depth": depth})


def _names(model: UNet, rank: int, *, depth: int | None = None) -> Names:
    depth = model.depth
    names: dict[str, str] = {"head": "output_block.conv.conv"}
    names["head0"] = names["head"]

    def block(place: str) -> Any:
        ends = {"conv": ".conv", "norm": "", "act": ""}
        return lambda what, i: f"{place}.{what}{i + 1}{ends[what]}"

    for level in range(depth + 1):
        place = _encoder(level, depth)
        names |= units(f"encoder/level{level}", block(place))
        names[f"encoder/level{level}/shortcut"] = f"{place}.conv3.conv"
        names[f"encoder/level{level}/shortcut_norm"] = f"{place}.norm3"
    for level in range(depth):
        place = f"upsamples.{depth - 1 - level}"
        names |= units(f"decoder/level{level}", block(f"{place}.conv_block"))
        names[f"decoder/up{level}/conv"] = f"{place}.transp_conv.conv"
        head = f"deep_supervision_heads.{level}.conv.conv"
        names[f"head{level + 1}"] = head
    return names


FAMILY = Family(
    name="monai_dynunet",
    title="MONAI: DynUNet",
    signature=(
        r"(input_block|skip_layers\.downsample)\.conv1\.conv\.weight",
        r"(upsamples\.0|skip_layers.*\.upsample)\.transp_conv\.conv\.weight",
        r"output_block\.conv\.conv\.weight",
    ),
    read=_read,
    names=_names,
    aliases=_aliases,
    options={
        "act": "leaky_relu",
        "act_slope": 0.01,
        "norm": None,
        "norm_groups": 8,
    },
)
