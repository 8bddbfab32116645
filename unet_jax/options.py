"""What a config may hold: which keys each section has, and of what kind their values.

A section whose keys are the keyword arguments of a function takes them from its
signature, so that an option is written down once. What a value means, and how large it
may be, is looked at by whoever uses it.
"""

import importlib
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, Union

from unet_jax.types import InputError, Shape, choose


class Train(TypedDict):
    """The keys of ``config.train``."""

    steps: int
    batch_size: int
    accumulate: int
    crop: Shape
    ema: float
    log_every: int
    eval_every: int
    save_every: int
    eval_batch_size: int
    threshold: float
    monitor: str
    patience: int
    memory_gb: NotRequired[float]
    steps_per_call: NotRequired[int]
    foreground: NotRequired[float]
    threads: NotRequired[int]
    resident: NotRequired[bool]
    alarm: NotRequired[int]


class Plateau(TypedDict):
    """The keys of ``config.plateau``."""

    monitor: str
    factor: float
    patience: int


class Mesh(TypedDict):
    """The keys of ``config.mesh``."""

    data: int
    space: int
    fsdp: NotRequired[bool]
    pmap: NotRequired[bool]


class Members(TypedDict):
    """The keys of ``config.members``."""

    folds: NotRequired[int]
    seeds: NotRequired[int]
    vmap: NotRequired[bool]


class Config(TypedDict):
    """The keys of a config."""

    seed: int
    task: str
    data: Mapping[str, Any]
    augment: Mapping[str, Any]
    model: Mapping[str, Any]
    loss: Mapping[str, Any]
    optim: Mapping[str, Any]
    plateau: Mapping[str, Any]
    train: Mapping[str, Any]
    mesh: Mapping[str, Any]
    members: NotRequired[Mapping[str, Any]]


class Keys(NamedTuple):
    """What a section may hold.

    Attributes:
        kinds: The annotation of each key.
        required: Those that it cannot do without.
    """

    kinds: dict[str, Any]
    required: frozenset[str]


def check(config: Mapping[str, Any], *, whole: bool = True) -> None:
    """Refuses a config that lacks a key, has one too many, or a value of another kind.

    The fields of ``config.model`` are looked at by `unet_jax.checks`.

    Args:
        config: Plain data, without the keys left at None.
        whole: Whether it is a command's, which needs all keys; else it may lack some.

    Raises:
        InputError: Names the key, and what it may be.
    """
    from unet_jax import augment, losses, optim

    sections = {
        "": of_section(Config),
        "train": of_section(Train),
        "plateau": of_section(Plateau),
        "mesh": of_section(Mesh),
        "members": of_section(Members),
        "augment": of_function(augment.build),
        "loss": of_function(losses.build, "task"),
        "optim": of_function(optim.build, "total_steps"),
    }
    for name, keys in sections.items():
        values = config.get(name, {}) if name else config
        _check(name, values, keys if whole else keys._replace(required=frozenset()))
    model = config.get("model", {})
    if whole and not model.get("name") and not model.get("weights"):
        raise InputError("model.name is missing: give it, such as 'unet'.")
    members = config.get("members", {})
    if config["train"].get("resident") and (
        members.get("folds", 0) or members.get("seeds", 0)
    ):
        raise InputError(
            "train.resident = True does not go with members, which are sent their"
            " batches side by side: leave out train.resident, or train them one by one."
        )
    check_data(config["data"])


def check_data(section: Mapping[str, Any]) -> None:
    """`check` of ``config.data``, and of the options of the source that it names."""
    from unet_jax import data
    from unet_jax.data.border import Bordered

    _check("data", section, of_function(data.build, "task", "share"))
    source = choose(data.SOURCES, section["source"], "data.source =")
    module = importlib.import_module(f"unet_jax.data.{source}")
    keys = of_function(module.open, "root", "split", "links", "on_error")
    _check(f"data.{source}", section.get(source, {}), keys)
    keys = of_function(Bordered.__init__, "self", "source")
    _check("data.border", section.get("border", {}), keys)


def of_section(section: type) -> Keys:
    """The keys of a TypedDict."""
    hints = typing.get_type_hints(section)
    return Keys(hints, section.__required_keys__)  # pyright: ignore[reportAttributeAccessIssue]


def of_function(function: Callable[..., Any], *given: str) -> Keys:
    """The keyword arguments of a function, without those that no config gives."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    kinds = {name: hints[name] for name in parameters if name not in given}
    needed = {name for name in kinds if parameters[name].default is inspect._empty}
    return Keys(kinds, frozenset(needed))


def _check(section: str, values: Any, keys: Keys) -> None:
    before = f"{section}." if section else ""
    if not isinstance(values, Mapping):
        raise InputError(
            f"{section} = {values!r:.80} must be a section: begin from"
            " configs/default.py, which has all keys."
        )
    for key, value in values.items():
        if key not in keys.kinds:
            known = ", ".join(sorted(keys.kinds))
            raise InputError(
                f"the config has {before}{key}, which is no key: use one of {known}."
            )
        if not fits(value, keys.kinds[key]):
            raise InputError(
                f"{before}{key} = {value!r:.80} must be {words(keys.kinds[key])}."
            )
    for key in sorted(keys.required - values.keys()):
        raise InputError(
            f"{before}{key} is missing, or None: give {words(keys.kinds[key])}, or"
            " begin from configs/default.py, which has all keys."
        )


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (
        lambda n: isinstance(n, numbers.Integral) and not isinstance(n, bool),
        "a whole number",
    ),
    # NaN is unequal to itself. It would pass every "must not be below 0".
    float: (
        lambda n: (
            isinstance(n, numbers.Real) and not isinstance(n, bool) and bool(n == n)
        ),
        "a number",
    ),
    str: (lambda value: isinstance(value, str), "a text"),
    type(None): (lambda value: value is None, "None"),
}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind that an annotation names.

    Whole numbers are numbers, and NaN is none; lists are as good as tuples. One of
    several names (Literal) may be any text, for whoever knows them lists them.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind][0](value)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is NotRequired:
        return fits(value, inner[0])
    if origin is Literal:
        return isinstance(value, str)
    if origin is tuple and inner[-1] is not Ellipsis:
        pairs = isinstance(value, list | tuple) and len(value) == len(inner)
        return pairs and all(map(fits, value, inner))
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items()
        )
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(fits(v, inner[0]) for v in value)
    return True


def words(kind: Any, *, many: bool = False) -> str:
    """What an annotation asks for, in words for people."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _PLAIN:
        text = _PLAIN[kind][1]
        return f"{text.removeprefix('a ')}s" if many and text[:2] == "a " else text
    if origin in (Union, types.UnionType):
        return " or ".join(words(part, many=many) for part in inner)
    if origin is NotRequired:
        return words(inner[0], many=many)
    if origin is Literal:
        return words(str, many=many)
    some = "tuples" if many else "a tuple"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"{some} of {' and '.join(words(part) for part in inner)}"
    if origin is not None and issubclass(origin, Mapping):
        return "a mapping"
    if origin is not None and issubclass(origin, Sequence):
        return f"{some} of {words(inner[0], many=True)}"
    return "something else"
