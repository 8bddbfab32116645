"""What no run can be: configs, crops and meshes that are refused before it begins."""

import math
import operator
from typing import Any

import jax

from unet_jax import models, sharding
from unet_jax.data import trust
from unet_jax.types import InputError, Shape, size_text

BELOW_1 = math.nextafter(1, 0)
ABOVE_0 = math.nextafter(0, 1)

# (section, key, least, most, what it must be)
_RANGES: tuple[tuple[str, str, float, float, str], ...] = (
    ("", "seed", 0, 2**63 - 1, "0 or more, and below 2^63"),
    *(
        ("train", key, 0, math.inf, "0 or more")
        for key in ("log_every", "eval_every", "save_every", "patience", "alarm")
    ),
    ("train", "threads", 0, math.inf, "0 or more: 0 is one a core"),
    ("train", "memory_gb", 0, 2**40, "0 or more: 0 is what the device says"),
    ("train", "foreground", 0, 1, "from 0 to 1, a part of the crops"),
    ("train", "ema", 0, BELOW_1, "from 0 to below 1: 0 is no average"),
    ("train", "threshold", ABOVE_0, BELOW_1, "above 0 and below 1: use 0.5"),
    ("plateau", "factor", ABOVE_0, BELOW_1, "above 0 and below 1: use 0.5"),
    ("plateau", "patience", 0, math.inf, "0 or more"),
)


def check(config: dict[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Refuses what cannot work, before any data is read."""
    train = config["train"]
    _check_ranges(config)
    _check_resize(config["data"].get("resize", ()))
    for name in ("steps", "batch_size", "accumulate", "eval_batch_size"):
        if train[name] < 1:
            raise InputError(f"train.{name} = {train[name]} must be 1 or more.")
    _check_calls(train)
    if config.get("mesh", {}).get("pmap", False):
        _check_pmap(config, mesh)
    if not train["crop"] or min(train["crop"]) < 1:
        raise InputError(
            f"train.crop = {train['crop']} must be a size of 1 or more an axis."
        )
    if train["batch_size"] % train["accumulate"]:
        raise InputError(
            f"train.accumulate = {train['accumulate']} does not divide"
            f" train.batch_size = {train['batch_size']}: use a divisor of it."
        )
    sharding.check_batch(
        mesh, train["batch_size"], "train.batch_size", times=train["accumulate"]
    )
    for key, value in (("over", "batch"), ("normalise", "weights")):
        if train["accumulate"] > 1 and config["loss"].get(key) == value:
            raise InputError(
                f"loss.{key} = {value!r} needs the whole batch at once, and"
                f" train.accumulate = {train['accumulate']} splits it: use"
                f" train.accumulate=1 or leave out loss.{key}."
            )


def _check_ranges(config: dict[str, Any]) -> None:
    """Refuses numbers that mean nothing where they stand."""
    for section, key, low, high, what in _RANGES:
        value = (config.get(section, {}) if section else config).get(key)
        if value is not None and not low <= value <= high:
            name = f"{section}.{key}" if section else key
            raise InputError(f"{name} = {value} must be {what}.")


def _check_resize(shape: Shape) -> None:
    """Refuses images that no memory holds."""
    size = 4 * math.prod(shape) / 2**30
    if any(n < 1 for n in shape) or size * 2**30 > trust.memory() * trust.MOST:
        raise InputError(
            f"data.resize = {tuple(shape)} makes images of {size:.3g} GB a channel:"
            " give a size of 1 or more an axis that fits the memory, or () for none."
        )


def _check_calls(train: dict[str, Any]) -> None:
    """Refuses steps to a call between which something else is due."""
    steps = train.get("steps_per_call", 1)
    if steps < 1:
        raise InputError(f"train.steps_per_call = {steps} must be 1 or more.")
    for name in ("steps", "log_every", "eval_every", "save_every"):
        if steps > 1 and train[name] % steps:
            nearest = max(train[name] // steps, 1) * steps
            raise InputError(
                f"train.steps_per_call = {steps} does not divide train.{name} ="
                f" {train[name]}: use {name}={nearest}, or other steps_per_call."
            )


def _check_pmap(config: dict[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Refuses what the pmap twin does not do."""
    mesh_config, train = config["mesh"], config["train"]
    loss = config["loss"]
    found = {
        f"mesh.space = {mesh.shape['space']}": mesh.shape["space"] > 1,
        "mesh.fsdp = True": mesh_config.get("fsdp", False),
        "train.steps_per_call > 1": train.get("steps_per_call", 1) > 1,
        "loss.over = 'batch'": loss.get("over") == "batch",
        "loss.normalise = 'weights'": loss.get("normalise") == "weights",
        f"{jax.process_count()} processes": jax.process_count() > 1,
    }
    for what, there in found.items():
        if there:
            raise InputError(
                f"mesh.pmap = True does not go with {what}: leave out mesh.pmap, the"
                " same step under jit does all that pmap does."
            )


def check_space(model: models.UNet, crop: Shape, mesh: jax.sharding.Mesh) -> None:
    """Refuses parts of an image that a net cannot work on."""
    space = mesh.shape["space"]
    if space == 1:
        return
    rows, step = crop[0], models.axis(model, 0, len(crop)).step
    step *= models.coarsest_rows(model)
    most = rows // step
    if space > most:
        raise InputError(
            f"mesh.space = {space} is too much for train.crop = {crop}: with this net a"
            f" device needs {step} rows, one at the coarsest level or a few; use"
            f" mesh.space={max(most, 1)} or less, or a crop of at least {space * step}."
        )
    if model.padding == "valid":
        other = models.fitting_rows(model, rows + -rows % space, len(crop))
        if other == rows:
            return
        raise InputError(
            f"train.crop = {crop} does not divide over mesh.space = {space}: use"
            f" {other} for its first axis."
        )
    if rows % (space * step):
        nearest = max(rows // (space * step), 1) * space * step
        raise InputError(
            f"train.crop = {crop} does not divide over mesh.space = {space} into parts"
            f" of a multiple of {step} rows, which this net needs: use {nearest} or"
            f" {nearest + space * step} for its first axis."
        )


def check_depth(model: models.UNet, crop: Shape) -> None:
    """Refuses a net that would halve a crop to nothing."""
    steps = tuple(axis.step for axis in models.axes(model, len(crop)))
    if model.padding != "valid" and any(map(operator.lt, crop, steps)):
        raise InputError(
            f"train.crop = {crop} is too small for a net of {model.depth + 1} levels,"
            f" whose coarsest map is {size_text(steps)} times smaller: use a crop of"
            f" at least {steps}, or fewer levels (model.features)."
        )
