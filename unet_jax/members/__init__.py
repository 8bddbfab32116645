"""Several nets in one go: the folds of a cross-validation, the seeds of an ensemble.

A member is a run like any other: `configs` gives each a whole config, and each has a
workdir of its own, ``WORKDIR/fold_1`` or ``WORKDIR/seed_0``, that train.py goes on from
and ``predict`` reads as if it had been trained alone. What members share is what they
need not do five times: reading the data ahead, compiling the step, and the devices.

There are two ways to take a step of all of them, equal up to rounding (`ways`).
``Together`` is one program, ``vmap`` of the step, with the members spread over the
devices, which have nothing to tell each other. ``InTurn`` runs one compiled step for
one member after another on one device.

On a CPU ``vmap`` makes grouped convolutions, which are slow there. Five nets of four
levels on two shared cores took, of CPU time a step, together and in turn: 6.4 s and
3.2 s (16 to 128 channels, 8 crops of 128 x 128), 0.22 s and 0.20 s (8 to 64 channels,
4 crops of 64 x 64). So members take turns on a single CPU device and go together
elsewhere; ``config.members.vmap`` says otherwise.
"""

from unet_jax.members.conclusion import conclude, out_of_fold
from unet_jax.members.loop import compile_step, train
from unet_jax.members.roster import Member, asked, check, check_workdir, configs
from unet_jax.members.team import Team, build

__all__ = [
    "Member",
    "Team",
    "asked",
    "build",
    "check",
    "check_workdir",
    "compile_step",
    "conclude",
    "configs",
    "out_of_fold",
    "train",
]
