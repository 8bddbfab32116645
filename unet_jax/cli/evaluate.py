"""``unet-jax evaluate``: the metrics of a data split."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from unet_jax.cli import arguments as flags

if TYPE_CHECKING:
    from unet_jax.checkpoint import Meta


def add(commands: Any) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "evaluate",
        help="print the metrics of a data split",
        description="Measures the net of a workdir on the data it was trained with.",
    )
    flags.add_workdir(command)
    flags.add_split(command)
    add = command.add_argument
    add("--json", action="store_true", help="print JSON instead of tables")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stderr if arguments.json else sys.stdout)
    from unet_jax.checkpoint import load_for_inference

    model, variables, meta, step = load_for_inference(
        arguments.workdir, which=arguments.which
    )
    meta, source, split = open_split(meta, arguments)
    results = measure(model, variables, meta, source, arguments)
    if arguments.json:
        head = {"workdir": arguments.workdir, "step": step, "split": split}
        finite = {k: v if math.isfinite(v) else None for k, v in results.items()}
        print(json.dumps({**head, "examples": len(source), "results": finite}))
        return
    print(f"{arguments.workdir}: step {step}, {len(source)} examples of {split}")
    print(table(results, meta.label_names))


def open_split(meta: "Meta", arguments: argparse.Namespace) -> tuple["Meta", Any, str]:
    """What the run is, with its data and loss; the source of a split; which, in words.

    Data and loss are those of ``--config`` if there is one. A net from PyTorch whose
    classes nobody has named takes their names from the data.
    """
    import dataclasses

    from unet_jax import data
    from unet_jax.convert import label_names
    from unet_jax.types import InputError

    config = flags.config(arguments)
    if config is not None:
        meta = dataclasses.replace(meta, config=config)
    if "data" not in meta.config:
        raise InputError(
            f"{arguments.workdir} holds a net without data of its own: give"
            " --config=FILE, a config of train.py whose sections data and loss say what"
            " to measure it on."
        )
    options, split = dict(meta.config["data"]), arguments.split
    # What is done at loading is part of the net.
    options["normalisation"] = meta.normalisation["kind"]
    if arguments.root is not None:
        options["root"] = arguments.root
    if split not in ("train", "evaluation"):
        options |= {"train": split, "evaluation": split}
    dataset = data.build(task=meta.task, **options)
    count = len(meta.label_names)
    unnamed = meta.torch and meta.label_names == label_names(meta.task, count)
    if unnamed and len(dataset.label_names) == count:
        meta = dataclasses.replace(meta, label_names=dataset.label_names)
    for what in ("label_names", "channels", "rank"):
        found, trained = getattr(dataset, what), getattr(meta, what)
        if found != trained:
            raise InputError(
                f"the split {split!r} has {what} = {found} and the run was trained with"
                f" {trained}: evaluate it on data like its own."
            )
    if split == "train":
        return meta, dataset.train, options["train"]
    return meta, dataset.evaluation, options["evaluation"]


def measure(
    model: Any,
    variables: Any,
    meta: "Meta",
    source: Any,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """What the training run would measure, on however many devices there are here."""
    from functools import partial

    import jax

    from unet_jax import data, losses, models, sharding
    from unet_jax.evaluation import evaluate, jit_eval_step, make_eval_step

    mesh = sharding.make_mesh()
    batch_size = arguments.batch_size
    if batch_size:
        sharding.check_batch(mesh, batch_size, "--batch_size")
    else:
        wanted = meta.config.get("train", {}).get("eval_batch_size", 1)
        batch_size = sharding.round_up(mesh, wanted)
    step = make_eval_step(
        model,
        losses.build(task=meta.task, **meta.config["loss"]),
        task=meta.task,
        stats=meta.normalisation,
        threshold=meta.threshold,
    )
    found = evaluate(
        jit_eval_step(step, mesh),
        jax.device_put(variables, sharding.replicated(mesh)),
        data.eval_batches(
            source, batch_size=batch_size, pads=partial(models.pads, model)
        ),
        mesh=mesh,
        task=meta.task,
        label_names=meta.label_names,
        empty=arguments.empty,
    )
    return found.results


def table(results: Mapping[str, float], label_names: Sequence[str]) -> str:
    """The figures of an evaluation as text.

    Args:
        results: Of `unet_jax.metrics.summarise`, and ``loss``.
        label_names: The rows.

    Returns:
        A row a name (pooled scores, then means over images), then the overall figures.
    """
    keys = ("dice", "iou", "precision", "recall", "image_dice", "image_iou")
    width = max(len("mean"), *(len(name) for name in label_names))
    lines = [" " * width + "".join(f"{key:>12}" for key in keys)]
    for name in label_names:
        cells = "".join(f"{results[f'{key}/{name}']:12.4f}" for key in keys)
        lines.append(f"{name:<{width}}{cells}")
    means = [f"{results[k]:12.4f}" if k in results else " " * 12 for k in keys]
    lines += [f"{'mean':<{width}}{''.join(means)}".rstrip(), ""]
    overall = [k for k in results if "/" not in k and k not in keys]
    lines += [f"{key:<15}{results[key]:.4f}" for key in overall]
    inner = [name for name in label_names if name != "background"]
    counted = "all" if len(inner) == len(label_names) else "all but background"
    lines.append(
        f"dice to recall: of all pixels pooled; image_*: mean of the images' own; mean:"
        f" of {counted}"
    )
    return "\n".join(lines)
