"""What a run is, as it is stored with its weights, and whether two are the same."""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any, get_args

from unet_jax import models
from unet_jax.models import UNet
from unet_jax.types import InputError, Task

FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a run is, as stored with its weights; JSON-able throughout.

    Attributes:
        model: ``{"name": ..., **fields}`` for `unet_jax.models.build`.
        task: ``classes`` or ``labels``.
        label_names: One a channel of the logits.
        normalisation: See `unet_jax.normalisation`.
        channels: C of the image.
        rank: 2 or 3.
        spacing: Voxel size that volumes are resampled to, or empty.
        threshold: The probability from which a label counts (task ``labels``).
        config: The whole config of the run.
        progress: `unet_jax.evaluation.Progress` as a dict.
        results: The figures of the evaluation at this step, or empty.
        torch: Of a net that came from PyTorch: ``family``, ``layout`` and ``dtype``, as
            `unet_jax.torch_weights.Imported` has them, and ``source``, the file's name.
            Else empty.
        examples: Of ``train`` and ``evaluation``: ``[count, digest of the names]``.
    """

    model: dict[str, Any]
    task: Task
    label_names: tuple[str, ...]
    normalisation: dict[str, Any]
    channels: int
    rank: int
    spacing: tuple[float, ...] = ()
    threshold: float = 0.5
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    torch: dict[str, Any] = dataclasses.field(default_factory=dict)
    examples: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the format's number."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Meta":
        """The inverse of `to_json`.

        Raises:
            InputError: Something else, or of a newer version.
        """
        _check_json(data, cls)
        data = {k: _tuples(v) for k, v in data.items() if k != "format"}
        # Format 1 had a switch for what is now another up-sampling.
        if data["model"].pop("align_corners", False):
            data["model"]["up"] = "bilinear_aligned"
        return cls(**data)

    def build_model(self) -> UNet:
        """The net of the run."""
        return models.build(**self.model)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_of(value: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(good, value))


# What is asked of each field of `Meta`, as JSON has it.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": lambda v: isinstance(v, dict) and isinstance(v.get("name"), str),
    "task": lambda v: v in get_args(Task),
    "label_names": lambda v: _list_of(v, lambda name: isinstance(name, str)),
    "normalisation": lambda v: isinstance(v, dict),
    "channels": lambda v: type(v) is int and v > 0,
    "rank": lambda v: type(v) is int and v in (2, 3),
    "spacing": lambda v: _list_of(v, _number),
    "threshold": _number,
    "config": lambda v: isinstance(v, dict),
    "progress": lambda v: isinstance(v, dict),
    "results": lambda v: isinstance(v, dict),
    "torch": lambda v: isinstance(v, dict),
    "examples": lambda v: isinstance(v, dict),
}


def _check_json(data: Any, kind: type[Meta]) -> None:
    """Raises InputError where ``data`` is not what `Meta.to_json` gives."""
    if not isinstance(data, dict):
        raise InputError(
            "what a checkpoint says about its net is no JSON object: the file is"
            " damaged, use another checkpoint."
        )
    version = data.get("format", 1)
    if type(version) is not int or version > FORMAT:
        raise InputError(
            f"a checkpoint has the format {version!r}, and this version reads up to"
            f" {FORMAT}: update unet_jax."
        )
    for field in dataclasses.fields(kind):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if field.name not in data and not needed:
            continue
        value = data.get(field.name)
        if not _FIELDS[field.name](value):
            raise InputError(
                f"a checkpoint says {field.name} = {value!r:.80} about its net, which"
                " cannot be: the file is damaged, use another checkpoint."
            )
    known = {"format", *(field.name for field in dataclasses.fields(kind))}
    if strange := sorted(map(str, data.keys() - known)):
        raise InputError(
            f"a checkpoint says {strange[0]!r:.80} about its net, which this version"
            " does not know: update unet_jax."
        )


def _tuples(value: Any) -> Any:
    """Lists, as JSON gives them, made tuples all the way down."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value


# What decides the shape of the optimizer's state, beside its name and what is frozen.
_OPTIM_SWITCHES = ("clip", "weight_decay")


def _identity(meta: Meta) -> dict[str, Any]:
    """What must be the same for a run to go on: path of the key -> value."""
    # Of the net that is built, so that a field which is new has its default in both.
    model = {"name": meta.model["name"], **models.fields(meta.build_model())}
    # What is computed again, and where, changes no number.
    own = {f"model.{k}": v for k, v in model.items() if k not in ("remat", "axis_name")}
    for field in ("task", "label_names", "channels", "rank"):
        own[field] = getattr(meta, field)
    own |= {f"data.normalisation.{k}": v for k, v in meta.normalisation.items()}
    optim = meta.config.get("optim", {})
    own |= {f"optim.{k}": optim.get(k) for k in ("name", "freeze")}
    # sgd keeps a momentum in its state even if it is 0.
    more = ("momentum",) if optim.get("name") == "rmsprop" else ()
    switches = (*_OPTIM_SWITCHES, *more)
    own |= {f"optim.{k} > 0": bool(optim.get(k)) for k in switches}
    own["train.ema > 0"] = bool(meta.config.get("train", {}).get("ema"))
    return json.loads(json.dumps(own))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    if not isinstance(tree, dict):
        return {path: tree}
    parts = [_flat(v, f"{path}.{k}" if path else k) for k, v in tree.items()]
    return {key: value for part in parts for key, value in part.items()}


def check_same_run(
    stored: Meta, now: Meta, workdir: str | os.PathLike[str]
) -> list[str]:
    """Refuses to resume a workdir with another model, data or optimizer.

    Args:
        stored: Of the checkpoint.
        now: Of the config.
        workdir: Where; the sentence names it.

    Returns:
        The other keys of the config that have changed, each as ``key: old -> new``.

    Raises:
        InputError: Names the first difference and the remedy.
    """
    old, new = _identity(stored), _identity(now)
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            raise InputError(
                f"the workdir {os.fspath(workdir)} holds a run with {key} ="
                f" {old.get(key)!r}, and this config says {new.get(key)!r}: use another"
                " --workdir, or delete that one."
            )
    before, after = (
        _flat(json.loads(json.dumps(meta.config))) for meta in (stored, now)
    )
    changed = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    for part, (count, digest) in now.examples.items():
        then = stored.examples.get(part)
        if then is None or then[1] == digest:
            continue
        skips = now.config.get("data", {}).get("on_error") == "skip"
        if part == "evaluation" and not skips:
            where = os.fspath(workdir)
            raise InputError(
                f"the workdir {where} holds a run that was evaluated on {then[0]}"
                f" images, and now there are {count}, not the same ones: what was"
                " trained on may be among them and the best so far is of the others,"
                " so use another --workdir, with this one's weights by"
                f" --config.model.weights={where}."
            )
        changed.append(
            f"the images of data.{part}: {then[0]} -> {count}, and not the same ones"
        )
    return changed
