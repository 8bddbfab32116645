"""MONAI's AttentionUnet.

``model.0`` is the first level, ``model.2`` the head and ``model.1`` all between, each
level inside the one above it: ``submodule.0`` goes down, ``submodule.1`` holds the
next. Gates at the size of the skip, one convolution with instance norm and PReLU after
the merge. What the shapes do not say are the strides.
"""

from collections.abc import Sequence
from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, kernels_of, units
from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError


def _level(level: int, depth: int) -> str:
    """The name of a level's convolutions: the coarsest has nothing below it."""
    if level == 0:
        return "model.0"
    return f"{_layer(level - 1)}.submodule" + (".0" if level < depth else "")


def _layer(level: int) -> str:
    """The name of what goes down from a level, up again, and merges."""
    return "model.1" + ".submodule.1" * level


def _read(
    shapes: Shapes, *, strides: int | Sequence[int | Sequence[int]] = 2, **fields: Any
) -> Net:
    depth = sum(key.endswith(".merge.conv.weight") for key in shapes)
    if any(key.endswith(".conv.2.conv.weight") for key in shapes):
        raise InputError("it has blocks of other than two convolutions.")
    convs = [f"{_level(i, depth)}.conv.0.conv" for i in range(depth + 1)]
    ups = [f"{_layer(i)}.upconv.up.conv" for i in range(depth)]
    found: dict[str, Any] = {
        "num_classes": shapes.out("model.2.conv"),
        "features": tuple(shapes.out(name) for name in convs),
        "down": "strided",
        "strides": (strides,) * depth if isinstance(strides, int) else strides,
        "up": "transpose_wide_unit",
        "up_bias": f"{ups[0]}.bias" in shapes,
        "merge": "gated_full",
        "decoder_block": "single_instance_prelu",
        "norm": "batch_unbiased",
        "conv_bias": f"{convs[0]}.bias" in shapes,
        **kernels_of(
            [shapes.kernel(name) for name in convs],
            [shapes.kernel(name) for name in ups],
        ),
    }
    return Net(
        {**found, **fields}, shapes.into(convs[0]), len(shapes.kernel(convs[0])), {}
    )


def _names(model: UNet, rank: int) -> Names:
    depth = model.depth
    names: dict[str, str] = {"head": "model.2.conv"}
    parts = {"conv": "conv", "norm": "adn.N", "act": "adn.A"}
    gates = {"theta": "W_x", "phi": "W_g", "psi": "psi"}
    for level in range(depth + 1):
        place = f"{_level(level, depth)}.conv"
        names |= units(
            f"encoder/level{level}",
            lambda what, i, place=place: f"{place}.{i}.{parts[what]}",
        )
    for level in range(depth):
        place = _layer(level)
        for what, theirs in parts.items():
            names[f"decoder/up{level}/{what}"] = f"{place}.upconv.up.{theirs}"
            names[f"decoder/level{level}/{what}0"] = f"{place}.merge.{theirs}"
        for ours, theirs in gates.items():
            gate = f"decoder/merge{level}/gate0/{ours}"
            names[gate] = f"{place}.attention.{theirs}.0.conv"
            names[f"{gate}_norm"] = f"{place}.attention.{theirs}.1"
    return names


FAMILY = Family(
    name="monai_attentionunet",
    title="MONAI: AttentionUnet",
    signature=(
        r"model\.0\.conv\.0\.conv\.weight",
        r"model\.1\.attention\.W_g\.0\.conv\.weight",
        r"model\.1\.upconv\.up\.conv\.weight",
    ),
    read=_read,
    names=_names,
    options={"strides": 2},
)
