"""A run wired from its config: data, net, loss, optimizer and the compiled steps.

The config is plain data, the sections and keys of ``configs/default.py``; each section
goes to the builder of the same name as keyword arguments.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from unet_jax import (
    augment,
    budget,
    compiled,
    data,
    feasible,
    losses,
    models,
    normalisation,
    optim,
    options,
    resident,
    sharding,
    transfer,
)
from unet_jax.checkpoint import Meta
from unet_jax.evaluation import (
    Evaluation,
    evaluate,
    figures,
    jit_eval_step,
    make_eval_step,
)
from unet_jax.normalisation import Stats
from unet_jax.training import (
    Step,
    TrainState,
    init_state,
    make_pmap_train_step,
    make_train_step,
    several,
)
from unet_jax.types import Batch, InputError, choose

FREE = 0.95  # of what a device says it has: an allocator cannot use all of it


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, wired: what `build` makes of a config."""

    config: dict[str, Any]
    mesh: jax.sharding.Mesh
    dataset: data.Dataset
    model: models.UNet
    schedule: Any
    meta: Meta
    start: transfer.Start | None  # what is not initialised, but taken from elsewhere
    init: Any  # () -> TrainState, all of it initialised
    train_step: Any  # (state, batch) -> (state, stats), jitted
    eval_step: Any  # (variables, batch) -> stats, jitted
    shapes: TrainState  # of the state, with where each part of it lies
    kept: resident.Kept  # () -> the training set on the devices, or None
    step_with: Any  # normalisation -> one training step of one batch, not jitted
    evaluation_with: Any  # normalisation -> the evaluation step, not jitted

    @property
    def steps_per_call(self) -> int:
        """Training steps that a call of ``train_step`` makes."""
        return self.config["train"].get("steps_per_call", 1)

    def begin(self) -> TrainState:
        """The state at step 0, with the weights that the config names."""
        state = self.init()
        if self.start is None:
            return state
        state = transfer.into(state, self.start.variables)
        where = jax.tree.map(lambda x: x.sharding, self.shapes)
        return jax.device_put(state, where)

    def _crops(self) -> dict[str, Any]:
        """What decides the crops of the training."""
        train = self.config["train"]
        return {
            "seed": self.config["seed"],
            "batch_size": train["batch_size"],
            "crop": train["crop"],
            "margin": models.margin(self.model, self.dataset.rank),
            "foreground": train.get("foreground", 0.0),
        }

    def train_batches(self, start: int, *, together: int = 1) -> Iterator[Batch]:
        """A batch a step from step ``start`` on, this process's rows of it.

        Args:
            start: Updates done.
            together: Steps of which the batches come as one, with an axis of steps.
        """
        batch_size = self.config["train"]["batch_size"]
        return data.train_batches(
            self.dataset.train,
            **self._crops(),
            start=start,
            rows=sharding.own_rows(self.mesh, batch_size),
            together=together,
            threads=read_threads(self.config, _bytes(self._sent_shapes())),
        )

    def batch_shapes(self) -> Any:
        """What ``train_step`` takes, as shapes with where they lie.

        Reads one crop, or, where they are kept on the device, all examples.
        """
        sent = self._sent_shapes()
        if (kept := self.kept()) is None:
            return sent
        batch_size, together = self.config["train"]["batch_size"], self.steps_per_call
        return resident.shapes(
            kept, self.mesh, batch_size=batch_size, together=together
        )

    def _sent_shapes(self) -> Any:
        """The shapes of batches that are cut on the host; reads one crop."""
        train, mesh = self.config["train"], self.mesh
        rows, count = train["batch_size"], self.steps_per_call
        asked = {**self._crops(), "batch_size": 1, "foreground": 0.0}
        one = next(data.train_batches(self.dataset.train, **asked, threads=0))
        pmap = self.config.get("mesh", {}).get("pmap", False)

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            size = (rows, *x.shape[1:])
            if x.ndim > 1:
                space = mesh.shape["space"]
                size = (rows, x.shape[1] + -x.shape[1] % space, *x.shape[2:])
            if pmap:
                size = (mesh.size, rows // mesh.size, *size[1:])
            stacked = count > 1
            size = (count, *size) if stacked else size
            at = sharding.split(mesh, len(size), stacked=stacked)
            return jax.ShapeDtypeStruct(size, x.dtype, sharding=at)

        return jax.tree.map(shape, one)

    def evaluation_shapes(self) -> Any:
        """What ``eval_step`` takes first, as shapes; reads one example."""
        mesh, rows = self.mesh, self.config["train"]["eval_batch_size"]
        pads = partial(models.pads, self.model, space=mesh.shape["space"])
        source = self.dataset.evaluation
        one = next(data.eval_batches(source, batch_size=1, pads=pads, threads=0))

        def shape(x: Any) -> jax.ShapeDtypeStruct:
            size = (sharding.round_up(mesh, rows), *x.shape[1:])
            if x.ndim > 1:
                size = (size[0], size[1] + -size[1] % mesh.shape["space"], *size[2:])
            at = sharding.split(mesh, len(size))
            return jax.ShapeDtypeStruct(size, x.dtype, sharding=at)

        return jax.tree.map(shape, one)

    def batch_bytes(self) -> int:
        """What a batch takes of a device, of which a few wait there.

        The examples that are kept there are not of a batch.
        """
        shapes = self.batch_shapes()
        return _bytes({key: x for key, x in shapes.items() if key != "resident"})

    def _evaluation_bytes(self, batch_size: int) -> int:
        """What a batch of the evaluation takes of the host, by its first example."""
        pixels = math.prod(self.dataset.evaluation.size(0))
        labels = len(self.meta.label_names) if self.meta.task == "labels" else 1
        image = self.dataset.channels * self.dataset.dtype.itemsize
        return batch_size * pixels * (image + 5 * labels)

    def costs(self) -> compiled.Costs:
        """What a training step costs each device; compiles it."""
        program = self.train_step.lower(self.shapes, self.batch_shapes()).compile()
        return compiled.costs(program)

    def placed_batches(self, start: int) -> Iterator[Any]:
        """What ``train_step`` takes, from step ``start`` on, on the mesh."""
        together, mesh = self.steps_per_call, self.mesh
        stacked = together > 1
        if (kept := self.kept()) is not None:
            asked = self._crops()
            read = data.crop_reader(self.dataset.train, np.asarray(kept.size), **asked)
            # Examples are only read to find the foreground in them.
            threads = read_threads(self.config, 0) if asked["foreground"] else 0
            crops = data.endless(read, start=start, together=together, threads=threads)
            return resident.placed(crops, kept, mesh, stacked=stacked)
        batches: Iterator[Any] = self.train_batches(start, together=together)
        if self.config.get("mesh", {}).get("pmap", False):
            batches = map(partial(_dealt, devices=mesh.size), batches)
        return sharding.prefetch(batches, mesh, stacked=stacked)

    def evaluate(self, state: TrainState, *, keep: int = 0) -> Evaluation:
        """Evaluates the evaluation split, whole images."""
        batch_size = sharding.round_up(
            self.mesh, self.config["train"]["eval_batch_size"]
        )
        batches = data.eval_batches(
            self.dataset.evaluation,
            batch_size=batch_size,
            pads=partial(models.pads, self.model, space=self.mesh.shape["space"]),
            rows=sharding.own_rows(self.mesh, batch_size),
            threads=read_threads(self.config, self._evaluation_bytes(batch_size)),
        )
        return evaluate(
            self.eval_step,
            state.variables,
            batches,
            mesh=self.mesh,
            task=self.meta.task,
            label_names=self.meta.label_names,
            keep=keep,
        )


def read_threads(config: dict[str, Any], batch_bytes: int) -> int:
    """How many threads read batches ahead: as asked, else one a core and at most 8.

    Each holds a batch: of large ones there are fewer, so that all stay below a GB.

    Args:
        config: Of a run.
        batch_bytes: Of a batch, on the host.
    """
    most = max(2**30 // max(batch_bytes, 1), 1)
    return config["train"].get("threads", 0) or min(os.cpu_count() or 1, 8, most)


def _bytes(shapes: Any) -> int:
    """What arrays of these shapes take of a device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(shapes)
    )


def _dealt(batch: Batch, *, devices: int) -> Any:
    """``[B, ...]`` -> ``[devices, B / devices, ...]``."""
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)


class _Net(NamedTuple):
    """The net by its name, what it starts from, and what it knows of PyTorch."""

    name: str
    model: models.UNet
    start: transfer.Start | None
    torch: dict[str, Any]

    def remade(self, remat: int) -> "_Net":
        """The same net, recomputing so many levels."""
        return self._replace(model=self.model.clone(remat=remat))


def _net(config: dict[str, Any], dataset: data.Dataset, stored: Meta | None) -> _Net:
    """The net of a config."""
    fields = dict(config["model"])
    before = None if stored is None else stored.config.get("model", {})
    for key in ("weights", "encoder_weights"):
        if before is not None and bool(fields.get(key)) != bool(before.get(key)):
            raise InputError(
                f"the workdir holds a run that began with model.{key} ="
                f" {before.get(key)}, and this config says {fields.get(key)}: use"
                " another --workdir, or that key."
            )
    weights = fields.pop("weights", None)
    encoder_weights = fields.pop("encoder_weights", None)
    if weights and encoder_weights:
        raise InputError(
            f"model.weights = {weights} has an encoder of its own: leave out"
            " model.encoder_weights."
        )
    classes = len(dataset.label_names)
    image = {"channels": dataset.channels, "rank": dataset.rank}
    if weights and stored is not None:  # the run goes on from its own checkpoint
        model = transfer.again(stored, fields)
        return _Net(stored.model["name"], model, None, stored.torch)
    if weights:
        start = transfer.start(weights, fields, num_classes=classes, **image)
        return _Net(start.name, start.model, start, start.torch)
    name = fields["name"]
    model = models.build(**fields, num_classes=classes)
    if not encoder_weights or stored is not None:
        return _Net(name, model, None, {})
    start = transfer.encoder(model, encoder_weights, **image)
    return _Net(name, model, start, {})


def build(
    config: dict[str, Any],
    mesh: jax.sharding.Mesh,
    stored: Meta | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Wires a run from a config; reads the data, compiles nothing that is said.

    ``train.batch_size = 0`` and ``model.remat = -1`` are found by compiling: the
    largest batch, or the fewest levels to compute again, that fit ``train.memory_gb``
    or what the device says it has. A run that goes on keeps what was found.

    Args:
        config: The sections of ``configs/default.py``, without the keys left at None.
        mesh: Where it runs.
        stored: What the run is if it goes on (`unet_jax.checkpoint.stored_meta`); the
            weights that it started from are then not read.
        say: Is told what was compiled to find them.

    Raises:
        InputError: What cannot work.
    """
    options.check(config, whole=False)
    config = _as_found(config, stored)
    batch_size, remat = config["train"]["batch_size"], config["model"].get("remat", 0)
    unit = mesh.shape["data"] * max(config["train"]["accumulate"], 1)
    trial = _with(config, batch_size or unit, max(remat, 0))
    feasible.check(trial, mesh)
    dataset = data.build(
        task=trial["task"],
        share=(jax.process_index(), jax.process_count()),
        **trial["data"],
    )
    train = trial["train"]
    if len(train["crop"]) != dataset.rank:
        raise InputError(
            f"train.crop = {train['crop']} has {len(train['crop'])} axes and the images"
            f" have {dataset.rank}: give one size an axis."
        )
    net = _net(trial, dataset, stored)
    models.output_size(net.model, train["crop"])
    feasible.check_depth(net.model, train["crop"])
    feasible.check_space(net.model, train["crop"], mesh)
    stats = _normalisation(config, dataset, stored)
    kept = resident.Kept(
        dataset.train,
        crop=train["crop"],
        mesh=mesh,
        wanted=resident.wanted(config, mesh),
        threads=partial(read_threads, config),
        say=say,
    )
    compose = partial(_compose, mesh=mesh, dataset=dataset, stats=stats, kept=kept)
    if batch_size and remat >= 0:
        return compose(trial, net)
    if not batch_size and remat < 0:
        raise InputError(
            "train.batch_size = 0 and model.remat = -1 each ask for what fits, and one"
            " depends on the other: give one of them."
        )
    if jax.process_count() > 1:
        raise InputError(
            "train.batch_size = 0 and model.remat = -1 are not looked for by several"
            " processes: find them with --dry_run on one host, and give the numbers."
        )
    limit = _memory(train)

    def peak(number: int) -> int:
        new = (number, remat) if not batch_size else (batch_size, number)
        run = compose(_with(config, *new), net.remade(new[1]))
        found = run.costs().peak
        if found is None:
            raise InputError(
                "this backend does not tell what a compiled step needs: give"
                " train.batch_size and model.remat as numbers."
            )
        return found + sharding.AHEAD * run.batch_bytes()

    if not batch_size:
        most = len(dataset.train)
        batch_size = budget.largest_batch(
            peak, multiple=unit, limit=limit, most=max(most, unit), say=say
        )
    else:
        levels = net.model.depth + 1
        remat = budget.least_remat(peak, levels=levels, limit=limit, say=say)
    return compose(_with(config, batch_size, remat), net.remade(remat))


def _normalisation(
    config: dict[str, Any], dataset: data.Dataset, stored: Meta | None
) -> dict[str, Any]:
    """Of the run that goes on, if it is asked for the same; else of the training data.

    Measured again, it would change with every image that is added or has been lost.
    """
    kind = config["data"].get("normalisation", "auto")
    if stored is not None:
        same = stored.config.get("data", {}).get("normalisation") == kind
        if same and stored.normalisation.get("dtype") == dataset.dtype.name:
            return stored.normalisation
    return normalisation.measure(kind, normalisation.spread(dataset.train))


def _names(source: data.Source) -> tuple[int, str]:
    """How many examples there are, and a digest of their names in their order."""
    digest = hashlib.sha256()
    for i in range(len(source)):
        digest.update(source.name(i).encode(errors="surrogateescape") + b"\0")
    return len(source), digest.hexdigest()[:16]


def _with(config: dict[str, Any], batch_size: int, remat: int) -> dict[str, Any]:
    """A config with the two numbers that can be found."""
    train = {**config["train"], "batch_size": batch_size}
    model = dict(config["model"])
    if remat or "remat" in model:
        model["remat"] = remat
    return {**config, "train": train, "model": model}


def _as_found(config: dict[str, Any], stored: Meta | None) -> dict[str, Any]:
    """The config of a run that goes on, with the numbers found when it began."""
    if stored is None:
        return config
    before = stored.config
    batch_size, remat = config["train"]["batch_size"], config["model"].get("remat", 0)
    return _with(
        config,
        batch_size or before["train"]["batch_size"],
        before["model"].get("remat", 0) if remat < 0 else remat,
    )


def _memory(train: dict[str, Any]) -> int:
    """Bytes of a device that a step may use."""
    stated = train.get("memory_gb", 0.0)
    if stated < 0:
        raise InputError(f"train.memory_gb = {stated} must be 0 or more.")
    limit = int(stated * 2**30) or int((budget.device_memory() or 0) * FREE)
    if not limit:
        raise InputError(
            "this device does not say how much memory it has: state it, as in"
            " --config.train.memory_gb=16."
        )
    return limit


def _compose(
    config: dict[str, Any],
    net: "_Net",
    *,
    mesh: jax.sharding.Mesh,
    dataset: data.Dataset,
    stats: dict[str, Any],
    kept: resident.Kept,
) -> Run:
    """The run of a config in which nothing is left to find."""
    task, train = config["task"], config["train"]
    loss_fn = losses.build(task=task, **config["loss"])
    augment_fn = augment.build(**config["augment"])
    names, model = dataset.label_names, net.model
    source = config["data"]["source"]
    volumes = config["data"][source] if source in ("volumes", "nnunet") else {}
    known = figures(task, names)
    choose(known, train["monitor"], "train.monitor =")
    choose(known, config["plateau"]["monitor"], "plateau.monitor =")
    tx, schedule = optim.build(total_steps=train["steps"], **config["optim"])
    meta = Meta(
        model={"name": net.name, **models.fields(model)},
        task=task,
        label_names=names,
        normalisation=stats,
        channels=dataset.channels,
        rank=dataset.rank,
        spacing=volumes.get("spacing", ()),
        threshold=train["threshold"],
        config=config,
        torch=net.torch,
        examples={
            "train": _names(dataset.train),
            "evaluation": _names(dataset.evaluation),
        },
    )
    # The start runs once: on CPU, unoptimised, it compiles in 0.9 s instead of 3.3 s.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    quick = {"xla_backend_optimization_level": 0} if on_cpu else None
    shape = (train["batch_size"], *train["crop"], dataset.channels)
    init = partial(
        init_state,
        model,
        tx,
        seed=config["seed"],
        image_shape=shape,
        ema=train["ema"] > 0,
    )
    shapes = jax.eval_shape(init)
    where = sharding.state_shardings(
        shapes, mesh, fsdp=config.get("mesh", {}).get("fsdp", False)
    )

    def step_with(stats: Stats) -> Step:
        return make_train_step(model, tx, loss_fn, augment_fn, stats=stats, **options)

    def evaluation_with(stats: Stats) -> Callable[..., dict[str, Any]]:
        return make_eval_step(
            model, loss_fn, task=task, stats=stats, threshold=train["threshold"]
        )

    options = {"accumulate": train["accumulate"], "ema_decay": train["ema"]}
    if config.get("mesh", {}).get("pmap", False):
        train_step = make_pmap_train_step(
            model,
            tx,
            loss_fn,
            augment_fn,
            devices=list(mesh.devices.flat),
            stats=stats,
            **options,
        )
    else:
        # Where the augmentation gathers pixels, images need not be parted before it.
        step = resident.with_crops(step_with(stats), whole=augment_fn is not None)
        if train.get("steps_per_call", 1) > 1:
            step = several(step)
        train_step = jax.jit(
            sharding.within(mesh, step),
            in_shardings=(where, None),
            out_shardings=(where, sharding.replicated(mesh)),
            donate_argnums=0,
        )
    return Run(
        config=config,
        mesh=mesh,
        dataset=dataset,
        model=model,
        schedule=schedule,
        meta=meta,
        start=net.start,
        init=jax.jit(init, out_shardings=where, compiler_options=quick),
        train_step=train_step,
        eval_step=jit_eval_step(resident.with_crops(evaluation_with(stats)), mesh),
        kept=kept,
        step_with=step_with,
        evaluation_with=evaluation_with,
        shapes=jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            shapes,
            where,
        ),
    )
