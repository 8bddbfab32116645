"""milesial/Pytorch-UNet, all its layouts, and the tutorials' copies of it.

``inc``, ``down1`` to ``downN``, ``up1`` (the coarsest) to ``upN``, ``outc``; each a
``Sequential`` of convolutions and batch norms under some name: ``inc.conv.conv.0``
(2018), ``inc.double_conv.0`` (since 2019). The names do not say which net it is: with
or without biases, and how wide the coarsest level and the up-convolutions are, is read
from the shapes. Odd sizes are filled up with zeros, the skip comes first.
"""

import re
from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import (
    Family,
    Net,
    Shapes,
    find_block,
    norm_of,
    sequence,
    shared,
    ways_up,
)
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError

_HEAD = r"(outc|outc\..+|out_conv|final_conv)\.weight"


def _read(
    shapes: Shapes,
    *,
    up: str = "bilinear_aligned",
    merge: str = "concat",
    **fields: Any,
) -> Net:
    depth = max(shapes.count(r"down(\d+)\..+\.weight"), 1)
    first = find_block(shapes, "inc")
    downs = [find_block(shapes, f"down{i}") for i in range(1, depth + 1)]
    apart = r"up\d+\.up(\..+)?\.weight"
    # up1 goes to the coarsest of the decoder's levels: finest first from here on.
    ups = [find_block(shapes, f"up{depth - i}", apart=apart) for i in range(depth)]
    heads = [key for key in shapes if re.fullmatch(_HEAD, key)]
    if len(heads) != 1:
        raise InputError(f"there must be one head outc, and there are {heads}.")
    head = heads[0].removesuffix(".weight")
    features = (first.widths[-1], *(down.widths[-1] for down in downs))
    widths = tuple(block.widths[-1] for block in ups)
    own = ways_up(shapes, [f"up{depth - i}.up" for i in range(depth)], widths, up)
    if any(block.widths[0] != block.widths[-1] for block in ups):
        own["decoder_block"] = "narrowing"
    layout = {
        "inc": first.prefix,
        "down": downs[0].prefix.replace("down1", "down{}", 1),
        "up": ups[-1].prefix.replace("up1", "up{}", 1),
        "head": head,
        "conv": first.conv,
        "norm": first.norm,
    }
    return Net(
        {
            "num_classes": shapes.out(head),
            "features": features,
            "decoder_features": widths,
            "merge": merge,
            "norm": norm_of(first),
            "conv_bias": first.bias,
            "kernels": shared([b.kernel for b in (first, *downs)], 3),
            "head_kernel": shapes.kernel(head)[0],
            **own,
            **fields,
        },
        first.into,
        len(first.kernel),
        layout,
    )


def _names(
    model: UNet,
    rank: int,
    *,
    inc: str = "inc.double_conv",
    down: str = "down{}.maxpool_conv.1.double_conv",
    up: str = "up{}.conv.double_conv",
    head: str = "outc.conv",
    conv: tuple[int, ...] = (0, 3),
    norm: tuple[int, ...] = (1, 4),
) -> Names:
    depth = model.depth
    places = {"conv": tuple(conv), "norm": tuple(norm)}
    names = {"head": head, **sequence("encoder/level0", inc, places)}
    for i in range(1, depth + 1):
        names |= sequence(f"encoder/level{i}", down.format(i), places)
    for level in range(depth):
        number = depth - level
        names[f"decoder/up{level}/conv"] = f"up{number}.up"
        names |= sequence(f"decoder/level{level}", up.format(number), places)
    return names


FAMILY = Family(
    name="milesial",
    title="milesial/Pytorch-UNet (2018 to now) and copies of it",
    signature=(r"inc\..+\.0\.weight", r"down1\..+\.0\.weight", r"up1\..+\.0\.weight"),
    read=_read,
    names=_names,
    options={
        "up": "bilinear_aligned",
        "merge": "concat",
        "padding": "same",
        "act": "relu",
    },
)
