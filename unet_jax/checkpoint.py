"""Checkpoints: complete, asynchronous, the latest and the best kept.

A checkpoint of ``workdir/checkpoints/<step>`` has four items, so that ``predict`` reads
only what it needs:

    ``variables``  params and batch_stats as trained
    ``ema``        their average, when it is on
    ``training``   step, optimizer state, learning-rate scale, key
    ``meta``       JSON: what the run is (model, task, label names, normalisation, the
                   whole config) and what its loop has decided (`Progress` of
                   `unet_jax.evaluation`)

Whoever opens a workdir gets the newest checkpoint that is whole (`unet_jax.integrity`).
A run that goes on moves those that are damaged to ``workdir/damaged``; a reader leaves
them, and is refused the best, or a step that it names, where that is one of them.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from unet_jax import distributed, integrity, models
from unet_jax.meta import Meta
from unet_jax.meta import check_same_run as check_same_run
from unet_jax.models import UNet
from unet_jax.training import TrainState
from unet_jax.types import InputError, PyTree

MEMBERS = "members.json"
"""which workdirs a workdir of folds or seeds has (`unet_jax.members`)"""
LATEST = 2  # how many of the newest are kept, beside the best
_LOG = logging.getLogger(__name__)
# How the errors of a full disk read: of the system, of a quota, of a limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (*map(os.strerror, _FULL), "ENOSPC", "RESOURCE_EXHAUSTED")

Say = Callable[[str], None]
"""prints a line for a person"""


def _orbax() -> Any:
    # Orbax reports every save at INFO, warns about choices that are ours on purpose,
    # and prints the traceback of a failed save, which we raise as a sentence.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint as ocp
    with contextlib.suppress(ImportError):
        from orbax.checkpoint._src import asyncio_utils

        if hasattr(asyncio_utils, "_run_sync_via_new_loop"):
            asyncio_utils._run_sync_via_new_loop = _run_to_the_end
    return ocp


def _run_to_the_end(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine; where it fails, what it has begun comes to its end as well.

    Orbax's own closes the loop when the first of many writes fails, and each of the
    others then prints the traceback of an error of its own.
    """
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(coroutine)
        except Exception:
            rest = asyncio.gather(*asyncio.all_tasks(loop), return_exceptions=True)
            loop.run_until_complete(rest)
            raise
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _score(metrics: dict[str, float]) -> float:
    return metrics["score"]


def _best(scores: Mapping[int, float]) -> int | None:
    """The step of the highest score, of equal ones the latest."""
    return max(scores, key=lambda step: (scores[step], step), default=None)


class _Kept:
    """Which checkpoints orbax is to leave: the newest and the best.

    Its own ways go by what it reads from all of them when it opens a workdir, and one
    damaged file is then the end of it.

    Args:
        scores: Of the steps; grows with them.
    """

    def __init__(self, scores: Mapping[int, float]) -> None:
        self._scores = scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Whether to leave each of the checkpoints; orbax's protocol."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = _best({step: self._scores.get(step, -math.inf) for step in steps})
        newest = sorted(steps)[-LATEST:]
        return [step in newest or step == best for step in steps]


