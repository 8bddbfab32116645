"""``unet-jax evaluate``: the metrics of a data split."""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from unet_jax.cli import arguments as flags

if TYPE_CHECKING:
    from unet_jax.checkpoint import Meta
    from unet_jax.evaluation import Evaluation
    from unet_jax.measures import Rows


_EPILOG = """\
measures (--metrics, several with commas between them):
  pixels     Dice, IoU, precision, recall, accuracy (always)
  isbi2012   V_Rand and V_Info after thinning, pixel and Rand error
  objects    panoptic quality, AP, F1 and SEG of instances
  boundary   Hausdorff 95 and surface Dice of each class
  roads      relaxed break-even point
  nvidia     the Dice of NVIDIA's U-Net on ISBI 2012

  unet-jax evaluate --workdir=runs/isbi --metrics=isbi2012 --tta=symmetries --bootstrap
  unet-jax evaluate --workdir=runs/a --against=runs/b --metrics=objects --bootstrap
"""


def add(commands: Any) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "evaluate",
        help="print the metrics of a data split",
        description="Measures the net of a workdir on the data it was trained with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_workdir(command, several=True)
    flags.add_split(command)
    add = command.add_argument
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--metrics", metavar="NAMES", help="what to measure, see below (pixels)")
    add(
        "--bootstrap",
        type=int,
        nargs="?",
        const=1000,
        metavar="N",
        help="95 %% intervals by drawing the images anew N times (1000)",
    )
    add("--against", metavar="DIR", help="another workdir, compared image by image")
    add(
        "--tolerance",
        type=float,
        metavar="PIXELS",
        help="of surface Dice (1) and of roads (3)",
    )
    add(
        "--instances",
        metavar="METHOD",
        help="how objects are told apart: components, watershed or distance"
        " (components)",
    )
    flags.add_tiles(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stderr if arguments.json else sys.stdout)
    from unet_jax.checkpoint import load_for_inference

    workdirs = flags.workdirs(arguments.workdir)
    plain = (arguments.metrics, arguments.bootstrap, arguments.against)
    if plain != (None, None, None) or len(workdirs) > 1 or flags.tiled(arguments):
        return _measures(arguments, workdirs)
    model, variables, meta, step = load_for_inference(
        workdirs[0], which=arguments.which
    )
    meta, source, split = open_split(meta, arguments)
    found = _evaluation(model, variables, meta, source, arguments)
    counted = int(found.confusion.any(axis=tuple(range(1, found.confusion.ndim))).sum())
    about = _About(arguments.workdir, step, split, counted, len(source) - counted)
    if arguments.json:
        print(about.json({"results": found.results}))
        return
    print(about)
    print(table(found.results, meta.label_names))


class _About(NamedTuple):
    """What was measured of what; ``left_out`` are examples of which nothing counts."""

    workdir: str
    step: int
    split: str
    examples: int
    left_out: int

    def json(self, found: dict[str, Any]) -> str:
        return json.dumps({**self._asdict(), **_finite(found)})

    def __str__(self) -> str:
        text = f"{self.workdir}: step {self.step}, {self.examples} examples of"
        left = f"; {self.left_out} left out, of which nothing counts"
        return f"{text} {self.split}" + left * (self.left_out > 0)


