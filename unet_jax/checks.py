"""What no net can have: a sentence for each field that is of no use as it is.

`check` is asked before a net is built or run. It reads the fields of a
`unet_jax.models.UNet` and knows the tables of parts; no array is touched.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from unet_jax.blocks import BLOCKS, EXCITES
from unet_jax.bottlenecks import BOTTLENECKS
from unet_jax.decoders import DECODERS, FITS
from unet_jax.encoders import ENCODERS
from unet_jax.layers import INITIALISERS, PADDINGS, act_factory
from unet_jax.merges import MERGES
from unet_jax.norms import norm_factory
from unet_jax.resample import DOWNS, UPS
from unet_jax.types import InputError, choose


def chosen(table: Mapping[str, Any], value: Any, field: str) -> Any:
    """A part by its name, or the part itself.

    Args:
        table: What there is, by name.
        value: A name, or a factory.
        field: Of the net, for the sentence.

    Raises:
        InputError: No part of that name.
    """
    return choose(table, value, f"model.{field} =") if isinstance(value, str) else value


def class_of(factory: Any) -> Any:
    """The module that a factory makes."""
    while isinstance(factory, partial):
        factory = factory.func
    return factory


def has_field(factory: Any, field: str) -> bool:
    """Whether what a factory makes has a field."""
    return field in getattr(class_of(factory), "__dataclass_fields__", {})


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wholes(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_whole, value))


def _sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(_whole(n) or _wholes(n) for n in value)


def _part(value: Any) -> bool:
    return isinstance(value, str) or callable(value)


_NUMBERS = "a tuple with a whole number for each level"
_PART = "the name of a part, or a part"
# What a value must be at all, before anything is done with it.
_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("num_classes", lambda n: _whole(n) and n > 0, "a whole number above 0: 2"),
    ("features", lambda n: isinstance(n, tuple), f"{_NUMBERS}: (16, 32, 64)"),
    ("decoder_features", lambda n: n is None or _wholes(n), f"{_NUMBERS}, or None"),
    ("up_features", lambda n: isinstance(n, str) or _wholes(n), f"level or {_NUMBERS}"),
    *(
        (field, _sizes, f"{_NUMBERS}, or one for each axis, or empty: ()")
        for field in ("kernels", "decoder_kernels", "strides", "units", "decoder_units")
    ),
    *(
        (field, _part, _PART)
        for field in ("encoder", "bottleneck", "decoder", "block", "down", "up")
    ),
    *((field, _part, _PART) for field in ("merge", "excite")),
    ("decoder_block", lambda value: value is None or _part(value), f"{_PART}, or None"),
    *(
        (field, lambda value: isinstance(value, str), "a name")
        for field in ("padding", "norm", "act", "order", "kernel_init", "dtype")
    ),
    ("fit", lambda value: value is None or isinstance(value, str), "a name, or None"),
    *(
        (field, lambda n: _whole(n) and n >= 0, "a whole number from 0 on")
        for field in ("dropout_levels", "head_kernel")
    ),
    *((field, _whole, "a whole number") for field in ("norm_groups", "remat")),
    *(
        (field, lambda n: n is None or _whole(n), "a whole number, or None")
        for field in ("level", "heads")
    ),
    ("dropout", lambda n: isinstance(n, int | float), "a number from 0 to below 1"),
)


def _check_kinds(model: Any) -> None:
    for field, ok, what in _KINDS:
        value = getattr(model, field)
        if not ok(value):
            raise _refuse(field, value, f"must be {what}.")


def _refuse(field: str, value: Any, remedy: str) -> InputError:
    return InputError(f"model.{field} = {value!r} {remedy}")


def check(model: Any) -> None:
    """Refuses fields that no net can have.

    Raises:
        InputError: Names the field and what it may be.
    """
    _check_kinds(model)
    encoder = chosen(ENCODERS, model.encoder, "encoder")
    decoder = chosen(DECODERS, model.decoder, "decoder")
    block = chosen(BLOCKS, model.block, "block")
    decoder_block = chosen(BLOCKS, model.decoder_block or "plain", "decoder_block")
    for field, table in (
        ("bottleneck", BOTTLENECKS),
        ("down", DOWNS),
        ("up", UPS),
        ("merge", MERGES),
        ("excite", EXCITES),
        ("padding", PADDINGS),
        ("kernel_init", INITIALISERS),
        ("dtype", ("float32", "bfloat16", "float64")),
        ("up_features", ("level", "input")),
        ("fit", FITS),
    ):
        value = getattr(model, field)
        if isinstance(value, str):
            choose(table, value, f"model.{field} =")
    act_factory(model.act, slope=model.act_slope)
    norm_factory(model.norm, train=False)
    class_of(encoder).check(model)
    _check_sizes(model)
    _check_depth(model)
    widths = [n for n in (*model.features, *(model.decoder_features or ())) if n]
    if model.norm_groups < 1:
        raise _refuse("norm_groups", model.norm_groups, "must be 1 or more: use 8.")
    if model.norm == "group" and any(
        n % model.norm_groups for n in widths if n > model.norm_groups
    ):
        raise InputError(
            f"model.norm_groups = {model.norm_groups} does not divide each of"
            f" model.features = {tuple(widths)}: use {math.gcd(*widths)}, or a divisor"
            " of it."
        )
    if sorted(model.order) != sorted("cna"):
        raise _refuse(
            "order", model.order, "must have each of c, n and a once, as cna has."
        )
    if model.order != "cna":
        for field, part in (("block", block), ("decoder_block", decoder_block)):
            fixed = class_of(part).fixed_order
            if fixed:
                raise _refuse(
                    "order",
                    model.order,
                    f"is for plain blocks: model.{field} = {getattr(model, field)!r}"
                    f" has its own ({fixed}); use order = 'cna'.",
                )
    if not 0.0 <= model.dropout < 1.0:
        raise _refuse("dropout", model.dropout, "must be in [0, 1).")
    up = class_of(chosen(UPS, model.up, "up"))
    if model.padding == "valid" and getattr(up, "same_only", False):
        raise _refuse(
            "up", model.up, "pads by itself: use padding = 'same', or up = 'transpose'."
        )
    bare = has_field(decoder, "bare")
    if model.head_kernel % 2 == 0 and not (bare and model.head_kernel == 0):
        raise _refuse(
            "head_kernel", model.head_kernel, "must be an odd number, such as 1."
        )
    if model.head_kernel == 0 and (model.decoder_features or (0,))[0] != (
        model.num_classes
    ):
        raise _refuse(
            "head_kernel",
            0,
            "leaves the logits to the decoder's finest level: model.decoder_features"
            f" must begin with {model.num_classes}, the number of classes.",
        )


def _check_sizes(model: Any) -> None:
    levels = len(model.features)
    if model.decoder_features is None:
        if 0 in model.features:
            raise _refuse(
                "decoder_features",
                None,
                f"leaves open what the level without features in model.features ="
                f" {model.features} has in the decoder: give {levels - 1} numbers, such"
                f" as {tuple(16 * 2**i for i in range(levels - 1))}.",
            )
    elif len(model.decoder_features) != levels - 1 or min(model.decoder_features) < 1:
        raise _refuse(
            "decoder_features",
            model.decoder_features,
            f"must be {levels - 1} numbers above 0, one for each level of"
            f" model.features = {model.features} but the last.",
        )
    for field, part in (("units", model.block), ("decoder_units", model.decoder_block)):
        block = chosen(BLOCKS, part or model.block, "block")
        if getattr(model, field) and not has_field(block, "units"):
            raise _refuse(
                field,
                getattr(model, field),
                "is for blocks of any number of units, such as plain: leave it out.",
            )
    if isinstance(model.up_features, tuple) and (
        len(model.up_features) != levels - 1 or min(model.up_features) < 1
    ):
        raise _refuse(
            "up_features",
            model.up_features,
            f"must have {levels - 1} numbers above 0, one for each level of"
            f" model.features = {model.features} but the last; or be 'level'.",
        )
    for field, count, ok, what in (
        ("kernels", levels, lambda n: n > 0 and n % 2 == 1, "an odd number"),
        (
            "decoder_kernels",
            levels - 1,
            lambda n: n > 0 and n % 2 == 1,
            "an odd number",
        ),
        ("strides", levels - 1, lambda n: n > 0, "a number above 0"),
        ("units", levels, lambda n: n > 0, "a number above 0"),
        ("decoder_units", levels - 1, lambda n: n >= 0, "a number from 0 on"),
    ):
        value = getattr(model, field)
        numbers = [
            n
            for entry in value
            for n in ((entry,) if isinstance(entry, int) else entry)
        ]
        if value and (len(value) != count or not all(ok(n) for n in numbers)):
            raise _refuse(
                field,
                value,
                f"must have {count} entries for {levels} levels, each {what}, or one"
                " for each axis; or be empty.",
            )


def _check_depth(model: Any) -> None:
    depth, nested = len(model.features) - 1, model.nested
    if not nested:
        if model.level is not None:
            raise _refuse(
                "level",
                model.level,
                "is for decoder = 'unetpp', whose levels all end at full size: use"
                " None.",
            )
        if model.deep_supervision and model.padding == "valid":
            raise _refuse(
                "deep_supervision",
                True,
                "of a decoder other than 'unetpp' has heads on coarser levels, which"
                " padding = 'valid' leaves without a size in common: use 'same'.",
            )
    elif model.merge == "none":
        raise _refuse(
            "merge",
            model.merge,
            "leaves most nodes of decoder = 'unetpp' without any effect: use decoder ="
            " 'unet' to see what skips do.",
        )
    most = depth if not nested else 0
    if model.heads is not None and not 1 <= model.heads <= most:
        raise _refuse(
            "heads",
            model.heads,
            f"must be in 1 to {most}, the levels of the decoder: leave it out for all."
            if most
            else "is not for decoder = 'unetpp', all of whose levels have one.",
        )
    if model.level is not None:
        if not 1 <= model.level <= depth:
            raise _refuse(
                "level", model.level, f"must be in 1 to {depth}, the depth of the net."
            )
        if model.level < depth and not model.deep_supervision:
            raise _refuse(
                "level",
                model.level,
                f"needs a head there, and without deep_supervision only level {depth}"
                " has one: train with deep_supervision = True.",
            )
    if not 0 <= model.remat <= depth + 1:
        raise _refuse("remat", model.remat, f"must be in 0 to {depth + 1}, the levels.")
