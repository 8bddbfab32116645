"""wolny/pytorch-3dunet: UNet2D, UNet3D, ResidualUNet3D, ResidualUNetSE3D.

``encoders.K.basic_module`` goes down, ``decoders.K`` (coarsest first) up,
``final_conv`` is the head. Plain nets have ``SingleConv1`` and ``SingleConv2``,
interpolate to the size of the skip, which comes first; residual nets have a projection
``conv1`` and units ``conv2`` and ``conv3``, a transposed convolution, and add the skip.
The order of convolution and norm is read from the norms' widths, but not where the
activation stands, and which: ``layer_order`` says it in the letters of that library (by
default ``gcr``, ``cgr``, ``bcr``, ``cbr`` or ``cr``). Logits, without the sigmoid.
"""

from collections.abc import Sequence
from typing import Any

from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, kernels_of, units
from unet_jax.torch_weights.tensors import Linear, Names
from unet_jax.types import InputError, choose

_NORMS = {"g": "groupnorm", "b": "batchnorm"}
_ACTS = {"r": ("relu", None), "l": ("leaky_relu", 0.01), "e": ("elu", None)}
_UPS = {
    "default": "nearest",
    "nearest": "nearest",
    "bilinear": "bilinear",
    "trilinear": "bilinear",
}
_TRANSPOSED = "upsampling.upsample.conv_transposed"
_OLD_TRANSPOSED = "upsampling.upsample"  # before 1.8.2


def _order(shapes: Shapes, names: Sequence[str], told: str | None) -> str:
    """The letters c, g or b, and r, l or e, in order."""
    kind = next(
        (k for k, n in _NORMS.items() if f"{names[0]}.{n}.weight" in shapes), ""
    )
    if told is not None:
        letters = "".join(c for c in told if c not in "dD")
        found = "".join(c for c in letters if c in "gb")
        acts = "".join(c for c in letters if c in _ACTS)
        if sorted(letters) != sorted("c" + kind + acts) or len(acts) != 1:
            raise InputError(
                f"layer_order = {told!r} must have c, one of r, l and e, and"
                f" {kind or 'neither g nor b'}, as the net has"
                f" {_NORMS[kind] if kind else 'no norms'}"
                + (f", and not {found}." if found != kind else ".")
            )
        return letters
    if not kind:
        return "cr"
    for name in names:
        (width,) = shapes[f"{name}.{_NORMS[kind]}.weight"]
        if shapes.into(f"{name}.conv") != shapes.out(f"{name}.conv"):
            before = width == shapes.into(f"{name}.conv")
            return f"{kind}cr" if before else f"c{kind}r"
    return f"{kind}cr" if kind == "g" else f"c{kind}r"