def _finite(value: Any) -> Any:
    """For JSON, which has no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite else None


# --- Measures of their own -----------------------------------------------------------


def _measures(arguments: argparse.Namespace, workdirs: Sequence[str]) -> None:
    """Every image through a `Predictor`, then the figures, intervals, comparison."""
    from unet_jax import bootstrap
    from unet_jax.types import InputError

    if arguments.bootstrap is not None and arguments.bootstrap < 1:
        raise InputError(f"--bootstrap={arguments.bootstrap} must be 1 or more.")
    names = ["pixels", *(n for n in _names(arguments.metrics) if n != "pixels")]
    meta, step, source, split, found = _counted(arguments, workdirs, names)
    theirs = found
    if arguments.against is not None:
        other = flags.workdirs(arguments.against)
        _, _, against, _, theirs = _counted(arguments, other, names)
        _check_alike(arguments, source, against)
        # A file may have been lost in between.
        found, theirs = found.only(theirs.index), theirs.only(found.index)
    results: dict[str, float] = {}
    for rows, kind in found.of.values():
        results |= kind.summarise(rows)
    intervals, differences = {}, {}
    options = {"samples": arguments.bootstrap or 1000}
    if arguments.bootstrap is not None:
        for rows, kind in found.of.values():
            intervals |= bootstrap.intervals(rows, kind.summarise, **options)
    if arguments.against is not None:
        for name, (rows, kind) in found.of.items():
            differences |= bootstrap.differences(
                rows, theirs.of[name][0], kind.summarise, **options
            )
    counted = len(found.index)
    about = _About(arguments.workdir, step, split, counted, len(source) - counted)
    if arguments.json:
        parts: dict[str, Any] = {"results": results}
        if intervals:
            parts["intervals"] = {k: (v.low, v.high) for k, v in intervals.items()}
        if differences:
            parts["against"] = {
                "workdir": arguments.against,
                "differences": {k: v._asdict() for k, v in differences.items()},
            }
        print(about.json(parts))
        return
    print(about)
    rows, kind = found.of["pixels"]
    print(table(kind.summarise(rows), meta.label_names))
    if lines := _lines(results, intervals, differences):
        print("", *lines, sep="\n")
    if arguments.bootstrap is not None or differences:
        print(_NOTE.format(samples=options["samples"]))


_NOTE = (
    "[]: 95 % of {samples} samples of the images; what another seed of the training"
    " would change is not in it"
)


def _check_alike(arguments: argparse.Namespace, source: Any, other: Any) -> None:
    """Refuses to compare nets image by image on images that are not the same."""
    from unet_jax.types import InputError

    ours, theirs = ([s.name(i) for i in range(len(s))] for s in (source, other))
    if ours == theirs:
        return
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    first, second = ((s[at : at + 1] or ["none"])[0] for s in (ours, theirs))
    raise InputError(
        f"--against={arguments.against} has {len(theirs)} examples and the workdir"
        f" {len(ours)}, of which number {at + 1} is {second} there and {first} here:"
        " measure both nets on one --split, or on the data of one --config."
    )


def _names(text: str | None) -> list[str]:
    from unet_jax.measures import MEASURES
    from unet_jax.types import choose

    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        choose(MEASURES, name, "--metrics =")
    return names


def _counted(
    arguments: argparse.Namespace, workdirs: Sequence[str], names: Sequence[str]
) -> tuple["Meta", int, Any, str, "Rows"]:
    """The run, its step, source and split, and the rows of every measure."""
    from tqdm import tqdm

    from unet_jax import measures
    from unet_jax.predict import Predictor

    predictor = Predictor(
        workdirs, which=arguments.which, **flags.tile_options(arguments)
    )
    meta, source, split = open_split(predictor.meta, arguments)
    setting = measures.Setting(
        predictor=predictor,
        task=meta.task,
        label_names=meta.label_names,
        empty=arguments.empty,
        tolerance=arguments.tolerance,
        spacing=tuple(meta.spacing) or None,
        instances={"method": arguments.instances} if arguments.instances else {},
    )
    with tqdm(total=len(source), unit="image", disable=not sys.stderr.isatty()) as bar:
        found = measures.rows(names, setting, source, done=lambda _: bar.update())
    return meta, predictor.step, source, split, found


def _lines(
    results: Mapping[str, float],
    intervals: Mapping[str, Any],
    differences: Mapping[str, Any],
) -> list[str]:
    """A line a figure: those of the table only where there is more to say of them."""
    from unet_jax import metrics

    table = _COLUMNS if intervals or differences else ()
    shown = [
        key
        for key in results
        if key.split("/")[0] in table or key.split("/")[0] not in metrics.FIGURES
    ]
    width = max(map(len, shown), default=0)
    lines = []
    for key in shown:
        line = f"{key:<{width}}  {results[key]:8.4f}"
        if key in intervals:
            line += f"  [{intervals[key].low:.4f}, {intervals[key].high:.4f}]"
        if key in differences:
            gain = differences[key]
            line += f"  against: {results[key] + gain.value:.4f}, {gain.value:+.4f}"
            line += f" [{gain.low:+.4f}, {gain.high:+.4f}], p = {gain.p:.3f}"
        lines.append(line)
    return lines


# --- The data ------------------------------------------------------------------------


def open_split(meta: "Meta", arguments: argparse.Namespace) -> tuple["Meta", Any, str]:
    """What the run is, with its data and loss; the source of a split; which, in words.

    Data and loss are those of ``--config`` if there is one. A net from PyTorch whose
    classes nobody has named takes their names from the data.
    """
    import dataclasses

    from unet_jax import data
    from unet_jax import options as keys
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
    # Of the training part too it is the plain label that is measured.
    options.pop("border", None)
    # What is done at loading is part of the net.
    options["normalisation"] = meta.normalisation["kind"]
    if arguments.root is not None:
        options["root"] = arguments.root
    if split not in ("train", "evaluation"):
        options |= {"train": split, "evaluation": split}
    keys.check_data(options)
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
    return _evaluation(model, variables, meta, source, arguments).results


def _evaluation(
    model: Any,
    variables: Any,
    meta: "Meta",
    source: Any,
    arguments: argparse.Namespace,
) -> "Evaluation":
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
    return evaluate(
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


_COLUMNS = ("dice", "iou", "precision", "recall", "image_dice", "image_iou")


def table(results: Mapping[str, float], label_names: Sequence[str]) -> str:
    """The figures of an evaluation as text.

    Args:
        results: Of `unet_jax.metrics.summarise`, and ``loss``.
        label_names: The rows.

    Returns:
        A row a name (pooled scores, then means over images), then the overall figures.
    """
    keys = _COLUMNS
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
