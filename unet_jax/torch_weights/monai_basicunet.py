"""MONAI's BasicUNet.

``conv_0``, ``down_1`` to ``down_N``, ``upcat_N`` (the coarsest) to ``upcat_1``,
``final_conv``; two convolutions in each. The up-sampling to the full size keeps its
channels, the others halve them; a missing last row repeats the one before it; the skip
comes first. Which of the three up-samplings it is the names say.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import (
    Family,
    Net,
    Shapes,
    act_named,
    kernels_of,
    norm_named,
    shared,
    units,
)
from unet_jax.torch_weights.tensors import Names

_PARTS = {"conv": "conv", "norm": "adn.N", "act": "adn.A"}
_UPS = {
    "transpose": "deconv",
    "pixel_shuffle_blurred": "pixelshuffle.conv_block",
    "dense_bilinear_aligned": "preconv",
}


def two_convs(ours: str, theirs: str) -> Names:
    """The names of a block (MONAI's ``TwoConv``)."""
    return units(ours, lambda what, i: f"{theirs}.conv_{i}.{_PARTS[what]}")


def upsampling(model: UNet) -> str:
    """What the learnt part of ``UpSample`` is called."""
    return f"upsample.{_UPS.get(str(model.up), 'deconv')}"


def shared_fields(
    shapes: Shapes,
    levels: Sequence[str],
    ups: Sequence[str],
    *,
    act: str,
    act_slope: float | None,
    norm: str | None,
) -> dict[str, Any]:
    """What BasicUNet and BasicUNetPlusPlus have in common.

    Args:
        shapes: Of the checkpoint.
        levels: The blocks of the encoder, finest first.
        ups: The ``UpCat`` that go from the encoder's next level to each.
        act: The activation, unless it has tensors.
        act_slope: Its slope, or None for MONAI's 0.1.
        norm: The norm as told, or None.
    """
    features = tuple(shapes.out(f"{level}.conv_1.conv") for level in levels)
    fields: dict[str, Any] = {
        "features": features,
        # What is not of the skip is of the up-sampled map.
        "up_features": tuple(
            shapes.into(f"{up}.convs.conv_0.conv") - features[level]
            for level, up in enumerate(ups)
        ),
        "fit": "edge",
        "norm": norm_named(shapes, f"{levels[0]}.conv_0.adn.N", norm),
        "conv_bias": f"{levels[0]}.conv_0.conv.bias" in shapes,
    }
    fields |= act_named(shapes, f"{levels[0]}.conv_0.adn.A", act, act_slope, 0.1)
    fields |= kernels_of(
        [shapes.kernel(f"{level}.conv_0.conv") for level in levels],
        [shapes.kernel(f"{up}.convs.conv_0.conv") for up in ups],
    )
    found = {
        up: name
        for up, name in _UPS.items()
        if any(f"{place}.upsample.{name}.weight" in shapes for place in ups)
    }
    # With as many channels out as in, an interpolation has no tensors at all.
    fields["up"] = next(iter(found), "dense_bilinear_aligned")
    if fields["up"] == "transpose":
        names = [f"{up}.upsample.deconv" for up in ups]
        fields["strides"] = shared([shapes.kernel(name) for name in names], 2)
        fields["up_bias"] = f"{names[0]}.bias" in shapes
    return fields


def _read(
    shapes: Shapes,
    *,
    act: str = "leaky_relu",
    act_slope: float | None = None,
    norm: str | None = None,
    **fields: Any,
) -> Net:
    depth = shapes.count(r"down_(\d+)\.convs\.conv_0\.conv\.weight")
    levels = ["conv_0", *(f"down_{i}.convs" for i in range(1, depth + 1))]
    ups = [f"upcat_{i}" for i in range(1, depth + 1)]
    found = shared_fields(shapes, levels, ups, act=act, act_slope=act_slope, norm=norm)
    found["num_classes"] = shapes.out("final_conv")
    found["decoder_features"] = tuple(
        shapes.out(f"{up}.convs.conv_1.conv") for up in ups
    )
    first = "conv_0.conv_0.conv"
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    names: dict[str, str] = {"head": "final_conv"}
    names |= two_convs("encoder/level0", "conv_0")
    for level in range(model.depth):
        number = level + 1
        names |= two_convs(f"encoder/level{number}", f"down_{number}.convs")
        names |= two_convs(f"decoder/level{level}", f"upcat_{number}.convs")
        names[f"decoder/up{level}/conv"] = f"upcat_{number}.{upsampling(model)}"
    return names


OPTIONS: Mapping[str, Any] = {
    "act": "leaky_relu",
    "act_slope": 0.1,
    "norm": None,
    "norm_groups": 8,
}

FAMILY = Family(
    name="monai_basicunet",
    title="MONAI: BasicUNet",
    signature=(
        r"conv_0\.conv_0\.conv\.weight",
        r"down_1\.convs\.conv_0\.conv\.weight",
        r"upcat_1\.convs\.conv_0\.conv\.weight",
    ),
    read=_read,
    names=_names,
    options=OPTIONS,
)
