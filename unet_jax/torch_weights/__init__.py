"""PyTorch checkpoints of the U-Net family: in with the same numbers, and out again.

    model, variables = torch_weights.load("unet.pth")
    logits, aux = model.apply(variables, image)  # image [B, H, W, C]
    torch_weights.save("back.safetensors", model, variables, "milesial")

No PyTorch is needed and nothing in a file is executed (`containers`). `FAMILIES` has
one entry for each kind of net; docs/torch.md lists them with what was verified.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import models
from unet_jax.models import UNet
from unet_jax.torch_weights import (
    blog_valid,
    containers,
    jvanvugt,
    leejunhyun,
    mateuszbuda,
    milesial,
    monai_attentionunet,
    monai_basicunet,
    monai_basicunetpp,
    monai_dynunet,
    monai_unet,
    nested,
    nnunet_unetpp,
    nnunet_v1,
    nnunet_v2,
    pytorch3dunet,
    smp,
    tutorial_unetpp,
    usuyama,
)
from unet_jax.torch_weights.family import Family, Net, Shapes, listed
from unet_jax.torch_weights.tensors import (
    Linear,
    Names,
    Plan,
    counters,
    image_of,
    plan,
    to_tensors,
    to_variables,
)
from unet_jax.torch_weights.writing import write
from unet_jax.types import InputError, NumpyArray, PyTree, choose

__all__ = ["FAMILIES", "Imported", "Linear", "load", "read", "save"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        milesial.FAMILY,
        tutorial_unetpp.FAMILY,
        blog_valid.FAMILY,
        nested.FAMILY,
        mateuszbuda.FAMILY,
        jvanvugt.FAMILY,
        usuyama.FAMILY,
        leejunhyun.FAMILY,
        smp.FAMILY,
        monai_basicunet.FAMILY,
        monai_basicunetpp.FAMILY,
        monai_attentionunet.FAMILY,
        monai_unet.FAMILY,
        monai_dynunet.FAMILY,
        nnunet_v1.FAMILY,
        nnunet_unetpp.FAMILY,
        nnunet_v2.FAMILY,
        pytorch3dunet.FAMILY,
    )
}


class Imported(NamedTuple):
    """A checkpoint, read.

    Attributes:
        model: The net.
        variables: What ``model.apply`` takes.
        family: Its name in `FAMILIES`, or "" for a table of one's own.
        layout: What `save` needs to write the same names again.
        channels: Of the image.
        rank: Spatial axes of the image.
        dtype: The tensors' own, such as ``float16``; the variables are float32.
        dropped: Names of what the file has and the net does not need.
        plan: Which tensor is which parameter.
        tensors: As stored, by the names that the net's own code has for them.
    """

    model: UNet
    variables: dict[str, Any]
    family: str
    layout: dict[str, Any]
    channels: int
    rank: int
    dtype: str
    dropped: tuple[str, ...]
    plan: Plan
    tensors: Mapping[str, NumpyArray]


def load(
    weights: str | os.PathLike[str] | Mapping[str, Any],
    family: str | None = None,
    *,
    model: UNet | None = None,
    names: Names | None = None,
    **options: Any,
) -> tuple[UNet, dict[str, Any]]:
    """A PyTorch checkpoint as a net and its variables.

    Args:
        weights: A file (``.pth``, ``.pt``, ``.ckpt``, ``.safetensors``), or a state
            dict in memory, of arrays or of tensors.
        family: A name of `FAMILIES`; None to recognise it by its names and shapes.
        model: Of a net that is in no family: the same net here.
        names: And its name table: path of each of our modules ->  name of theirs,
            ``{"encoder/level0/conv0": "down.0.conv", ...}``; ``Linear(name)`` for a
            ``torch.nn.Linear``.
        **options: What the file does not say: of the family (``FAMILIES[name].options``
            has them with their defaults), or any field of the net to change.

    Returns:
        ``(model, variables)``; variables are float32, or float64 with ``dtype =
        "float64"`` among the options (under ``jax.enable_x64``).

    Raises:
        InputError: The file cannot be read, is of another family, or has tensors too
            many, too few or of other shapes: names them.
    """
    found = read(weights, family, model=model, names=names, **options)
    return found.model, found.variables


def read(
    weights: str | os.PathLike[str] | Mapping[str, Any],
    family: str | None = None,
    *,
    model: UNet | None = None,
    names: Names | None = None,
    **options: Any,
) -> Imported:
    """As `load`, with everything that is known about the checkpoint."""
    if isinstance(weights, Mapping):
        where, dropped = "the state dict", ()
        tensors = {key: _array(value) for key, value in weights.items()}
    else:
        where = os.fspath(weights)
        tensors, dropped = containers.read(weights)
    if (names is None) != (model is None):
        raise InputError("names and model go together: give both, or neither.")
    if family is not None:
        family = family.replace("-", "_")
        choose(FAMILIES, family, "family =")
    stages = list(containers.unwrapped(tensors))
    tries: list[_Try] = []
    for _, stage, outside in stages:
        if names is not None and model is not None:
            tries.append(_by_names(stage, outside, names, model, where))
            continue
        shapes = Shapes({key: value.shape for key, value in stage.items()})
        for candidate in FAMILIES.values():
            if family in (None, candidate.name) and candidate.recognises(shapes):
                tries.append(_try(candidate, shapes, stage, outside, options))
    good = [found for found in tries if not found.problem]
    if not good:
        raise InputError(_refusal(where, family, tries, stages))
    kinds = {found.family.name for found in good if found.family}
    if len(kinds) > 1:
        raise InputError(
            f"{where} could be of the families {listed(sorted(kinds))}: say which"
            " (family=, --family=)."
        )
    return _imported(good[0], dropped)


class _Try(NamedTuple):
    """A checkpoint taken for one of a family."""

    problem: str
    weight: int  # how much does not fit
    family: Family | None
    model: UNet | None = None
    plan: Plan | None = None
    net: Net | None = None
    tensors: Mapping[str, NumpyArray] | None = None
    dropped: tuple[str, ...] = ()


def _array(value: Any) -> NumpyArray:
    """An array of what a state dict in memory may hold."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds it
            return np.asarray(value.float()).astype(jnp.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def _try(
    family: Family,
    shapes: Shapes,
    tensors: Mapping[str, NumpyArray],
    outside: tuple[str, ...],
    options: Mapping[str, Any],
) -> _Try:
    ignored = family.ignored
    kept = Shapes(
        {
            key: shape
            for key, shape in shapes.items()
            if not key.endswith("num_batches_tracked")
        }
    )
    try:
        net = family.read(kept, **options)
        if net.rank not in (2, 3):
            return _Try(f"its images have {net.rank} axes, not 2 or 3", 10**6, family)
        model = models.build("unet", **net.fields)
        names = family.names(model, net.rank, **net.layout)
        own = plan(model, names, channels=net.channels, rank=net.rank)
    except InputError as error:
        return _Try(str(error), 10**6, family)
    except TypeError as error:
        return _Try(
            f"the options {sorted(options)} do not fit: {error}.", 10**6, family
        )
    return _checked(family, own, model, net, tensors, outside, ignored)


def _by_names(
    tensors: Mapping[str, NumpyArray],
    outside: tuple[str, ...],
    names: Names,
    model: UNet,
    where: str,
) -> _Try:
    """A net in no family, by a table of the user's own."""
    weights = [(p, tensors.get(f"{n}.weight")) for p, n in names.items()]
    first = [
        value
        for path, value in weights
        if value is not None and value.ndim > 3 and path.startswith("encoder/")
    ]
    if not first:
        return _Try(
            "none of the names leads to a convolution of the encoder", 10**6, None
        )
    channels, rank = first[0].shape[1], first[0].ndim - 2
    net = Net(models.fields(model), channels, rank, {"names": dict(names)})
    own = plan(model, names, channels=channels, rank=rank)
    return _checked(None, own, model, net, tensors, outside, "")


def _checked(
    family: Family | None,
    own: Plan,
    model: UNet,
    net: Net,
    tensors: Mapping[str, NumpyArray],
    outside: tuple[str, ...],
    ignored: str,
) -> _Try:
    """Whether tensors and plan are one to one."""
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
    counts = {key for key in spare if key.endswith("num_batches_tracked")}
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
    return _Try("; ".join(parts), weight, family, model, own, net, named, dropped)


def _same(a: NumpyArray, b: NumpyArray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _refusal(
    where: str,
    family: str | None,
    tries: list[_Try],
    stages: list[Any],
) -> str:
    """The sentence for a checkpoint that nothing fits."""
    if tries:
        best = min(tries, key=lambda found: found.weight)
        name = f"a {best.family.name} net" if best.family else "the net of the table"
        return f"{where} does not hold {name}: {best.problem}."
    shapes = [
        Shapes({key: value.shape for key, value in stage.items()})
        for _, stage, _ in stages
    ]
    known = [f.name for f in FAMILIES.values() if any(map(f.recognises, shapes))]
    if family is not None:
        hint = f"it looks like {listed(known)}" if known else "nor any other known"
        return (
            f"{where} is not of the family {family!r} ({hint}): its tensors are"
            f" {listed(list(stages[0][1]))}."
        )
    return (
        f"{where} is of no family that is known ({', '.join(FAMILIES)}): its tensors"
        f" are {listed(list(stages[0][1]))}; give the net and a table of names"
        " (docs/torch.md)."
    )


def _imported(found: _Try, dropped: tuple[str, ...]) -> Imported:
    assert found.net and found.model and found.plan and found.tensors is not None
    dtypes = {found.tensors[key].dtype.name for key in found.plan}
    return Imported(
        model=found.model,
        variables=to_variables(
            found.plan,
            found.tensors,
            np.float64 if found.model.dtype == "float64" else np.float32,
        ),
        family=found.family.name if found.family else "",
        layout=found.net.layout,
        channels=found.net.channels,
        rank=found.net.rank,
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        dropped=(*dropped, *found.dropped),
        plan=found.plan,
        tensors=found.tensors,
    )


def save(
    path: str | os.PathLike[str],
    model: UNet,
    variables: PyTree,
    family: str = "",
    *,
    names: Names | None = None,
    dtype: str | None = None,
    **layout: Any,
) -> list[str]:
    """Writes a net for PyTorch; the inverse of `load`.

    The file holds what ``module.load_state_dict`` of the family's own code takes:
    aliases are repeated, and each batch norm has a ``num_batches_tracked`` of 0.

    Args:
        path: ``.safetensors``; or ``.pth`` and ``.pt``, which needs PyTorch.
        model: A net of the family.
        variables: Its variables.
        family: A name of `FAMILIES`.
        names: Instead: a name table of one's own.
        dtype: Of the tensors: ``float32``, ``float16``, ``bfloat16``, ``float64``; None
            for that of the variables.
        **layout: What `Imported` calls so, for names other than the family's newest.

    Returns:
        The names of the tensors.

    Raises:
        InputError: A net that the family has not, or a kind of file that is not known.
    """
    tensors = state_dict(model, variables, family, names=names, dtype=dtype, **layout)
    write(path, tensors)
    return list(tensors)


def state_dict(
    model: UNet,
    variables: PyTree,
    family: str = "",
    *,
    names: Names | None = None,
    dtype: str | None = None,
    **layout: Any,
) -> dict[str, NumpyArray]:
    """The tensors that `save` writes, as arrays; see there."""
    channels, rank = image_of(model, variables)
    found = None
    if names is None:
        found = choose(FAMILIES, family.replace("-", "_"), "family =")
        names = found.names(model, rank, **layout)
    own = plan(model, names, channels=channels, rank=rank)
    _check_owned(own, variables)
    kind = None if dtype is None else jnp.dtype(dtype)
    tensors = to_tensors(own, variables, kind)
    if found is not None:
        # A net that the family could not have written would be read as another one.
        shapes = Shapes({k: v.shape for k, v in tensors.items()})
        again = _try(found, shapes, tensors, (), {})
        if again.problem or again.weight:
            raise InputError(
                f"this net is none of the family {found.name!r}: {again.problem}."
            )
        assert again.net
        whole = again.net.layout | layout
        for key in list(tensors):
            tensors |= dict.fromkeys(found.aliases(key, whole), tensors[key])
    return tensors


def _check_owned(own: Plan, variables: PyTree) -> None:
    """Refuses variables that are not the net's."""
    owned = {
        tuple(str(part.key) for part in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    needed = {entry.path for entry in own.values()}
    if needed != set(owned):
        odd = ["/".join(path) for path in sorted(needed ^ set(owned))]
        raise InputError(f"the variables are not those of the net: see {listed(odd)}.")
