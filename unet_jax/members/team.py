"""Members wired from a config, what `build` makes of it."""

import dataclasses
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unet_jax import models, run, sharding
from unet_jax.books import announced
from unet_jax.checkpoint import MEMBERS
from unet_jax.data.batches import side_by_side, train_reader
from unet_jax.evaluation import jit_eval_step
from unet_jax.members.roster import (
    Kind,
    Say,
    check,
    check_workdir,
    common,
    configs,
    stored_at,
    write_json,
)
from unet_jax.members.ways import InTurn, One, Together, Way
from unet_jax.run import Run
from unet_jax.training import TrainState
from unet_jax.types import Array, Batch, InputError, NumpyArray, PyTree


@dataclasses.dataclass(frozen=True)
class Team:
    """Members, wired: what `build` makes of a config.

    Attributes:
        kind: ``folds`` or ``seeds``.
        names: Of the members.
        runs: Of each, as `unet_jax.run.build` makes it alone, but that all are
            evaluated by one compiled step on ``mesh``.
        mesh: Of the devices that are used.
        way: How a step is taken.
        start: The step that they go on from.
    """

    kind: Kind
    names: tuple[str, ...]
    runs: tuple[Run, ...]
    mesh: Mesh
    way: Way
    start: int

    def batches(self, start: int) -> Iterator[Any]:
        """What a step takes, from step ``start`` on, placed two steps ahead."""
        queue: deque[Any] = deque()
        readers = [_reader(one) for one in self.runs]
        size = sum(np.asarray(x).nbytes for x in readers[0](start).values())
        threads = run.read_threads(self.runs[0].config, size * len(readers))
        for batch in side_by_side(readers, start=start, threads=threads):
            queue.append(self.way.place(batch))
            if len(queue) > 2:
                yield queue.popleft()


def write(team: Team, workdir: Path, out_of_fold: Mapping[str, Any]) -> None:
    """Writes which members a workdir has, and what they are worth together."""
    write_json(
        workdir / MEMBERS,
        {"kind": team.kind, "members": team.names, "out_of_fold": out_of_fold},
    )


def _reader(one: Run) -> Callable[[int], Batch]:
    train = one.config["train"]
    return train_reader(
        one.dataset.train,
        seed=one.config["seed"],
        batch_size=train["batch_size"],
        crop=train["crop"],
        margin=models.margin(one.model, one.dataset.rank),
        foreground=train.get("foreground", 0.0),
    )


def devices_for(
    vmap: bool | None, count: int, devices: Sequence[Any]
) -> tuple[bool, int]:
    """Whether members go together, and on how many devices."""
    most = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    together = most > 1 or devices[0].platform != "cpu" if vmap is None else vmap
    return together, most if together else 1


def build(
    config: dict[str, Any], workdir: str | os.PathLike[str] | None, *, say: Say
) -> Team:
    """Wires all members; reads their data, compiles nothing.

    Args:
        config: Asks for members.
        workdir: Where they are kept, or None.
        say: Is told what a person should see.

    Raises:
        InputError: What cannot work, see `configs`, `check` and `check_workdir`, and
            what `unet_jax.run.build` finds.
    """
    check(config)
    members = configs(config)
    kind: Kind = "folds" if config["members"].get("folds", 0) else "seeds"
    names, count = tuple(member.name for member in members), len(members)
    start = 0
    if workdir is not None:
        check_workdir(workdir, (kind, names))
        start = common(Path(workdir), names)
    devices = list(sharding.make_mesh(config["mesh"]["data"]).devices.flat)
    together, used = devices_for(config["members"].get("vmap"), count, devices)
    how = "in one program" if together else "in turn, by one compiled step"
    line = (
        f"{jax.default_backend()}: {devices[0].device_kind}, {count} {kind} {how}, on"
    )
    line += f" {used} of {len(devices)} device(s)"
    if used < min(len(devices), count) and config["members"].get("vmap") is not False:
        line += f", because {count} members divide over no more"
    say(line)
    mesh = sharding.make_mesh(used, devices=devices[:used])
    here = sharding.make_mesh(1, devices=devices[:1])
    runs: list[Run] = []
    for member in members:
        stored = (
            stored_at(Path(workdir) / member.name, start) if workdir and start else None
        )
        one = run.build(_sharing(member.config, kind, count), here, stored)
        first = runs[0] if runs else one
        # Seeds read one data set, and folds begin alike, by one compiled start.
        shared = "dataset" if kind == "seeds" else "init"
        meta = dataclasses.replace(one.meta, config=member.config)
        runs.append(
            dataclasses.replace(
                one,
                config=member.config,
                meta=meta,
                **{shared: getattr(first, shared)},
            )
        )
    check_alike(names, runs)
    stats = {
        key: np.asarray([r.meta.normalisation[key] for r in runs], np.float32)
        for key in ("shift", "scale")
    }
    way = Together if together else InTurn
    return Team(
        kind=kind,
        names=names,
        runs=tuple(_evaluated_alike(runs, stats, mesh, say)),
        mesh=mesh,
        way=way(_step_of_one(runs[0]), stats, mesh),
        start=start,
    )


def _sharing(config: dict[str, Any], kind: Kind, count: int) -> dict[str, Any]:
    """A member's config with its share of the cache; seeds share the data itself."""
    data = config["data"]
    share = data["cache_mb"] / (count if kind == "folds" else 1)
    return {**config, "data": {**data, "cache_mb": share}}


def check_alike(names: Sequence[str], runs: Sequence[Run]) -> None:
    """Refuses data of which one program cannot be made."""
    for what in ("label_names", "channels"):
        first = getattr(runs[0].dataset, what)
        for name, one in zip(names, runs, strict=True):
            if (own := getattr(one.dataset, what)) != first:
                source = one.config["data"]["source"]
                raise InputError(
                    f"{names[0]} has {what} = {first} and {name} has {own}: give"
                    f" data.{source}.{what}, the same for all."
                )


def _step_of_one(first: Run) -> One:
    """The training step with the normalisation, which folds have each their own."""
    stats = first.meta.normalisation

    def one(
        shift: Array, scale: Array, state: TrainState, batch: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        step = first.step_with({**stats, "shift": shift, "scale": scale})
        return step(state, batch)

    return one


def _evaluated_alike(
    runs: Sequence[Run], stats: Mapping[str, NumpyArray], mesh: Mesh, say: Say
) -> Iterator[Run]:
    """The runs with one compiled evaluation for all, over all devices that are used."""
    first, whole = runs[0], sharding.replicated(mesh)

    def evaluation(given: tuple[Mapping[str, Array], PyTree], batch: Any) -> Any:
        own, variables = given
        step = first.evaluation_with({**first.meta.normalisation, **own})
        return step(variables, batch)

    shared = announced(jit_eval_step(evaluation, mesh), say)

    def of(own: Mapping[str, NumpyArray]) -> Any:
        return lambda variables, batch: shared((own, variables), batch)

    def there(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)

    for i, one in enumerate(runs):
        own = {key: values[i] for key, values in stats.items()}
        yield dataclasses.replace(
            one,
            mesh=mesh,
            eval_step=of(own),
            shapes=jax.tree.map(there, one.shapes),
        )
