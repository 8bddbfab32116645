"""4uiiurz1/pytorch-nested-unet: U-Net, UNet++ with and without deep supervision.

``convI_J`` is node ``X[I, J]`` (row of resolution, column); the plain U-Net has but
``X[3, 1]``, ``X[2, 2]``, ``X[1, 3]`` and ``X[0, 4]`` of them. Bilinear up-sampling with
aligned corners, no up-convolution.
"""

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, units
from unet_jax.torch_weights.tensors import Names


def _read(shapes: Shapes, **fields: object) -> Net:
    depth = max(shapes.numbers(r"conv(\d+)_0\.conv1\.weight"))
    nested = "conv0_1.conv1.weight" in shapes and depth > 1
    supervised = "final1.weight" in shapes
    features = tuple(shapes.out(f"conv{i}_0.conv2") for i in range(depth + 1))
    first = "conv0_0.conv1"
    found = {
        "num_classes": shapes.out("final1" if supervised else "final"),
        "features": features,
        "decoder": "unetpp" if nested else "unet",
        "deep_supervision": supervised,
        "up": "bilinear_aligned",
        "norm": "batch_unbiased",
        "conv_bias": f"{first}.bias" in shapes,
    }
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    depth, names = model.depth, {"head": "final"}

    def node(ours: str, row: int, column: int) -> Names:
        kinds = {"conv": "conv", "norm": "bn"}
        return units(
            ours,
            lambda what, i: f"conv{row}_{column}.{kinds.get(what, what)}{i + 1}",
        )

    for row in range(depth + 1):
        names |= node(f"encoder/level{row}", row, 0)
        names[f"head{row}"] = f"final{row}"
        names |= node(f"decoder/level{row}", row, depth - row)
        for column in range(1, depth + 1 - row):
            names |= node(f"decoder/node{row}_{column}", row, column)
    return names


FAMILY = Family(
    name="nested",
    title="4uiiurz1/pytorch-nested-unet: UNet, NestedUNet",
    signature=(r"conv0_0\.conv1\.weight", r"conv1_0\.bn2\.weight", r"final1?\.weight"),
    read=_read,
    names=_names,
    options={"padding": "same"},
)
