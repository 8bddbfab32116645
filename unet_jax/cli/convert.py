"""``unet-jax convert``: PyTorch weights to a workdir, and back."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unet_jax.cli import arguments as flags

if TYPE_CHECKING:
    from unet_jax.checkpoint import Meta

_CONVERT = """\
  unet-jax convert unet.pth --out=runs/unet --classes=background,cell
  unet-jax convert unet.pth --out=runs/unet --mean=0.485,0.456,0.406 \\
      --std=0.229,0.224,0.225
  unet-jax convert unet.pth --check=image.png --module="unet.py:UNet(3, 2)"
  unet-jax convert runs/unet --out=back.safetensors
"""


def add(commands: Any) -> None:
    """The command's flags."""
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
    add("--which", type=flags.which, help="checkpoint: best, latest or a step (best)")
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
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
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
        config=flags.config(arguments),
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

    from unet_jax import feature_sheet, parity, programs
    from unet_jax.predict import Predictor
    from unet_jax.types import size_text

    there = parity.torch()
    programs.keep()
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
        options[key] = flags.literal(value)
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
