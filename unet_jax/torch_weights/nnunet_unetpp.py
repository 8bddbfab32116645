"""MrGiovanni/UNetPlusPlus, pytorch: UNet++ inside nnU-Net v1.

``conv_blocks_context`` is the encoder; ``locZ`` and ``upZ`` hold the nodes ``X[i, j]``
with ``i + j = depth - Z``, by column: ``loc0`` goes deepest. ``seg_outputs.0`` is the
head of the last column, and so on. The net answers heads in that order: they are
``aux["heads"]`` reversed. What it answers without deep supervision is the last head's:
``aux["heads"][-1]``, or the logits of ``model.clone(level=model.depth)``.
"""

from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, units
from unet_jax.torch_weights.nnunet_v1 import (
    context,
    context_names,
    generic_fields,
    stacked,
    stacks,
)
from unet_jax.torch_weights.tensors import Names


def _read(shapes: Shapes, **fields: Any) -> Net:
    depth = shapes.count(r"loc(\d+)\..+\.weight")
    # Column 1 of each row; of the others only the first convolution is wider.
    rows = [stacks(shapes, f"loc{depth - 1 - row}.0") for row in range(depth)]
    ups = [f"up{depth - 1 - row}.0" for row in range(depth)]
    found = generic_fields(shapes, rows, ups)
    found["decoder"] = "unetpp"
    first = f"{context(0)}.blocks.0.conv"
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    depth = len(model.features) - 1
    names = dict(context_names(model))
    for row in range(depth):
        count = model.decoder_units[row] if model.decoder_units else 2
        names[f"head{row + 1}"] = f"seg_outputs.{depth - 1 - row}"
        for column in range(1, depth + 1 - row):
            place = f"{depth - row - column}.{column - 1}"
            names |= units(
                f"decoder/node{row}_{column}",
                stacked(f"loc{place}", count, split=True),
                count,
            )
            names[f"decoder/up{row}_{column}/conv"] = f"up{place}"
    return names


FAMILY = Family(
    name="nnunet_unetpp",
    title="MrGiovanni/UNetPlusPlus, pytorch: Generic_UNetPlusPlus",
    signature=(
        r"conv_blocks_context\.0\.blocks\.0\.conv\.weight",
        r"loc0\.0\.1\.blocks\.0\.conv\.weight",
        r"up0\.0\.weight",
        r"seg_outputs\.0\.weight",
    ),
    read=_read,
    names=_names,
    options={"act": "leaky_relu", "act_slope": 0.01},
)
