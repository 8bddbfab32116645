"""Which members there are, and the workdirs that they are kept in."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from unet_jax.checkpoint import MEMBERS, Checkpoints, Meta, good_steps
from unet_jax.log import replace_file
from unet_jax.types import InputError

Kind = Literal["folds", "seeds"]
Say = Callable[[str], None]
_NAME = re.compile(r"(fold|seed)_\d+")


class Member(NamedTuple):
    """A run of several.

    Attributes:
        name: ``fold_1``, or ``seed_0``; the folder of its workdir.
        config: Exactly what train.py would be given for it alone.
    """

    name: str
    config: dict[str, Any]


def asked(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for members at all."""
    section = config.get("members", {})
    return bool(section.get("folds", 0) or section.get("seeds", 0))


def configs(config: dict[str, Any]) -> list[Member]:
    """The members that a config asks for.

    Folds part ``data.train``: member i of k learns from ``POOL[not fold i/k]`` and is
    evaluated on ``POOL[fold i/k]``. Seeds are those from ``seed`` on, on the same data.

    Args:
        config: The sections of ``configs/default.py``.

    Raises:
        InputError: Folds and seeds, one of either, or a pool that is itself a part.
    """
    section = config["members"]
    folds, seeds = section.get("folds", 0), section.get("seeds", 0)
    if folds and seeds:
        raise InputError(
            f"members.folds = {folds} and members.seeds = {seeds} are two things: give"
            " one, and for an ensemble in each fold run it once a seed."
        )
    for name, count in (("folds", folds), ("seeds", seeds)):
        if count < 0 or count == 1:
            raise InputError(
                f"members.{name} = {count} is no number of nets side by side: use 2 or"
                " more, or 0 for a single run."
            )
    alone = {**config, "members": {"folds": 0, "seeds": 0}}
    if seeds:
        first = config["seed"]
        return [
            Member(f"seed_{seed}", {**alone, "seed": seed})
            for seed in range(first, first + seeds)
        ]
    pool = config["data"]["train"].strip()
    if not re.fullmatch(r"[\w.\-]+", pool):
        raise InputError(
            f"members.folds = {folds} parts data.train = {pool!r} by itself: give the"
            " bare name of a split, such as all or train, without brackets."
        )
    found = []
    for i in range(1, folds + 1):
        part = f"fold {i}/{folds}"
        data = {
            **config["data"],
            "train": f"{pool}[not {part}]",
            "evaluation": f"{pool}[{part}]",
        }
        found.append(Member(f"fold_{i}", {**alone, "data": data}))
    return found


def check(config: Mapping[str, Any]) -> None:
    """Refuses what members cannot do side by side.

    Raises:
        InputError: Names the key.
    """
    mesh, train = config["mesh"], config["train"]
    remat = config["model"].get("remat", 0)
    some = jax.process_count()
    found = {
        f"mesh.space = {mesh.get('space', 1)}": mesh.get("space", 1) > 1,
        "mesh.fsdp = True": mesh.get("fsdp", False),
        "mesh.pmap = True": mesh.get("pmap", False),
        f"{some} processes": some > 1,
        "train.batch_size = 0": train["batch_size"] == 0,
        f"model.remat = {remat}": remat < 0,
        f"train.steps_per_call = {train.get('steps_per_call', 1)}": (
            train.get("steps_per_call", 1) > 1
        ),
        # Members would stop at different steps.
        f"train.patience = {train['patience']}": train["patience"] > 0,
    }
    for what, there in found.items():
        if there:
            raise InputError(
                f"members do not go with {what}: leave it out, or train them one by"
                " one."
            )


