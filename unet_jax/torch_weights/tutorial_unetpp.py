"""UNet++ in the style of milesial's U-Net, as tutorials write it.

An encoder ``inc``, ``down1`` ... and nodes ``x{i}_{j}`` (row of resolution, column)
below some module, each with an ``up`` and a ``conv.double_conv``; heads ``outc.x0_{j}``
for deep supervision. The up-sampled map comes first, then the row's earlier nodes.
"""

import re
from collections.abc import Mapping

from unet_jax.models import UNet
from unet_jax.torch_weights.family import (
    Family,
    Net,
    Shapes,
    find_block,
    norm_of,
    sequence,
    ways_up,
)
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError

_NODE = r"((?:.+\.)?x(\d+)_(\d+))\.conv\..+\.weight"
_HEAD = r"(outc.*?x0_(\d+)(?:\..+)?)\.weight"


def _read(
    shapes: Shapes,
    *,
    up: str = "bilinear_aligned",
    merge: str = "concat_up_first",
    **fields: object,
) -> Net:
    depth = shapes.count(r"down(\d+)\..+\.weight")
    first = find_block(shapes, "inc")
    downs = [find_block(shapes, f"down{i}") for i in range(1, depth + 1)]
    found = (re.fullmatch(_NODE, key) for key in shapes)
    nodes = {f"{m[2]}_{m[3]}": m[1] for m in found if m}
    wanted = {f"{i}_{j}" for j in range(1, depth + 1) for i in range(depth + 1 - j)}
    if set(nodes) != wanted:
        odd = ", ".join(f"x{name}" for name in sorted(set(nodes) ^ wanted))
        raise InputError(f"the nodes {odd} are missing or too many for {depth} downs.")
    blocks = {
        name: find_block(shapes, prefix, apart=re.escape(prefix) + r"\.up.*")
        for name, prefix in nodes.items()
    }
    features = (first.widths[-1], *(down.widths[-1] for down in downs))
    last = tuple(blocks[f"{i}_{depth - i}"].widths[-1] for i in range(depth))
    ups = [f"{nodes[f'{i}_{depth - i}']}.up" for i in range(depth)]
    own = ways_up(shapes, ups, last, up)
    if any(block.widths[0] != block.widths[-1] for block in blocks.values()):
        own["decoder_block"] = "narrowing"
    heads = {m[2]: m[1] for key in shapes if (m := re.fullmatch(_HEAD, key))}
    bare = [key for key in shapes if re.fullmatch(r"outc(\..+)?\.weight", key)]
    if not heads and bare:
        heads = {"": bare[0].removesuffix(".weight")}
    head = next(iter(heads.values()), "outc.x0_1")
    place = nodes["0_1"]
    layout = {
        "inc": first.prefix,
        "down": downs[0].prefix.replace("down1", "down{}", 1),
        "nodes": nodes,
        "conv_in": blocks["0_1"].prefix.removeprefix(place),
        "heads": heads,
        "conv": first.conv,
        "norm": first.norm,
    }
    return Net(
        {
            "num_classes": shapes.out(head),
            "features": features,
            "decoder_features": last,
            "decoder": "unetpp",
            "deep_supervision": len(heads) > 1,
            "merge": merge,
            "norm": norm_of(first),
            "conv_bias": first.bias,
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
    nodes: Mapping[str, str] | None = None,
    conv_in: str = ".conv.double_conv",
    heads: Mapping[str, str] | None = None,
    conv: tuple[int, ...] = (0, 3),
    norm: tuple[int, ...] = (1, 4),
) -> Names:
    depth = model.depth
    places = {"conv": tuple(conv), "norm": tuple(norm)}
    if heads is None:
        heads = {str(j): f"outc.x0_{j}" for j in range(1, depth + 1)}
    names = {f"head{j}": name for j, name in heads.items()}
    names["head"] = list(heads.values())[-1]
    names |= sequence("encoder/level0", inc, places)
    for row in range(depth + 1):
        if row:
            names |= sequence(f"encoder/level{row}", down.format(row), places)
        for column in range(1, depth + 1 - row):
            name = f"{row}_{column}"
            prefix = nodes[name] if nodes else f"up1.x{name}"
            names[f"decoder/up{name}/conv"] = f"{prefix}.up"
            names |= sequence(f"decoder/node{name}", f"{prefix}{conv_in}", places)
    return names


FAMILY = Family(
    name="tutorial_unetpp",
    title="UNet++ of tutorials, x{i}_{j} beside inc, down1, ...",
    signature=(
        r"inc\..+\.0\.weight",
        r"down1\..+\.0\.weight",
        r"(.+\.)?x0_1\.conv\..+",
    ),
    read=_read,
    names=_names,
    options={"up": "bilinear_aligned", "merge": "concat_up_first", "act": "relu"},
)
