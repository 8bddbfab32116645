"""Checkpoints: complete, asynchronous, the latest and the best kept.

A checkpoint of ``workdir/checkpoints/<step>`` has four items, so that ``predict`` reads
only what it needs:

    ``variables``  params and batch_stats as trained
    ``ema``        their average, when it is on
    ``training``   step, optimizer state, learning-rate scale, key
    ``meta``       JSON: what the run is (model, task, label names, normalisation, the
                   whole config) and what its loop has decided (`Progress` of
                   `unet_jax.evaluation`)
"""

import dataclasses
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from unet_jax import models
from unet_jax.models import UNet
from unet_jax.training import TrainState
from unet_jax.types import InputError, PyTree, Task

FORMAT = 2
MEMBERS = "members.json"
"""which workdirs a workdir of folds or seeds has (`unet_jax.members`)"""


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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the format's number."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Meta":
        """The inverse of `to_json`."""
        data = {k: _tuples(v) for k, v in data.items() if k != "format"}
        # Format 1 had a switch for what is now another up-sampling.
        if data["model"].pop("align_corners", False):
            data["model"]["up"] = "bilinear_aligned"
        return cls(**data)

    def build_model(self) -> UNet:
        """The net of the run."""
        return models.build(**self.model)


def _tuples(value: Any) -> Any:
    """Lists, as JSON gives them, made tuples all the way down."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value


def _orbax() -> Any:
    # Orbax reports every save at INFO, warns about choices that are ours on purpose,
    # and prints the traceback of a failed save, which we raise as a sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp
    return ocp


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _manager(workdir: Path, *, read_only: bool) -> Any:
    ocp = _orbax()
    managers = ocp.checkpoint_managers
    # The policy alone forgets the scores when it is opened again, and best_fn alone
    # deletes the newest step when it is a bad one: both are needed.
    policy = managers.AnyPreservationPolicy(
        [managers.LatestN(2), managers.BestN(get_metric_fn=_score, n=1)]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=_score,
        best_mode="max",
        # A reader must not sweep away what a run is just writing.
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
        read_only=read_only,
    )
    return ocp.CheckpointManager(
        (workdir / "checkpoints").absolute(),
        options=options,
        item_names=("variables", "ema", "training", "meta"),
    )


def _items(state: TrainState) -> dict[str, PyTree]:
    items = {
        "variables": {"params": state.params, "batch_stats": state.batch_stats},
        "training": {
            "step": state.step,
            "opt_state": state.opt_state,
            "lr_scale": state.lr_scale,
            "key": state.key,
        },
    }
    if state.ema is not None:
        items["ema"] = state.ema
    return items


def _bytes(trees: PyTree) -> int:
    return sum(
        x.size * x.dtype.itemsize
        for x in jax.tree.leaves(trees)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


class Checkpoints:
    """The checkpoints of a workdir; use it as a context, it waits for the last save.

    Args:
        workdir: The run's folder.
        read_only: Leave everything as it is; a run may be writing there meanwhile.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, read_only: bool = False
    ) -> None:
        self.workdir = Path(workdir)
        self._manager = _manager(self.workdir, read_only=read_only)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._explained(failure) from failure

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint, None if there is none."""
        return self._manager.best_step()

    def _explained(self, error: Exception) -> Exception:
        """An error of a save as a sentence, where the user can mend it."""
        text = str(error)
        full = "No space left" in text or getattr(error, "errno", None) == 28
        full = full or "ENOSPC" in text or "RESOURCE_EXHAUSTED" in text
        if not full:
            return error
        good = self._manager.latest_step()
        return InputError(
            f"the disk of {self.workdir} is full and the last checkpoint could not be"
            f" written: free some space and run the same command again, it goes on"
            f" from step {good or 0}."
        )

    def save(self, state: TrainState, meta: Meta, *, score: float) -> None:
        """Saves in the background; returns once the state has been copied.

        Args:
            state: What to save; its step names the checkpoint.
            meta: What the run is and has decided.
            score: Higher is better; decides which checkpoint is the best.

        Raises:
            InputError: The disk has no room for it; what is there stays.
        """
        self._save(int(state.step), _items(state), meta, score=score)

    def save_variables(self, step: int, variables: PyTree, meta: Meta) -> None:
        """Saves a net to predict with, without what training would need to go on.

        Args:
            step: The training step of the weights; names the checkpoint.
            variables: What ``model.apply`` takes.
            meta: What the net is.

        Raises:
            InputError: The disk has no room for it.
        """
        items = {"variables": {"batch_stats": {}, **variables}}
        self._save(step, items, meta, score=0.0)

    def _save(
        self, step: int, trees: dict[str, PyTree], meta: Meta, *, score: float
    ) -> None:
        ocp = _orbax()
        if step in self._manager.all_steps():
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        need, free = _bytes(trees), shutil.disk_usage(self.workdir).free
        if free < need:
            raise InputError(
                f"the disk of {self.workdir} has {free >> 20} MB left and a checkpoint"
                f" needs up to {(need >> 20) + 1} MB: free some space and run the same"
                f" command again, it goes on from step {self.latest_step() or 0}."
            )
        items = {k: ocp.args.StandardSave(v) for k, v in trees.items()}
        items["meta"] = ocp.args.JsonSave(meta.to_json())
        try:
            self._manager.save(
                step, metrics={"score": score}, args=ocp.args.Composite(**items)
            )
        except Exception as error:
            raise self._explained(error) from error

    def wait(self) -> None:
        """Blocks until the save under way is on disk."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._explained(error) from error

    def read_meta(self, step: int) -> Meta:
        """What the run at ``step`` is, without its weights."""
        ocp = _orbax()
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return Meta.from_json(self._manager.restore(step, args=args).meta)

    def check_resumable(self, step: int) -> None:
        """Refuses to train on where there is a net to predict with only.

        Raises:
            InputError: Names the key that trains from it in another workdir.
        """
        if not (self.workdir / "checkpoints" / str(step) / "training").exists():
            raise InputError(
                f"{self.workdir} holds a net to predict with, without the optimizer's"
                " state: train in another --workdir, from this one's weights with"
                f" --config.model.weights={self.workdir}."
            )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at ``step``.

        Args:
            step: A step there is.
            like: A state, or its shapes with shardings, to restore into.

        Raises:
            InputError: The workdir holds a net to predict with only.
        """
        self.check_resumable(step)
        ocp = _orbax()
        items = {k: ocp.args.StandardRestore(v) for k, v in _items(like).items()}
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        return dataclasses.replace(
            like,
            **found.variables,
            **found.training,
            ema=found.ema if like.ema is not None else None,
        )

    def restore_variables(self, step: int, meta: Meta) -> PyTree:
        """``{"params", "batch_stats"}`` to predict with: the average if there is one.

        Whole on this process's first device, whatever devices the run had.

        Args:
            step: A step there is.
            meta: Its `read_meta`.
        """
        ocp = _orbax()
        model = meta.build_model()
        size = [1 + sum(pads) for pads in models.pads(model, (1,) * meta.rank)]
        image = jax.ShapeDtypeStruct((1, *size, meta.channels), jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        # Without a target that says where, orbax wants the devices of the run back.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            {"batch_stats": {}, **shapes},
        )
        present = (self.workdir / "checkpoints" / str(step) / "ema").exists()
        item = "ema" if present else "variables"
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        return self._manager.restore(step, args=args)[item]


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
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]


def stored_meta(workdir: str | os.PathLike[str]) -> Meta | None:
    """What the run is that a workdir holds; None where there is none yet.

    Raises:
        InputError: It holds a net to predict with only.
    """
    path = Path(workdir)
    if not any((path / "checkpoints").glob("*/_CHECKPOINT_METADATA")):
        return None
    with Checkpoints(path, read_only=True) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return None
        checkpoints.check_resumable(step)
        return checkpoints.read_meta(step)


def load_for_inference(
    workdir: str | os.PathLike[str], *, which: str = "best"
) -> tuple[UNet, PyTree, Meta, int]:
    """The net of a workdir, ready to predict; needs nothing but the workdir.

    Args:
        workdir: Where train.py wrote.
        which: ``best`` or ``latest``, or a step.

    Returns:
        ``(model, variables, meta, step)``.

    Raises:
        InputError: No checkpoint there.
    """
    path = Path(workdir)
    if not any((path / "checkpoints").glob("*/_CHECKPOINT_METADATA")):
        raise InputError(
            f"there is no checkpoint in {path}: give the --workdir of a run of train.py"
            " that has saved at least once."
        )
    with Checkpoints(path, read_only=True) as checkpoints:
        steps = {"best": checkpoints.best_step(), "latest": checkpoints.latest_step()}
        step = steps[which] if which in steps else int(which)
        if step is None or not (path / "checkpoints" / str(step)).exists():
            raise InputError(f"there is no checkpoint {which} in {path}: use best.")
        meta = checkpoints.read_meta(step)
        variables = checkpoints.restore_variables(step, meta)
    return meta.build_model(), variables, meta, step


def members_of(workdir: str | os.PathLike[str]) -> list[Path]:
    """The workdirs of the nets of a workdir: itself, or those of folds or seeds."""
    path = Path(workdir)
    index = path / MEMBERS
    if not index.is_file():
        return [path]
    return [path / name for name in json.loads(index.read_text())["members"]]