def check_workdir(
    workdir: str | os.PathLike[str], members: tuple[Kind, Sequence[str]] | None
) -> None:
    """Refuses a workdir that holds something else.

    Args:
        workdir: There may be none yet.
        members: Of which kind and name they are; None for a single run.

    Raises:
        InputError: Says what is there.
    """
    workdir = Path(workdir)
    stored, file = stored_members(workdir), workdir / MEMBERS
    if stored is not None:
        kind, names = stored
        if members is None:
            raise InputError(
                f"the workdir {workdir} holds {len(names)} {kind}: say"
                f" --config.members.{kind}={len(names)}, or go on with one of them, as"
                f" in --workdir={workdir / names[0]} with its own config."
            )
        if (kind, names) != (members[0], list(members[1])):
            raise InputError(
                f"the workdir {workdir} holds {kind} {names[0]} to {names[-1]}, and"
                f" this config asks for {members[0]} {members[1][0]} to"
                f" {members[1][-1]}: use another --workdir."
            )
        return
    if members is None:
        if file.exists():
            raise InputError(
                f"{file} is damaged: the command that trained the members writes it"
                " again; for a single run use another --workdir."
            )
        return
    kind, names = members
    there = set() if steps_of(workdir) else folders_of(workdir)
    if there == set(names):
        return  # the file is damaged or has been deleted, and will be written again
    if there and file.exists():
        raise InputError(
            f"{file} is damaged, and the folders beside it are"
            f" {', '.join(sorted(there))}, where this config asks for {names[0]} to"
            f" {names[-1]}: ask for those that are there, or use another --workdir."
        )
    for path in (workdir, *(workdir / name for name in names)):
        if steps_of(path):
            raise InputError(
                f"{path} holds a run of its own: use another --workdir for"
                f" {len(names)} {kind}."
            )


def stored_members(workdir: Path) -> tuple[Kind, list[str]] | None:
    """Which members a workdir says it has; None if it does not, or not readably."""
    try:
        content = json.loads((workdir / MEMBERS).read_bytes())
        kind, names = content["kind"], list(content["members"])
        named = all(map(_NAME.fullmatch, names))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return (kind, names) if kind in get_args(Kind) and names and named else None


def folders_of(workdir: Path) -> set[str]:
    """The folders of a workdir that are called like members."""
    found = workdir.iterdir() if workdir.is_dir() else ()
    return {p.name for p in found if _NAME.fullmatch(p.name) and p.is_dir()}


def steps_of(workdir: Path) -> set[int]:
    """The steps of which a workdir has a checkpoint."""
    found = (workdir / "checkpoints").glob("*/_CHECKPOINT_METADATA")
    return {int(path.parent.name) for path in found if path.parent.name.isdecimal()}


def common(workdir: Path, names: Sequence[str]) -> int:
    """The latest step of which all members have a checkpoint; 0 where one has none.

    All save at the same steps and keep the two latest: a run that was killed between
    two of them has the step before in common, and some have one later one.
    """
    steps = [good_steps(workdir / name) for name in names]
    common = max(set.intersection(*steps), default=0)
    later = [sum(step > common for step in own) for own in steps]
    if max(later) > 1 or not (common or min(map(len, steps)) == 0):
        stand = ", ".join(
            f"{name} at {max(own, default=0)}"
            for name, own in zip(names, steps, strict=True)
        )
        raise InputError(
            f"the members in {workdir} have been trained apart ({stand}): finish each"
            " in its own --workdir, with its own config."
        )
    return common


def drop_later(workdir: Path, names: Sequence[str], start: int, say: Say) -> None:
    """Removes what a killed run had saved of some members only; it is made again."""
    for name in names:
        for step in sorted(good_steps(workdir / name)):
            if step > start:
                say(f"{name}: step {step} is made again, not all members have it")
                path = workdir / name / "checkpoints" / str(step)
                # Moved first: half a checkpoint must not look like a whole one.
                away = workdir / name / f"dropped_{step}"
                shutil.rmtree(away, ignore_errors=True)
                path.rename(away)
                shutil.rmtree(away)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON to be read by people, whole or not at all."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def stored_at(workdir: Path, step: int) -> Meta:
    """What is stored with a checkpoint of a member."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        checkpoints.check_resumable(step)
        return checkpoints.read_meta(step)


def best_of(workdir: Path) -> tuple[int, Meta]:
    """The step of the best checkpoint, and what is stored with it."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.best_step()
        assert step is not None, workdir
        return step, checkpoints.read_meta(step)