def _manager(workdir: Path, scores: Mapping[int, float], *, read_only: bool) -> Any:
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(scores),
        best_fn=_score,  # so that scores are written at all
        best_mode="max",
        # A reader must not sweep away what a run is just writing.
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
        read_only=read_only,
        lightweight_initialize=True,
    )
    return ocp.CheckpointManager(
        (workdir / integrity.CHECKPOINTS).absolute(),
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


def _or_lowest(score: float | None) -> float:
    return -math.inf if score is None else score


def _none_left(workdir: Path, damage: Mapping[int, str]) -> InputError:
    """The sentence for a workdir in which no checkpoint is whole."""
    those = "; ".join(f"step {step}: {damage[step]}" for step in sorted(damage))
    return InputError(
        f"no checkpoint of {workdir} is whole ({those}): put a copy of one in its"
        " place, or begin anew in another --workdir."
    )


class Checkpoints:
    """The checkpoints of a workdir; use it as a context, it waits for the last save.

    Args:
        workdir: The run's folder.
        read_only: Leave everything as it is; a run may be writing there meanwhile.
        say: Is told of checkpoints that are damaged; the log, if None.

    Raises:
        InputError: There are checkpoints, and none of them is whole. A reader is told
            when it asks for one.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        read_only: bool = False,
        say: Say | None = None,
    ) -> None:
        self.workdir = Path(workdir)
        self._read_only, self._say = read_only, say or _LOG.warning
        self._damage: dict[int, str | None] = {}
        self._newest: int | None = None
        self._recording: threading.Thread | None = None
        self._failure: Exception | None = None
        _orbax()  # quiet from the first import on
        if not read_only:
            if distributed.is_main():
                self._mend()
            distributed.wait("checkpoints have been verified")
        self._scores = {
            step: _or_lowest(integrity.score_of(self.workdir, step))
            for step in integrity.steps_in(self.workdir)
        }
        self._manager = _manager(self.workdir, self._scores, read_only=read_only)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._recorded()
            with contextlib.closing(self._manager):
                self._manager.wait_until_finished()
        except Exception as failure:
            if error is None:
                raise self._explained(failure) from failure

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, found once; None if nothing is."""
        if step not in self._damage:
            self._damage[step] = integrity.damage(self.workdir, step)
        return self._damage[step]

    def _mend(self) -> None:
        """Finds the newest checkpoint that is whole, and moves damaged ones away."""
        integrity.settle(self.workdir)
        newest, found = None, dict[int, str]()
        for step in reversed(integrity.steps_in(self.workdir)):
            if newest is None:
                bad = self.damage(step)
            else:
                bad = integrity.damage(self.workdir, step, whole=False)
            if bad is None:
                newest = step if newest is None else newest
            else:
                found[step] = bad
        if newest is None and found:
            # Not moved: the same command again must not begin at zero.
            raise _none_left(self.workdir, found)
        for step, bad in found.items():
            there = integrity.set_aside(self.workdir, step)
            self._say(
                f"the checkpoint of step {step} is damaged ({bad}): going on from step"
                f" {newest}; it was moved to {there}"
            )
        integrity.forget(self.workdir)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, for a reader also damaged ones."""
        if self._read_only:
            return integrity.steps_in(self.workdir)
        return list(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint that is whole, None if there is none.

        Raises:
            InputError: There are some, and all are damaged.
        """
        if not self._read_only:
            return self._manager.latest_step()
        if self._newest is not None:
            return self._newest
        found: dict[int, str] = {}
        for step in reversed(self.steps()):
            if (bad := self.damage(step)) is None:
                self._newest = step
                break
            # A run that is writing there removes checkpoints while they are read.
            if integrity.folder_of(self.workdir, step).exists():
                found[step] = bad
        if self._newest is None and found:
            raise _none_left(self.workdir, found)
        for step, bad in found.items():
            self._say(
                f"the checkpoint of step {step} of {self.workdir} is damaged ({bad}):"
                f" that of step {self._newest} is used"
            )
        return self._newest

    def best_step(self) -> int | None:
        """The step of the best checkpoint, None if there is none.

        Raises:
            InputError: It is damaged, for a reader: another one would be another net.
        """
        if not self._read_only:
            return _best({s: self._scores.get(s, -math.inf) for s in self.steps()})
        steps = self.steps()
        scores = {step: integrity.score_of(self.workdir, step) for step in steps}
        best = _best({step: _or_lowest(score) for step, score in scores.items()})
        # One that has lost its score may have been the best.
        lost = [step for step in steps if scores[step] is None]
        for step in (*lost, *([] if best is None else [best])):
            bad = self.damage(step)
            if bad is not None and integrity.folder_of(self.workdir, step).exists():
                raise InputError(
                    f"the best checkpoint of {self.workdir}, of step {step}, is damaged"
                    f" ({bad}): use another with --which=latest, or put a copy of it in"
                    " its place."
                )
        return best

    def named_step(self, which: str) -> int | None:
        """The step of ``best``, ``latest`` or a number; None if there is none.

        Raises:
            InputError: It is damaged.
        """
        which = str(which)
        if which in ("best", "latest"):
            return self.best_step() if which == "best" else self.latest_step()
        if not which.isdecimal() or int(which) not in self.steps():
            return None
        if bad := self.damage(int(which)):
            raise InputError(
                f"the checkpoint of step {which} of {self.workdir} is damaged ({bad}):"
                " use another with --which=latest or --which=best."
            )
        return int(which)

    def _explained(self, error: Exception) -> Exception:
        """An error of a save as a sentence, where the user can mend it."""
        full = getattr(error, "errno", None) in _FULL
        if not full and not any(text in str(error) for text in _FULL_TEXTS):
            return error
        return InputError(
            f"the disk of {self.workdir} is full and the last checkpoint could not be"
            f" written: free some space and run the same command again, it goes on"
            f" from step {self._on_disk()}."
        )

    def _on_disk(self) -> int:
        """The step that the next start goes on from, 0 to begin anew."""
        steps = reversed(integrity.steps_in(self.workdir))
        whole = (s for s in steps if integrity.damage(self.workdir, s) is None)
        return next(whole, 0)

    def check(self) -> None:
        """Raises what a save in the background has failed with, so far.

        Waits for nothing and reads nothing: for every step, so that a run does not go
        on for hours that it cannot save. Of several processes, orbax first has the
        one that failed wait for the others, some minutes.

        Raises:
            InputError: The disk is full.
        """
        if self._failure is not None:
            raise self._explained(self._failure) from self._failure

    def save(
        self, state: TrainState, meta: Meta, *, score: float, again: bool = False
    ) -> None:
        """Saves in the background; returns once the state has been copied.

        A step that has a checkpoint is left as it is, or replaced. The old one stays
        until the new one is complete, which is waited for.

        Args:
            state: What to save; its step names the checkpoint.
            meta: What the run is and has decided.
            score: Higher is better; decides which checkpoint is the best.
            again: Replace the checkpoint of the step, if there is one.

        Raises:
            InputError: The disk has no room for it, or had none for the one before;
                what is there stays.
        """
        self._save(int(state.step), _items(state), meta, score=score, again=again)

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
        self,
        step: int,
        trees: dict[str, PyTree],
        meta: Meta,
        *,
        score: float,
        again: bool = False,
    ) -> None:
        ocp = _orbax()
        there = step in self._manager.all_steps()
        if there and not again:
            return
        self._recorded()
        self.check()
        self.workdir.mkdir(parents=True, exist_ok=True)
        need, free = _bytes(trees), shutil.disk_usage(self.workdir).free
        if free < need:
            raise InputError(
                f"the disk of {self.workdir} has {free >> 20} MB left and a checkpoint"
                f" needs up to {(need >> 20) + 1} MB: free some space and run the same"
                f" command again, it goes on from step {self._on_disk()}."
            )
        items = {k: ocp.args.StandardSave(v) for k, v in trees.items()}
        items["meta"] = ocp.args.JsonSave(meta.to_json())
        args = ocp.args.Composite(**items)
        if there:
            self._replace(step, args, score)
            return
        self._scores[step] = score
        try:
            self._manager.save(step, metrics={"score": score}, args=args)
        except Exception as error:
            raise self._explained(error) from error
        self._recording = threading.Thread(target=self._record, args=(step, score))
        self._recording.start()

    def _replace(self, step: int, args: Any, score: float) -> None:
        """Saves aside, and then puts it in the place of the checkpoint of its step."""
        again = integrity.again_of(self.workdir)
        if distributed.is_main():
            shutil.rmtree(again, ignore_errors=True)
        distributed.wait(f"step {step} is saved again")
        try:
            with contextlib.closing(_manager(again, {}, read_only=False)) as manager:
                manager.save(step, metrics={"score": score}, args=args)
                manager.wait_until_finished()
            if distributed.is_main():
                integrity.record(again, step, score)
        except InputError:
            raise
        except Exception as error:
            raise self._explained(error) from error
        if distributed.is_main():
            integrity.replace(self.workdir, step)
        distributed.wait(f"step {step} has been saved again")
        self._scores[step] = score
        self._damage.pop(step, None)

    def _record(self, step: int, score: float) -> None:
        """Writes the sums of the save under way, once it is complete; in a thread.

        Orbax's own callback comes before the last files are written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failure = error
            return
        if not distributed.is_main():
            return
        try:
            integrity.record(self.workdir, step, score)
            integrity.forget(self.workdir)
        except (OSError, InputError) as error:
            self._say(
                f"note: the checkpoint of step {step} has no sums to verify it with"
                f" ({error})"
            )

    def _recorded(self) -> None:
        """Waits for the sums of the last save."""
        if self._recording is not None:
            self._recording.join()
            self._recording = None

    def wait(self) -> None:
        """Blocks until the save under way is on disk."""
        self._recorded()
        self.check()
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._explained(error) from error

    def read_meta(self, step: int) -> Meta:
        """What the run at ``step`` is, without its weights.

        Raises:
            InputError: That cannot be read.
        """
        ocp = _orbax()
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        try:
            return Meta.from_json(self._manager.restore(step, args=args).meta)
        except InputError as error:
            raise InputError(
                f"{integrity.folder_of(self.workdir, step)}: {error}"
            ) from error

    def check_resumable(self, step: int) -> None:
        """Refuses to train on where there is a net to predict with only.

        Raises:
            InputError: Names the key that trains from it in another workdir.
        """
        if not (integrity.folder_of(self.workdir, step) / "training").exists():
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
        present = (integrity.folder_of(self.workdir, step) / "ema").exists()
        item = "ema" if present else "variables"
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        return self._manager.restore(step, args=args)[item]


def _standing(workdir: Path) -> Path:
    """The workdir, or where its only checkpoint is if a kill hit its replacing."""
    again = integrity.again_of(workdir)
    alone = integrity.steps_in(again) and not integrity.steps_in(workdir)
    return again if alone else workdir


def stored_meta(workdir: str | os.PathLike[str]) -> Meta | None:
    """What the run is that a workdir holds; None where there is none yet.

    Raises:
        InputError: It holds a net to predict with only, or nothing that is whole.
    """
    path = _standing(Path(workdir))
    if not integrity.steps_in(path):
        return None
    # Said by whoever opens it to go on.
    with Checkpoints(path, read_only=True, say=lambda _: None) as checkpoints:
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
        which: ``best`` or ``latest``, or a step. If the latest is damaged the one
            before it is taken, with a warning.

    Returns:
        ``(model, variables, meta, step)``.

    Raises:
        InputError: No checkpoint there, or it is damaged.
    """
    path = _standing(Path(workdir))
    if not integrity.steps_in(path):
        raise InputError(
            f"there is no checkpoint in {path}: give the --workdir of a run of train.py"
            " that has saved at least once."
        )
    with Checkpoints(path, read_only=True) as checkpoints:
        step = checkpoints.named_step(which)
        if step is None:
            raise InputError(f"there is no checkpoint {which} in {path}: use best.")
        meta = checkpoints.read_meta(step)
        variables = checkpoints.restore_variables(step, meta)
    return meta.build_model(), variables, meta, step


def members_of(workdir: str | os.PathLike[str]) -> list[Path]:
    """The workdirs of the nets of a workdir: itself, or those of folds or seeds.

    Raises:
        InputError: The file that names them is damaged.
    """
    path = Path(workdir)
    index = path / MEMBERS
    if not index.is_file():
        return [path]
    try:
        return [path / name for name in json.loads(index.read_text())["members"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{index} does not name the members of {path}: it is damaged, start the"
            " command that trained them again, or name their folders."
        ) from error


def good_steps(workdir: str | os.PathLike[str]) -> set[int]:
    """The steps of which a workdir has a checkpoint that is whole.

    Raises:
        InputError: There are checkpoints, and none of them is whole.
    """
    path = Path(workdir)
    _orbax()  # quiet from the first import on
    found = {step: integrity.damage(path, step) for step in integrity.steps_in(path)}
    damaged = {step: bad for step, bad in found.items() if bad is not None}
    if found and len(damaged) == len(found):
        raise _none_left(path, damaged)
    return found.keys() - damaged.keys()
