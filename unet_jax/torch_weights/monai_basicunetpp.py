"""MONAI's BasicUNetPlusPlus.

``conv_I_0`` is the encoder, ``upcat_I_J`` node ``X[I, J]``, ``final_conv_0_J`` the head
of ``X[0, J]``; all heads are always there. What the net answers without deep
supervision is the last head's: ``aux["heads"][-1]``, or the logits of
``model.clone(level=model.depth)`` with the same variables.
"""

from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes
from unet_jax.torch_weights.monai_basicunet import (
    OPTIONS,
    shared_fields,
    two_convs,
    upsampling,
)
from unet_jax.torch_weights.tensors import Names


def _encoder(level: int) -> str:
    return "conv_0_0" if level == 0 else f"conv_{level}_0.convs"


def _read(
    shapes: Shapes,
    *,
    act: str = "leaky_relu",
    act_slope: float | None = None,
    norm: str | None = None,
    **fields: Any,
) -> Net:
    depth = max(shapes.numbers(r"conv_(\d+)_0\..+\.weight"))
    found = shared_fields(
        shapes,
        [_encoder(i) for i in range(depth + 1)],
        [f"upcat_{i}_1" for i in range(depth)],
        act=act,
        act_slope=act_slope,
        norm=norm,
    )
    last = [f"upcat_{i}_{depth - i}.convs.conv_1.conv" for i in range(depth)]
    found |= {
        "num_classes": shapes.out("final_conv_0_1"),
        "decoder_features": tuple(shapes.out(name) for name in last),
        "decoder": "unetpp",
        "deep_supervision": True,
    }
    first = "conv_0_0.conv_0.conv"
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    depth = len(model.features) - 1
    names: dict[str, str] = {}
    for row in range(depth + 1):
        names |= two_convs(f"encoder/level{row}", _encoder(row))
        names[f"head{row}"] = f"final_conv_0_{row}"
        for column in range(1, depth + 1 - row):
            node = f"upcat_{row}_{column}"
            names |= two_convs(f"decoder/node{row}_{column}", f"{node}.convs")
            names[f"decoder/up{row}_{column}/conv"] = f"{node}.{upsampling(model)}"
    return names


FAMILY = Family(
    name="monai_basicunetpp",
    title="MONAI: BasicUNetPlusPlus",
    signature=(
        r"conv_0_0\.conv_0\.conv\.weight",
        r"upcat_0_1\.convs\.conv_0\.conv\.weight",
        r"final_conv_0_1\.weight",
    ),
    read=_read,
    names=_names,
    options=OPTIONS,
)
