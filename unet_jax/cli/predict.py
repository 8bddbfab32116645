"""``unet-jax predict``: files segmented with the net of a workdir."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from unet_jax.cli import arguments as flags

if TYPE_CHECKING:
    from unet_jax.predict_files import Job

_VALUES = """\
What is written, in the size of the input:
  IMAGE.png            of a 2-D image; IMAGE.tif of a stack; IMAGE.nii.gz of a NIfTI
                       volume, with its affine and header
  values               class ids; of two classes, and of a label, 0 and 255 so that
                       viewers show them (in NIfTI 0 and 1)
  IMAGE_NAME.png       one file a label, for a run with several labels (task "labels")
  with --instances     instead: objects numbered from 1, 16 bits a pixel (32 in a .tif
                       beyond 65535); of a stack each page by itself
  IMAGE_probability.npy   float32 [height, width, classes], with --probabilities
  IMAGE_overlay.png    the label drawn on the image, with --overlay

--postprocess takes, in any order, with commas: largest (of each class the largest
component), fill (holes), small=N (no component below N pixels).

  unet-jax predict --workdir=runs/a new/*.tif --out=cells --tile=512 --tta=flips
  unet-jax predict --workdir=runs/a huge.tif --out=cells --mesh=1x8
  unet-jax predict --workdir=runs/a,runs/b new --out=cells --instances=watershed \
      --postprocess=fill,small=30
"""


def add(commands: Any) -> None:
    """The command's flags."""
    command = commands.add_parser(
        "predict",
        help="segment files with a trained net",
        description="Segments files with the net of a workdir; needs nothing else.",
        epilog=_VALUES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_workdir(command, several=True)
    add = command.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders or quoted globs")
    add("--out", required=True, metavar="DIR", help="folder to write to")
    flags.add_tiles(command)
    add(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="tiles, or views of an image, run together (1)",
    )
    flags.add_mesh(command)
    add(
        "--instances",
        nargs="?",
        const="components",
        choices=("components", "watershed", "distance"),
        metavar="METHOD",
        help="write numbered objects: components, or, where they touch, watershed (of"
        " the probability) or distance (by their form); the last on the line or with"
        " =METHOD (components)",
    )
    add(
        "--postprocess",
        default="",
        metavar="STEPS",
        help="largest, fill, small=N, with commas between them",
    )
    add("--probabilities", action="store_true", help="write the probabilities as well")
    add("--overlay", action="store_true", help="write a picture of label on image")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stdout)
    from unet_jax.predict import Predictor
    from unet_jax.predict_files import predict_files

    predictor = Predictor(
        flags.workdirs(arguments.workdir),
        which=arguments.which,
        batch_size=arguments.batch_size,
        mesh=flags.mesh(arguments),
        **flags.tile_options(arguments),
    )
    names = ", ".join(predictor.meta.label_names)
    for net in predictor.nets:
        print(f"{net.name}: step {net.step}, {names}")

    def done(job: "Job") -> None:
        print(f"{job.path} -> {', '.join(map(str, job.outputs))}", flush=True)

    begin = time.perf_counter()
    jobs = predict_files(
        predictor,
        arguments.images,
        arguments.out,
        probabilities=arguments.probabilities,
        overlay=arguments.overlay,
        postprocess=arguments.postprocess,
        instances=arguments.instances,
        done=done,
    )
    print(f"{len(jobs)} file(s) in {time.perf_counter() - begin:.1f} s")
    if arguments.tile:
        held = predictor.held / 1e6
        print(f"tile {arguments.tile}: {held:.1f} MB of probabilities at a time")