def _read(
    shapes: Shapes,
    *,
    layer_order: str | None = None,
    num_groups: int = 8,
    upsample: str = "default",
    **fields: Any,
) -> Net:
    depth = shapes.count(r"decoders\.(\d+)\.basic_module\..+\.weight")
    residual = "encoders.0.basic_module.conv2.conv.weight" in shapes
    if "encoders.0.basic_module.conv1.conv.weight" in shapes:
        raise InputError(
            "encoders.0.basic_module.conv1.conv.weight is of a residual net of before"
            " version 1.5 of pytorch-3dunet, whose first unit is another one."
        )
    parts = ("conv2", "conv3") if residual else ("SingleConv1", "SingleConv2")
    levels = [f"encoders.{i}.basic_module" for i in range(depth + 1)]
    ups = [f"decoders.{depth - 1 - i}" for i in range(depth)]
    blocks = [f"{name}.basic_module" for name in ups]
    features = tuple(shapes.out(f"{name}.{parts[1]}.conv") for name in levels)
    every = [f"{name}.{part}" for name in (*levels, *blocks) for part in parts]
    order = _order(shapes, every, layer_order)
    act, slope = next(_ACTS[letter] for letter in order if letter in _ACTS)
    plain = "".join({"g": "n", "b": "n", "c": "c"}.get(letter, "a") for letter in order)
    norm = next((letter for letter in order if letter in _NORMS), "")
    found: dict[str, Any] = {
        "num_classes": shapes.out("final_conv"),
        "features": features,
        "decoder_features": tuple(shapes.out(f"{n}.{parts[1]}.conv") for n in blocks),
        "up": choose(_UPS, upsample, "upsample ="),
        "fit": "resize",
        "norm": {"g": "group", "b": "batch_unbiased", "": "none"}[norm],
        "norm_groups": num_groups,
        "order": plain if norm else plain + "n",
        "act": act,
        "act_slope": slope,
        "conv_bias": f"{levels[0]}.{parts[0]}.conv.bias" in shapes,
        **kernels_of(
            [shapes.kernel(f"{name}.{parts[0]}.conv") for name in levels],
            [shapes.kernel(f"{name}.{parts[0]}.conv") for name in blocks],
        ),
    }
    if f"{ups[0]}.{_TRANSPOSED}.weight" in shapes:
        found |= {"up": "transpose_wide_short", "up_bias": False}
    elif f"{ups[0]}.{_OLD_TRANSPOSED}.weight" in shapes:
        found |= {"up": "transpose_wide", "fit": "zeros"}
        found["up_bias"] = f"{ups[0]}.{_OLD_TRANSPOSED}.bias" in shapes
    if residual:
        leaky = "residual_projected_leaky" if "l" in order else "residual_projected"
        found |= {"block": leaky, "merge": "sum"}
        if shapes.has(r"encoders\.0\.basic_module\.se_module\..+"):
            found["excite"] = "scse_max"
        first = f"{levels[0]}.conv1"
        if f"{first}.weight" not in shapes:  # as many channels as the image has
            first = f"{levels[0]}.conv2.conv"
    else:
        inner = [shapes.out(f"{name}.SingleConv1.conv") for name in levels]
        if inner != list(features):
            found |= {"block": "widening_from", "decoder_block": "plain"}
        first = f"{levels[0]}.SingleConv1.conv"
    return Net({**found, **fields}, shapes.into(first), len(shapes.kernel(first)), {})


def _names(model: UNet, rank: int) -> Names:
    depth, names = model.depth, dict[str, str]({"head": "final_conv"})
    residual = str(model.block).startswith("residual_projected")
    norm = "batchnorm" if model.norm.startswith("batch") else "groupnorm"
    parts = {"conv": "conv", "norm": norm, "act": "act"}
    up = _OLD_TRANSPOSED if model.up == "transpose_wide" else _TRANSPOSED

    def block(ours: str, place: str) -> Names:
        unit = "conv{}" if residual else "SingleConv{}"
        first = 2 if residual else 1
        found = dict(
            units(
                ours,
                lambda what, i: f"{place}.{unit.format(i + first)}.{parts[what]}",
            )
        )
        gate = f"{place}.se_module"
        return found | {
            f"{ours}/project": f"{place}.conv1",
            f"{ours}/excite/channel/squeeze": Linear(f"{gate}.cSE.fc1"),
            f"{ours}/excite/channel/excite": Linear(f"{gate}.cSE.fc2"),
            f"{ours}/excite/spatial": f"{gate}.sSE.conv",
        }

    for level in range(depth + 1):
        names |= block(f"encoder/level{level}", f"encoders.{level}.basic_module")
    for level in range(depth):
        place = f"decoders.{depth - 1 - level}"
        names |= block(f"decoder/level{level}", f"{place}.basic_module")
        names[f"decoder/up{level}/conv"] = f"{place}.{up}"
    return names


FAMILY = Family(
    name="pytorch3dunet",
    title="wolny/pytorch-3dunet: UNet2D, UNet3D, ResidualUNet3D, ResidualUNetSE3D",
    signature=(
        r"encoders\.0\.basic_module\..+\.weight",
        r"decoders\.0\.basic_module\..+\.weight",
        r"final_conv\.weight",
    ),
    read=_read,
    names=_names,
    options={
        "layer_order": None,
        "num_groups": 8,
        "upsample": "default",
    },
    free=("act", "act_slope", "block", "order", "up", "norm_groups"),
    sigmoid=True,
)
