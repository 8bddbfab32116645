"""What a family of PyTorch nets is: how to recognise it, its net, its name table."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from unet_jax.torch_weights.tensors import Names
from unet_jax.types import InputError


class Net(NamedTuple):
    """What the shapes of a checkpoint say.

    Attributes:
        fields: Of `unet_jax.models.UNet`.
        channels: Of the image.
        rank: Spatial axes of the image.
        layout: What the name table needs to know beside the net; JSON-able.
    """

    fields: dict[str, Any]
    channels: int
    rank: int
    layout: dict[str, Any]


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by the tensor's name; one that is not there is a user's mistake."""

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise InputError(f"there is no tensor {key}, which this family always has.")

    def out(self, module: str) -> int:
        """Channels that come out of a convolution."""
        return self[f"{module}.weight"][0]

    def into(self, module: str) -> int:
        """Channels that go into a convolution."""
        return self[f"{module}.weight"][1]

    def kernel(self, module: str) -> tuple[int, ...]:
        """The kernel of a convolution, a number for each axis."""
        return self[f"{module}.weight"][2:]

    def has(self, pattern: str) -> bool:
        """Whether a pattern matches the whole name of some tensor."""
        return any(re.fullmatch(pattern, key) for key in self)

    def numbers(self, pattern: str) -> list[int]:
        """The whole numbers that the group of a pattern finds in names, sorted."""
        found = (re.fullmatch(pattern, key) for key in self)
        return sorted({int(match[1]) for match in found if match})

    def count(self, pattern: str) -> int:
        """How many numbers there are, which must be 0, 1, ... or 1, 2, ..."""
        return len(self.numbers(pattern))


@dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    Attributes:
        name: What `unet_jax.torch_weights.load` calls it.
        title: What a person calls it, and where it is from.
        signature: Patterns, each of which the whole name of some tensor matches.
        read: ``read(shapes, **options) -> Net``, from the shapes of all tensors.
        names: ``names(model, rank, **layout)``, the name table of a net of the family.
        options: What shapes do not say, and what is taken unless one is told.
        aliases: ``aliases(key, layout)``, the other names under which the family
            stores the same tensor.
        ignored: A pattern of tensors that do nothing.
        sigmoid: Whether its outputs are labels of their own, also of several classes.
    """

    name: str
    title: str
    signature: tuple[str, ...]
    read: Callable[..., Net]
    names: Callable[..., Names]
    options: Mapping[str, Any] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    aliases: Callable[[str, dict[str, Any]], tuple[str, ...]] = lambda key, layout: ()
    ignored: str = ""
    sigmoid: bool = False

    def recognises(self, shapes: Shapes) -> bool:
        """Whether the names look like it (the shapes are checked by reading)."""
        return all(shapes.has(pattern) for pattern in self.signature)


def units(ours: str, theirs: Callable[[str, int], str], count: int = 2) -> Names:
    """The names of a block's convolutions, norms and activations.

    Args:
        ours: Path of the block.
        theirs: ``theirs(what, i)``, the name of ``conv``, ``norm`` or ``act`` number i.
        count: How many units the block has.
    """
    return {
        f"{ours}/{what}{i}": theirs(what, i)
        for i in range(count)
        for what in ("conv", "norm", "act")
    }


def sequence(ours: str, prefix: str, places: Mapping[str, tuple[int, ...]]) -> Names:
    """Likewise of a ``Sequential``: ``places["conv"][i]`` is the i-th one's number."""
    return {
        f"{ours}/{what}{i}": f"{prefix}.{place}"
        for what, numbers in places.items()
        for i, place in enumerate(numbers)
    }


class Block(NamedTuple):
    """A ``Sequential`` of convolutions and norms, as found in a checkpoint.

    Attributes:
        prefix: Its name.
        conv: The places of its convolutions.
        norm: The places of its norms.
        widths: Channels that come out of each convolution.
        into: Channels that go in.
        kernel: Of the first convolution.
        bias: Whether convolutions own a bias.
        batch: Whether norms have running statistics.
    """

    prefix: str
    conv: tuple[int, ...]
    norm: tuple[int, ...]
    widths: tuple[int, ...]
    into: int
    kernel: tuple[int, ...]
    bias: bool
    batch: bool


