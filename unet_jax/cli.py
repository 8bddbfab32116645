"""The console command ``unet-jax``: a trained workdir, or a net, from the outside.

A user's mistake ends in one sentence on stderr and exit status 2. Everything heavy is
imported by the subcommand that needs it, so that ``--help`` answers at once.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_jax.checkpoint import Meta
    from unet_jax.predict_files import Job

_VALUES = """\
What is written, in the size of the input:
  IMAGE.png            of a 2-D image; IMAGE.tif of a stack; IMAGE.nii.gz of a NIfTI
                       volume, with its affine and header
  values               class ids; of two classes, and of a label, 0 and 255 so that
                       viewers show them (in NIfTI 0 and 1)
  IMAGE_NAME.png       one file a label, for a run with several labels (task "labels")
  IMAGE_probability.npy   float32 [height, width, classes], with --probabilities
  IMAGE_overlay.png    the label drawn on the image, with --overlay
"""


_CONVERT = """\
  unet-jax convert unet.pth --out=runs/unet --classes=background,cell
  unet-jax convert unet.pth --out=runs/unet --mean=0.485,0.456,0.406 \\
      --std=0.229,0.224,0.225
  unet-jax convert unet.pth --check=image.png --module="unet.py:UNet(3, 2)"
  unet-jax convert runs/unet --out=back.safetensors
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 0, 2 for a user's mistake, or 1 for a check that failed.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    arguments.changes = [text for text in unknown if text.startswith("--config.")]
    free = arguments.run is _shapes or getattr(arguments, "config", None) is not None
    if unknown and (arguments.changes != unknown or not free):
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from unet_jax.types import InputError

    try:
        return arguments.run(arguments) or 0
    except InputError as error:
        sys.stdout.flush()
        print(f"unet-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unet-jax: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from unet_jax import __version__

    parser = argparse.ArgumentParser(
        prog="unet-jax", description="Look at U-Nets, and use what was trained."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_predict(commands)
    _add_evaluate(commands)
    _add_prune(commands)
    _add_convert(commands)
    _add_shapes(commands)
    _add_features(commands)
    return parser


def _add_predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="segment files with a trained net",
        description="Segments files with the net of a workdir; needs nothing else.",
        epilog=_VALUES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_workdir(command)
    add = command.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders or quoted globs")
    add("--out", required=True, metavar="DIR", help="folder to write to")
    add(
        "--tile",
        type=int,
        default=0,
        metavar="PIXELS",
        help="work through larger images in tiles of this size (0: never)",
    )
    add(
        "--overlap",
        type=float,
        default=0.25,
        metavar="PART",
        help="part of a tile that overlaps the next, from 0 to below 1 (0.25)",
    )
    add(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="tiles run together (1)",
    )
    add("--probabilities", action="store_true", help="write the probabilities as well")
    add("--overlay", action="store_true", help="write a picture of label on image")
    command.set_defaults(run=_predict)


def _add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="print the metrics of a data split",
        description="Measures the net of a workdir on the data it was trained with.",
    )
    _add_workdir(command)
    _add_split(command)
    add = command.add_argument
    add("--json", action="store_true", help="print JSON instead of tables")
    command.set_defaults(run=_evaluate)


def _add_prune(commands: Any) -> None:
    command = commands.add_parser(
        "prune",
        help="what a UNet++ costs and scores cut off at each level",
        description="Cuts a UNet++ that was trained with deep supervision off at each"
        " level and prints its parameters, FLOPs, latency and scores there.",
    )
    _add_workdir(command)
    _add_split(command)
    add = command.add_argument
    add("--level", type=int, metavar="L", help="write the net cut off at this level")
    add("--out", metavar="DIR", help="workdir to write it to")
    add(
        "--repeats", type=int, default=20, metavar="N", help="timed passes of each (20)"
    )
    command.set_defaults(run=_prune)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="PyTorch weights to a workdir, and back",
        description="Makes a workdir of a PyTorch checkpoint, for predict, evaluate\n"
        "and train.py; or a file for PyTorch of a workdir. Without --out it says what\n"
        "is in the file. Nothing there is executed; PyTorch is needed for --check,\n"
        "and to write .pth.",
        epilog=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add(
        "weights", metavar="WEIGHTS", help="a .pth, .pt, .ckpt, .safetensors; a workdir"
    )
    add("--out", metavar="PATH", help="a new workdir; or x.safetensors, x.pth")
    add("--family", metavar="NAME", help="of docs/torch.md (recognised)")
    group = command.add_argument_group("PyTorch to a workdir")
    add = group.add_argument
    add(
        "--option",
        action="append",
        metavar="KEY=VALUE",
        help="of the family, what its weights do not say; may be repeated",
    )
    add(
        "--classes",
        metavar="NAMES",
        help="background,cell; or a number. If the net has another number, its head"
        " starts anew",
    )
    add("--task", help="classes (softmax) or labels (sigmoid)")
    add(
        "--normalisation",
        metavar="KIND",
        help="range (white is 1), standard, or example (range)",
    )
    add("--mean", metavar="M,M,M", help="that the net was trained with, of 0..1 pixels")
    add("--std", metavar="S,S,S", help="likewise")
    add("--config", metavar="FILE", help="a config of train.py: its data and loss")
    add("--seed", type=int, default=0, metavar="N", help="of what starts anew (0)")
    group = command.add_argument_group("a workdir to PyTorch")
    add = group.add_argument
    add("--dtype", help="float32, float16, bfloat16, float64 (that it came in)")
    add("--which", type=_which, help="checkpoint: best, latest or a step (best)")
    group = command.add_argument_group("comparing with PyTorch")
    add = group.add_argument
    add("--check", metavar="IMAGE", help="compare every layer on this image")
    add(
        "--module",
        metavar="FILE.py:EXPRESSION",
        help="with your own net, such as 'unet.py:UNet(3, 2)', from end to end; this"
        " RUNS the code of that file",
    )
    add(
        "--tolerance",
        type=float,
        default=2e-5,
        metavar="PART",
        help="of a layer's largest value (2e-5)",
    )
    command.set_defaults(run=_convert)


def _add_shapes(commands: Any) -> None:
    command = commands.add_parser(
        "shapes",
        help="print and draw a net with the shape at every node",
        description="Prints the U: every shape, what skips carry and what is cut"
        " off them, parameters, FLOPs and receptive field of each level.",
        epilog="Any key of the config's model can be changed, as in train.py:"
        ' --config.model.name=unetpp --config.model.features="(32,64,128)".',
    )
    add = command.add_argument
    add("--config", metavar="FILE", help="a config of train.py; without it plain U-Net")
    add("--workdir", metavar="DIR", help="instead: where train.py wrote")
    add(
        "--size",
        metavar="SIZE",
        help="of the image: 572, 256x320 or 32x48x32 (the config's train.crop)",
    )
    add("--channels", type=int, default=1, metavar="C", help="of the image (1)")
    add("--classes", type=int, default=2, metavar="K", help="of the answer (2)")
    add("--out", metavar="FILE", help="draw it, as .png or .svg")
    command.set_defaults(run=_shapes)


def _add_features(commands: Any) -> None:
    command = commands.add_parser(
        "features",
        help="draw what a trained net makes of an image, or follow one pixel",
        description="Draws the strongest feature maps and the attention gates of every"
        " level as one picture.",
    )
    _add_workdir(command)
    add = command.add_argument
    add("image", metavar="IMAGE", help="a file that predict can read")
    add("--out", metavar="FILE", help="the picture (IMAGE_features.png, right here)")
    add("--maps", type=int, default=8, metavar="N", help="channels of each level (8)")
    add("--pixel", metavar="Y,X", help="follow this pixel down and up, counted from 0")
    command.set_defaults(run=_features)


def _add_split(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--split",
        default="evaluation",
        help="evaluation or train, as in the run's config, or a split such as test or"
        " 'train[:20%%]' (evaluation)",
    )
    add("--config", metavar="FILE", help="a config of train.py: other data and loss")
    add("--root", metavar="DIR", help="where the data is now, if it has moved")
    add(
        "--empty",
        default="skip",
        choices=("skip", "one", "zero"),
        help="what the score of a class is where it is neither in the truth nor in the"
        " prediction: left out, 1 or 0 (skip)",
    )
    add("--batch_size", type=int, default=0, metavar="N", help="images run together")


def _add_workdir(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--workdir", required=True, metavar="DIR", help="where train.py wrote")
    add(
        "--which",
        type=_which,
        default="best",
        help="checkpoint: best, latest or a step (best)",
    )


def _which(text: str) -> str:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not best, latest or a step")
    return text


# --- predict -------------------------------------------------------------------------


def _predict(arguments: argparse.Namespace) -> None:
    _say_devices(sys.stdout)
    from unet_jax.predict import Predictor
    from unet_jax.predict_files import predict_files

    predictor = Predictor(
        arguments.workdir,
        which=arguments.which,
        tile=arguments.tile,
        overlap=arguments.overlap,
        batch_size=arguments.batch_size,
    )
    names = ", ".join(predictor.meta.label_names)
    print(f"{arguments.workdir}: step {predictor.step}, {names}")

    def done(job: "Job") -> None:
        print(f"{job.path} -> {', '.join(map(str, job.outputs))}", flush=True)

    begin = time.perf_counter()
    jobs = predict_files(
        predictor,
        arguments.images,
        arguments.out,
        probabilities=arguments.probabilities,
        overlay=arguments.overlay,
        done=done,
    )
    print(f"{len(jobs)} file(s) in {time.perf_counter() - begin:.1f} s")


# --- prune ---------------------------------------------------------------------------


def _prune(arguments: argparse.Namespace) -> None:
    _say_devices(sys.stdout)
    from unet_jax import pruning
    from unet_jax.checkpoint import load_for_inference
    from unet_jax.types import InputError, choose, size_text

    if (arguments.level is None) != (arguments.out is None):
        raise InputError(
            "--level and --out go together: the level to cut off at, and the folder to"
            " write the smaller net to."
        )
    model, variables, meta, step = load_for_inference(
        arguments.workdir, which=arguments.which
    )
    pruning.check(model, arguments.workdir)
    if arguments.level is not None:
        choose(range(1, model.depth + 1), arguments.level, "--level =")
    meta, source, split = _open_split(meta, arguments)
    image = source[0]["image"]
    levels = pruning.measure(
        model,
        variables,
        image=image,
        stats=meta.normalisation,
        evaluate=lambda small, needed: _measure(small, needed, meta, source, arguments),
        repeats=arguments.repeats,
    )
    size = size_text(image.shape[:-1])
    print(f"{arguments.workdir}: step {step}, {len(source)} examples of {split}")
    print(pruning.table(levels))
    print(
        f"FLOPs and latency (median of {arguments.repeats} passes in turns): of one"
        f" image of {size}; Dice and IoU: pooled, mean of all classes but background"
    )
    if arguments.level is not None:
        chosen = levels[arguments.level - 1]
        where = pruning.write(chosen, meta, step, arguments.out)
        print(f"level {arguments.level} is written to {where}: predict with it")


# --- convert -------------------------------------------------------------------------


def _convert(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from unet_jax import convert, torch_weights
    from unet_jax.types import InputError

    names = ("option", "classes", "task", "normalisation", "mean", "std", "config")
    inward = (*names, "check", "module")
    if not Path(arguments.weights).exists():
        raise InputError(
            f"there is no {arguments.weights}: give a file of weights, or a workdir"
            " whose net is to be written for PyTorch."
        )
    back = Path(arguments.weights).is_dir()
    for name in inward if back else ("dtype", "which"):
        if getattr(arguments, name) is not None:
            what = "a workdir" if back else "a file of weights"
            raise InputError(
                f"--{name} is not for {what} such as {arguments.weights}: leave it out."
            )
    if back:
        if arguments.out is None:
            raise InputError(
                f"{arguments.weights} is a workdir: say which file to write for"
                " PyTorch, such as --out=back.safetensors."
            )
        options = {"family": arguments.family, "dtype": arguments.dtype}
        which = arguments.which or "best"
        print(convert.file(arguments.weights, arguments.out, which=which, **options))
        return 0
    if arguments.module is not None and arguments.check is None:
        raise InputError("--module needs an image to compare on: give --check=IMAGE.")
    if arguments.out is not None:
        convert.check_free(arguments.out)
    found = torch_weights.read(
        arguments.weights, arguments.family, **_options(arguments.option or ())
    )
    print(convert.summary(found, arguments.weights), flush=True)
    classes = arguments.classes
    meta = convert.meta_of(
        found,
        arguments.weights,
        classes=None if classes is None else convert.parse_classes(classes),
        task=arguments.task,
        kind=arguments.normalisation,
        mean=_numbers("mean", arguments.mean),
        std=_numbers("std", arguments.std),
        config=_config(arguments),
    )
    if arguments.check is not None and not _check(found, meta, arguments):
        if arguments.out is not None:
            print(f"{arguments.out} is not written")
        return 1
    if arguments.out is None:
        if arguments.check is None:
            print("nothing is written: give --out=DIR for a workdir")
        return 0
    anew = convert.workdir(found, meta, arguments.out, seed=arguments.seed)
    print(convert.written(found, meta, arguments.out, anew))
    return 0


def _check(found: Any, meta: "Meta", arguments: argparse.Namespace) -> bool:
    """Prints the comparison with PyTorch; whether all layers agree."""
    import jax

    from unet_jax import feature_sheet, parity
    from unet_jax.predict import Predictor
    from unet_jax.types import size_text

    there = parity.torch()
    predictor = Predictor.from_model(found.model, found.variables, meta)
    image = feature_sheet.read(predictor, arguments.check)
    pixels = predictor.prepare(image, name=arguments.check)
    given = parity.prepared(found.model, pixels, meta.normalisation)
    size, version = size_text(given.shape[1:]), there.__version__
    kind = jax.devices()[0].device_kind
    print(f"\n{arguments.check}, as the net gets it ({size}),")
    print(f"in JAX ({kind}) and in PyTorch {version} (cpu),", end=" ")
    if arguments.module is None:
        print(
            "each layer by itself:\nthere with the file's own tensors, on what it gets"
            " here. What lies between the layers\n(activations, pooling, interpolation,"
            " joining) is not compared: --module does that."
        )
        rows = parity.layers(found, given)
    else:
        print(f"from end to end, in the\norder of execution of {arguments.module}:")
        rows = parity.modules(found, parity.load_module(arguments.module), given)
    print(f"\n{parity.table(rows, arguments.tolerance)}\n")
    print(parity.verdict(rows, arguments.tolerance), flush=True)
    return parity.first_over(rows, arguments.tolerance) is None


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as options of a family."""
    from unet_jax.types import InputError

    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--option={text} must be --option=KEY=VALUE.")
        options[key] = _literal(value)
    return options


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    """``0.5,0.5,0.5`` -> numbers."""
    from unet_jax.types import InputError

    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.strip("()[] ").split(","))
    except ValueError as error:
        raise InputError(
            f"--{name}={text} must be numbers with commas between them: 0.5,0.5,0.5."
        ) from error


def _literal(text: str) -> Any:
    """What Python reads a text as, else the text."""
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# --- shapes and features -------------------------------------------------------------


def _shapes(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from unet_jax import diagram, models
    from unet_jax.types import InputError

    channels, config = arguments.channels, {}
    if arguments.workdir is not None:
        if arguments.config is not None or arguments.changes:
            raise InputError(
                f"--workdir={arguments.workdir} has a net of its own: leave out"
                " --config, or leave out --workdir."
            )
        from unet_jax.checkpoint import load_for_inference

        model, _, meta, _ = load_for_inference(arguments.workdir, which="latest")
        channels, config = meta.channels, meta.config
    else:
        if arguments.config is not None:
            config = _read_config(arguments.config)
        fields = {**config.get("model", {"name": "unet"}), **_changes(arguments)}
        fields.pop("encoder_weights", None)
        weights = fields.pop("weights", None)
        model = models.build(**fields, num_classes=arguments.classes)
        if weights:  # of which the net is; as train.py builds it
            from unet_jax import transfer

            model = transfer.adapted(transfer.read(weights).model, fields)
    size = _size(arguments.size, config)
    out = Path(arguments.out) if arguments.out else None
    diagram.print_and_draw(model, size, channels, out)


def _config(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The config of ``--config=FILE`` with its ``--config.KEY=VALUE``, or None."""
    if arguments.config is None:
        return None
    return _read_config(arguments.config, arguments.changes)


def _read_config(path: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """A config file of train.py as plain data, without the keys that are None.

    Args:
        path: The file.
        changes: ``--config.KEY=VALUE``.
    """
    import re
    import runpy
    from pathlib import Path

    from unet_jax.types import InputError

    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no config {path}: give a file like configs/x.py.")
    # As train.py is started: a config may import others beside it.
    sys.path.insert(0, str(file.absolute().parent.parent))
    try:
        config = runpy.run_path(str(file))["get_config"]()
    finally:
        sys.path.pop(0)
    config.lock()  # so that a key which is not there is refused
    for text in changes:
        key, _, value = text.removeprefix("--config.").partition("=")
        try:
            config.update_from_flattened_dict({key: _literal(value)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            why = re.sub(" and cannot be added.*}", "", str(error), flags=re.DOTALL)
            why = re.sub(r"[\s'\"\\]+", " ", why.replace("\\n", " ")).strip()
            raise InputError(f"{text} does not change {path}: {why}") from error

    def chosen(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: chosen(v) for k, v in value.items() if v is not None}

    return chosen(config.to_dict())


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """``--config.model.KEY=VALUE`` as fields of the net."""
    from unet_jax.models import UNet
    from unet_jax.types import InputError, choose

    fields: dict[str, Any] = {}
    known = {"name", *UNet.__dataclass_fields__} - {"parent", "num_classes"}
    for text in arguments.changes:
        key, _, value = text.partition("=")
        if not key.startswith("--config.model.") or not value:
            raise InputError(
                f"{text} does not change the net: write --config.model.KEY=VALUE."
            )
        name = choose(known, key.removeprefix("--config.model."), "--config.model.")
        fields[name] = _literal(value)
    return fields


def _size(text: str | None, config: Mapping[str, Any]) -> tuple[int, ...]:
    """``572`` or ``256x320`` -> a number for each axis."""
    from unet_jax.types import InputError

    crop = config.get("train", {}).get("crop", (256, 256))
    if text is None:
        return tuple(crop)
    parts = text.lower().replace(",", "x").split("x")
    numbers = tuple(int(part) for part in parts if part.strip().isdecimal())
    if len(numbers) != len(parts) or min(numbers) < 1 or len(numbers) > 3:
        raise InputError(f"--size={text} is no size: write 572, 256x320 or 32x48x32.")
    return numbers * len(crop) if len(numbers) == 1 else numbers


def _features(arguments: argparse.Namespace) -> None:
    _say_devices(sys.stdout)
    from pathlib import Path

    from unet_jax import feature_sheet
    from unet_jax.predict import Predictor

    pixel = feature_sheet.parse_pixel(arguments.pixel) if arguments.pixel else None
    predictor = Predictor(arguments.workdir, which=arguments.which)
    out = arguments.out or f"{Path(arguments.image).name.split('.')[0]}_features.png"
    text = feature_sheet.write(
        predictor, arguments.image, out, channels=arguments.maps, pixel=pixel
    )
    if text:
        print(text)
    print(f"{arguments.image} -> {out}")


# --- evaluate ------------------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> None:
    _say_devices(sys.stderr if arguments.json else sys.stdout)
    from unet_jax.checkpoint import load_for_inference

    model, variables, meta, step = load_for_inference(
        arguments.workdir, which=arguments.which
    )
    meta, source, split = _open_split(meta, arguments)
    results = _measure(model, variables, meta, source, arguments)
    if arguments.json:
        head = {"workdir": arguments.workdir, "step": step, "split": split}
        finite = {k: v if math.isfinite(v) else None for k, v in results.items()}
        print(json.dumps({**head, "examples": len(source), "results": finite}))
        return
    print(f"{arguments.workdir}: step {step}, {len(source)} examples of {split}")
    print(table(results, meta.label_names))


def _open_split(meta: "Meta", arguments: argparse.Namespace) -> tuple["Meta", Any, str]:
    """What the run is, with its data and loss; the source of a split; which, in words.

    Data and loss are those of ``--config`` if there is one. A net from PyTorch whose
    classes nobody has named takes their names from the data.
    """
    import dataclasses

    from unet_jax import data
    from unet_jax.convert import label_names
    from unet_jax.types import InputError

    config = _config(arguments)
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


def _measure(
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


def _say_devices(file: Any) -> None:
    """The first line: which backend, which device, how many."""
    import jax

    kind, count = jax.devices()[0].device_kind, len(jax.devices())
    print(f"{jax.default_backend()}: {kind}, {count} device(s)", file=file, flush=True)
