"""Whether a checkpoint is one of a family: every tensor has its place, and no other.

A `Try` takes some tensors for a net and says what does not fit; `refusal` makes a
sentence of the best of several.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unet_jax import models
from unet_jax.models import UNet
from unet_jax.torch_weights.family import Family, Net, Shapes, listed
from unet_jax.torch_weights.tensors import FIRST, Names, Plan, plan
from unet_jax.types import InputError, NumpyArray

Stage = tuple[str, Mapping[str, NumpyArray], tuple[str, ...]]
"""A prefix, the tensors without it, and the names that do not begin with it."""

COUNTS = "num_batches_tracked"
_NOTHING_FITS = 10**6


class Try(NamedTuple):
    """A checkpoint taken for one of a family.

    Attributes:
        problem: What does not fit, or "".
        weight: How much does not fit.
        family: None for a table of names.
        model: The net.
        plan: Which tensor is which parameter.
        net: What the shapes said.
        tensors: By the names of the plan.
        dropped: Names of what the net does not need.
    """

    problem: str
    weight: int
    family: Family | None
    model: UNet | None = None
    plan: Plan | None = None
    net: Net | None = None
    tensors: Mapping[str, NumpyArray] | None = None
    dropped: tuple[str, ...] = ()


def take_as(
    family: Family,
    tensors: Mapping[str, NumpyArray],
    outside: tuple[str, ...],
    options: Mapping[str, Any],
) -> Try:
    """Takes tensors for those of a family.

    Args:
        family: The family.
        tensors: By their names, prefixes taken off.
        outside: Names of tensors that have not the prefix.
        options: Of the family, or fields of the net.
    """
    shapes = Shapes({k: v.shape for k, v in tensors.items() if not k.endswith(COUNTS)})
    try:
        net = family.read(shapes, **options)
        if net.rank not in (2, 3):
            problem = f"its images have {net.rank} axes, not 2 or 3"
            return Try(problem, _NOTHING_FITS, family)
        model = models.build("unet", **net.fields)
        names = family.names(model, net.rank, **net.layout)
        own = plan(model, names, channels=net.channels, rank=net.rank)
    except InputError as error:
        return Try(str(error).removesuffix("."), _NOTHING_FITS, family)
    except TypeError as error:
        problem = f"the options {sorted(options)} do not fit ({error})"
        return Try(problem, _NOTHING_FITS, family)
    return _checked(family, own, model, net, tensors, outside)


def by_names(
    tensors: Mapping[str, NumpyArray],
    outside: tuple[str, ...],
    names: Names,
    model: UNet,
) -> Try:
    """Takes tensors for those of a net in no family, by a table of one's own.

    Args:
        tensors: By their names, prefixes taken off.
        outside: Names of tensors that have not the prefix.
        names: The table.
        model: The net.
    """
    blocks = ("encoder", *(f"encoder/level{i}" for i in range(len(model.features))))
    first = [
        tensors[f"{names[path]}.weight"]
        for block in blocks
        for path in (f"{block}/{name}" for name in FIRST)
        if path in names and f"{names[path]}.weight" in tensors
    ]
    if not first or first[0].ndim < 4:
        problem = "the table does not lead to the first convolution of the encoder"
        return Try(problem, _NOTHING_FITS, None)
    channels, rank = first[0].shape[1], first[0].ndim - 2
    net = Net(models.fields(model), channels, rank, {"names": dict(names)})
    own = plan(model, names, channels=channels, rank=rank)
    return _checked(None, own, model, net, tensors, outside)


def _checked(
    family: Family | None,
    own: Plan,
    model: UNet,
    net: Net,
    tensors: Mapping[str, NumpyArray],
    outside: tuple[str, ...],
) -> Try:
    """Whether tensors and plan are one to one."""
    ignored = family.ignored if family else ""
    taken, missing, shaped, spare = dict[str, NumpyArray](), [], [], set(tensors)
    unlike = []
    for key, entry in own.items():
        others = family.aliases(key, net.layout) if family else ()
        copies = [name for name in (key, *others) if name in tensors]
        spare -= set(copies)
        if not copies:
            missing.append(key)
            continue
        value = taken[key] = tensors[copies[0]]
        if value.shape != entry.shape:
            shaped.append(f"{copies[0]} {value.shape} and not {entry.shape}")
        unlike += [k for k in copies[1:] if not _same(tensors[k], value)]
    counts = {key for key in spare if key.endswith(COUNTS)}
    extra = {key for key in spare if ignored and re.fullmatch(ignored, key)}
    unused = [key for key in tensors if key in spare - counts - extra]
    parts = [
        f"{what} {listed(found)}"
        for what, found in (
            ("it lacks", missing),
            ("it has no place for", unused),
            ("of another shape are", shaped),
            ("aliases that differ from what they repeat are", unlike),
        )
        if found
    ]
    weight = sum(map(len, (missing, unused, shaped, unlike)))
    dropped = (*(key for key in tensors if key in extra), *outside)
    named = {**tensors, **taken}  # also where the file has but an alias
    return Try("; ".join(parts), weight, family, model, own, net, named, dropped)


def _same(a: NumpyArray, b: NumpyArray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def refusal(
    where: str,
    family: str | None,
    tries: Sequence[Try],
    stages: Sequence[Stage],
    families: Mapping[str, Family],
) -> str:
    """The sentence for a checkpoint that nothing fits.

    Args:
        where: What it calls the checkpoint.
        family: The one that was asked for, or None.
        tries: What it was taken for.
        stages: Its tensors, with ever more prefixes taken off.
        families: All there are.
    """
    if tries:
        best = min(tries, key=lambda found: found.weight)
        name = f"a {best.family.name} net" if best.family else "the net of the table"
        return f"{where} does not hold {name}: {best.problem}."
    shapes = [
        Shapes({key: value.shape for key, value in stage.items()})
        for _, stage, _ in stages
    ]
    known = [f.name for f in families.values() if any(map(f.recognises, shapes))]
    if family is not None:
        hint = f"it looks like {listed(known)}" if known else "nor any other known"
        return (
            f"{where} is not of the family {family!r} ({hint}): its tensors are"
            f" {listed(list(stages[0][1]))}."
        )
    return (
        f"{where} is of no family that is known ({', '.join(families)}): its tensors"
        f" are {listed(list(stages[0][1]))}; give the net and a table of names"
        " (docs/torch.md)."
    )


# What a family's own code does not know of a net, or has for training only.
_OURS = {"dropout": 0.0, "dtype": "float32", "remat": 0, "kernel_init": "he_normal"}


def _operations(model: UNet, channels: int, rank: int) -> str:
    """What a net does in evaluation, as text: equal for equal nets."""
    # Both batch norms evaluate alike, in other operations.
    norm = "batch_unbiased" if model.norm == "batch" else model.norm
    model = model.clone(**_OURS, norm=norm)
    size = [1 + sum(pad) for pad in models.pads(model, (1,) * rank)]
    image = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        variables = jax.eval_shape(model.init, jax.random.key(0), image)
        return str(jax.make_jaxpr(model.apply)(variables, image))


def written_as(
    family: Family, model: UNet, tensors: Mapping[str, NumpyArray]
) -> tuple[str, dict[str, Any]]:
    """Whether the family's own code would make the same net of some tensors.

    Names and shapes can agree where nets do not: in the activation, the order of a
    concatenation, an interpolation. So what both do is traced and compared.

    Args:
        family: The family.
        model: The net.
        tensors: Its tensors, by the family's names.

    Returns:
        What differs, or ""; and the layout that the tensors have.
    """
    free = family.free or tuple(family.options)
    owned = models.fields(model)
    taken = take_as(family, tensors, (), {k: owned[k] for k in free if k in owned})
    if taken.problem or taken.net is None or taken.model is None:
        return taken.problem, {}
    channels, rank = taken.net.channels, taken.net.rank
    if _operations(model, channels, rank) == _operations(taken.model, channels, rank):
        return "", taken.net.layout
    theirs = models.fields(taken.model)
    odd = [k for k in owned if owned[k] != theirs[k] and k not in (*_OURS, "norm")]
    differ = [f"{k} = {owned[k]!r} and not {theirs[k]!r}" for k in odd]
    return f"of its fields {listed(differ)}", {}