def find_block(shapes: Shapes, inside: str, *, apart: str = "") -> Block:
    """The one ``Sequential`` of numbered convolutions below a name.

    Args:
        shapes: Of the checkpoint.
        inside: The name, such as ``down1``; or the beginning of the only one there is.
        apart: A pattern of names inside that do not belong to it.

    Raises:
        InputError: None there, or several.
    """
    places: dict[str, dict[int, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = re.fullmatch(rf"({re.escape(inside)}(?:\..+)?)\.(\d+)\.weight", key)
        if match and not (apart and re.fullmatch(apart, key)):
            places.setdefault(match[1], {})[int(match[2])] = shape
    if len(places) != 1:
        raise InputError(
            f"below {inside} there must be one Sequential of convolutions such as"
            f" {inside}.double_conv.0.weight, and there are {len(places)}:"
            f" {', '.join(sorted(places)) or 'none'}."
        )
    ((prefix, found),) = places.items()
    conv = tuple(sorted(i for i, shape in found.items() if len(shape) > 1))
    norm = tuple(sorted(i for i, shape in found.items() if len(shape) == 1))
    if not conv:
        raise InputError(f"there is no convolution in {prefix}.")
    return Block(
        prefix=prefix,
        conv=conv,
        norm=norm,
        widths=tuple(found[i][0] for i in conv),
        into=found[conv[0]][1],
        kernel=found[conv[0]][2:],
        bias=f"{prefix}.{conv[0]}.bias" in shapes,
        batch=bool(norm) and f"{prefix}.{norm[0]}.running_var" in shapes,
    )


def norm_of(block: Block) -> str:
    """The kind of norm that a block has, as a field of a net."""
    if not block.norm:
        return "none"
    return "batch_unbiased" if block.batch else "instance"


def shared(values: Sequence[Any], usual: Any) -> tuple[Any, ...]:
    """``()`` if all are the usual ones, else a value for each; a number for a cube."""
    values = tuple(v[0] if len(set(v)) == 1 else tuple(v) for v in values)
    return () if all(v == usual for v in values) else values


def up_features_of(
    widths: Sequence[int], levels: Sequence[int], given: Sequence[int]
) -> str | tuple[int, ...]:
    """The field of that name, in the plainest words that are right.

    Args:
        widths: Channels that come out of each up-convolution, finest first.
        levels: Of the decoder's levels.
        given: Channels that go into each up-convolution.
    """
    if tuple(widths) == tuple(levels):
        return "level"
    return "input" if tuple(widths) == tuple(given) else tuple(widths)


def norm_named(
    shapes: Shapes, name: str, told: str | None, *, absent: str = "instance_plain"
) -> str:
    """The kind of norm of that name, as a field of a net.

    Args:
        shapes: Of the checkpoint.
        name: Of one of its norms.
        told: What the user says, such as ``group``, whose names are those of
            ``instance``; or None.
        absent: What it is if it has no tensors; ``instance_plain`` has none, either.
    """
    if told is not None:
        return told
    if f"{name}.running_var" in shapes:
        return "batch_unbiased"
    return "instance" if f"{name}.weight" in shapes else absent


def act_named(
    shapes: Shapes, name: str, act: str, slope: float | None, usual: float | None = None
) -> dict[str, Any]:
    """The fields of a net for its activation.

    Args:
        shapes: Of the checkpoint.
        name: Of one of its activations; with a tensor, it is a PReLU.
        act: What it is otherwise.
        slope: Its slope as told, or None.
        usual: The family's slope of ``leaky_relu``, unless one is told.
    """
    if f"{name}.weight" in shapes:
        return {"act": "prelu", "act_slope": None}
    if act == "leaky_relu" and slope is None:
        slope = usual
    return {"act": act, "act_slope": slope}


def kernels_of(
    levels: Sequence[Sequence[int]], decoder: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The fields of a net for its kernel sizes.

    Args:
        levels: Of the encoder's levels, finest first.
        decoder: Of the decoder's.
    """
    fields = {"kernels": shared(levels, 3)}
    if list(map(tuple, decoder)) != list(map(tuple, levels[: len(decoder)])):
        fields["decoder_kernels"] = shared(decoder, None)
    return fields


def ways_up(
    shapes: Shapes, names: Sequence[str], levels: Sequence[int], up: str
) -> dict[str, Any]:
    """The fields of a net that say how it goes up: as up-convolutions in the file do.

    Args:
        shapes: Of the checkpoint.
        names: Of the up-convolutions, by the level they go to, finest first.
        levels: Channels of the decoder's levels.
        up: Where the file has no up-convolutions, the interpolation.

    Raises:
        InputError: An interpolation other than the usual one, which counts as not
            given, and up-convolutions in the file.
    """
    convs = [shape for name in names if (shape := shapes.get(f"{name}.weight"))]
    if len(convs) < len(names):
        return {"up": up}
    if up not in ("transpose", "bilinear_aligned"):
        raise InputError(
            f"up = {up!r} is for nets without up-convolutions, and the file has them:"
            " leave it out."
        )
    given, out = [conv[0] for conv in convs], [conv[1] for conv in convs]
    return {
        "up": "transpose",
        "up_features": up_features_of(out, levels, given),
        "up_bias": f"{names[0]}.bias" in shapes,
        "strides": shared([conv[2:] for conv in convs], 2),
    }


def listed(names: Iterable[str], *, most: int = 6) -> str:
    """Names in a sentence: all of a few, else the first and how many more."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
