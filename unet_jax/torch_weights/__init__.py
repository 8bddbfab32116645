"""PyTorch checkpoints of the U-Net family: in with the same numbers, and out again.

    model, variables = torch_weights.load("unet.pth")
    logits, aux = model.apply(variables, image)  # image [B, H, W, C]
    torch_weights.save("back.safetensors", model, variables, "milesial")

No PyTorch is needed and nothing in a file is executed (`containers`). `FAMILIES` has
one entry for each kind of net; docs/torch.md lists them with what was verified.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
from unet_jax.torch_weights.family import Family, Shapes, listed
from unet_jax.torch_weights.matching import (
    Try,
    by_names,
    refusal,
    take_as,
    written_as,
)
from unet_jax.torch_weights.tensors import (
    Linear,
    Nameless,
    Names,
    Plan,
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
    tries: list[Try] = []
    for _, stage, outside in stages:
        if names is not None and model is not None:
            tries.append(by_names(stage, outside, names, model))
            continue
        shapes = Shapes({key: value.shape for key, value in stage.items()})
        for candidate in FAMILIES.values():
            if family in (None, candidate.name) and candidate.recognises(shapes):
                tries.append(take_as(candidate, stage, outside, options))
    good = [found for found in tries if not found.problem]
    if not good:
        raise InputError(refusal(where, family, tries, stages, FAMILIES))
    kinds = {found.family.name for found in good if found.family}
    if len(kinds) > 1:
        raise InputError(
            f"{where} could be of the families {listed(sorted(kinds))}: say which"
            " (family=, --family=)."
        )
    return _imported(good[0], dropped)


def _array(value: Any) -> NumpyArray:
    """An array of what a state dict in memory may hold."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds it
            return np.asarray(value.float()).astype(jnp.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def _imported(found: Try, dropped: tuple[str, ...]) -> Imported:
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
    try:
        own = plan(model, names or {}, channels=channels, rank=rank)
    except Nameless as error:
        if found is None:
            raise
        raise InputError(
            f"this net is none of the family {found.name!r}, whose nets have no"
            f" {listed(error.modules)}."
        ) from error
    _check_owned(own, variables)
    kind = None if dtype is None else jnp.dtype(dtype)
    tensors = to_tensors(own, variables, kind)
    if found is not None:
        problem, whole = written_as(found, model, tensors)
        if problem:
            raise InputError(
                f"this net is none of the family {found.name!r}: {problem}."
            )
        for key in list(tensors):
            tensors |= dict.fromkeys(found.aliases(key, whole | layout), tensors[key])
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
