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
  IMAGE_probability.npy   float32 [height, width, classes], with --probabilities
  IMAGE_overlay.png    the label drawn on the image, with --overlay
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
    flags.add_workdir(command)
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
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    flags.say_devices(sys.stdout)
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
