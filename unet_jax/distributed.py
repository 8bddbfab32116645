"""Several processes as one run: started, of one mind, and ended together.

Every process runs the same program on its own devices, and a collective waits for all
of them. So what one process decides alone, or one that dies alone, would leave the
others waiting: `agreed` and `check_same` are for the first, `guarded` for the second.
With one process everything here returns at once and computes nothing on a device.
"""

import contextlib
import hashlib
import os
import re
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from unet_jax.types import InputError, NumpyArray

# Seconds without a sign of life after which jax calls a process dead and ends the
# others. A collective over gloo notices at once; one over NCCL or between TPUs may wait
# for ever, and then this is the only bound. jax's default is 100.
HEARTBEAT = 30
# Seconds that the first process at the end waits for the last; `wait` has brought them
# together before that. jax's default is 300.
SHUTDOWN = 15
# Seconds that a file may take to be seen from another host.
SHARED = 10
# Seconds that a failing process 0 stays: it carries the service whose end aborts the
# others, and what they have to say should be printed before.
LAST_WORDS = 2

# What jax's SlurmCluster asks for: `srun` sets all of it, a batch script has no step.
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
# jax reads OpenMPI's only if OMPI_MCA_orte_hnp_uri is there, which OpenMPI 5 no longer
# sets (jax-ml/jax issue 14576), and the first two not at all.
_COUNTS = ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE")
_NUMBERS = ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")

# In the errors of a collective whose other end is gone: gloo, its rendezvous, jax's
# coordination service, NCCL (ncclRemoteError).
_GONE = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "GetKeyValue() timed out",
    "Socket closed",
    "stopped sending heartbeats",
    "remote process exited",
)

# This process's number once it is known to be one of several.
_number: int | None = None


# --- Starting ------------------------------------------------------------------------


def _first_number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of some variables that is set, as a number."""
    for name in names:
        if value := environ.get(name):
            if not value.isdecimal():
                raise InputError(
                    f"{name} = {value!r} in the environment is no number: unset it."
                )
            return int(value)
    return None


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """The tasks of the SLURM step that this process is of, 0 outside of one."""
    if not all(name in environ for name in _SLURM):
        return 0
    # In a shell inside an allocation SLURM_NTASKS can be the allocation's.
    return _first_number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") or 0


def detected(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes.

    A SLURM step or an OpenMPI world of more than one, or ``JAX_COORDINATOR_ADDRESS``,
    unless ``JAX_NUM_PROCESSES`` is 1. Kubernetes and Cloud TPUs are not looked for: a
    pod or a TPU host may well be alone, and asking takes a network.
    """
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        return _first_number(environ, "JAX_NUM_PROCESSES") != 1
    world = _first_number(environ, "OMPI_COMM_WORLD_SIZE") or 0
    return max(world, _slurm_tasks(environ)) > 1


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
    """Which GPUs of its host are this process's.

    Under SLURM and OpenMPI jax gives every process the one GPU that has its number on
    the host. With one process a host the others would idle, and one that was given its
    own GPU by the launcher would look for another (jax-ml/jax issues 16788 and 23452).

    Args:
        environ: The environment.

    Returns:
        For ``local_device_ids`` of `jax.distributed.initialize`: an empty list for all
        that it sees, one number where processes share a host's, and None where
        ``JAX_LOCAL_DEVICE_IDS`` says it.
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = [environ[name] for name in _VISIBLE if environ.get(name)]
    if any("," not in names for names in visible) or "SLURM_GPUS_PER_TASK" in environ:
        return []
    if (here := _first_number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")) is not None:
        mine = _first_number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
        return [] if here == 1 or mine is None else [mine]
    tasks, mine = _slurm_tasks(environ), _first_number(environ, "SLURM_LOCALID")
    # Every node of a step has a task: as many nodes as tasks is one each.
    if tasks == _first_number(environ, "SLURM_STEP_NUM_NODES") or mine is None:
        return []
    return [mine] if tasks > 1 else []


def start(
    wanted: bool | None = None,
    *,
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    timeout: int = 300,
) -> bool:
    """Joins this process to the others of its run; before anything touches a device.

    It also has them meet once: a first collective over gloo waits 30 s for the last
    process, those after it as long as it takes.

    Args:
        wanted: True to join, False not to, None to join where an argument is given or
            the environment speaks of several processes, see `detected`.
        coordinator: ``HOST:PORT`` at which process 0 is reached by all. Without it
            ``JAX_COORDINATOR_ADDRESS``, or what jax finds under SLURM, OpenMPI 4,
            Kubernetes or on Cloud TPUs.
        processes: How many there are; 0 for ``JAX_NUM_PROCESSES`` or what is found.
        process: Which of them this is, from 0; -1 for ``JAX_PROCESS_ID`` or what is
            found.
        timeout: Seconds to wait for the others.

    Returns:
        Whether there are several processes.

    Raises:
        InputError: The three arguments are not all known or do not fit each other, or
            the others were not there in time.
    """
    global _number
    environ = os.environ
    told = bool(coordinator) or processes > 0 or process >= 0
    if wanted is False or not (wanted or told or detected(environ)):
        return False
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or _first_number(environ, *_COUNTS) or 0
    if process < 0 and (found := _first_number(environ, *_NUMBERS)) is not None:
        process = found
    if coordinator and not re.fullmatch(r".+:\d+", coordinator):
        raise InputError(
            f"the coordinator {coordinator!r} is no address: write HOST:PORT."
        )
    if processes and process >= processes:
        raise InputError(
            f"process {process} is none of {processes}: number them from 0 to"
            f" {processes - 1}."
        )
    _number = process if process >= 0 else None
    if process == 0 and coordinator and "JAX_COORDINATOR_BIND_ADDRESS" not in environ:
        _check_port(coordinator)
    _join(coordinator, processes, process, timeout)
    _number = jax.process_index()
    wait("start")
    return jax.process_count() > 1


def _check_port(coordinator: str) -> None:
    """Raises InputError where process 0 cannot listen.

    Asked before jax does: jaxlib can crash on it, and its server shares a port with the
    coordinator of another run without a word.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"process 0 cannot listen on the port of {coordinator} ({error}): choose"
            " another, the same for all."
        ) from error


def _join(coordinator: str, processes: int, process: int, timeout: int) -> None:
    """Calls `jax.distributed.initialize` and says in a sentence what went wrong."""
    # jax would catch SIGTERM from here on and do nothing about it; train.py has its own
    # handler, and before that a SIGTERM should end the process.
    jax.config.update("jax_enable_preemption_service", False)
    failed: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                coordinator or None,
                processes or None,
                process if process >= 0 else None,
                local_device_ids=local_devices(os.environ),
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=SHUTDOWN,
            )
        except Exception as error:
            failed.append(error)

    # In a thread, because jax aborts the process when its own time is up: no exception
    # leaves the call, so the sentence must come before.
    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise InputError(_absent(coordinator, processes, timeout))
    if not failed:
        return
    known = {
        "--coordinator=HOST:PORT": bool(coordinator),
        "--processes=N": processes > 0,
        "--process=I": process >= 0,
    }
    lacking = [flag for flag, given in known.items() if not given]
    if lacking and isinstance(failed[0], ValueError):
        raise InputError(
            "what started this process does not say which others there are"
            f" ({str(failed[0]).rstrip('.')}): give {' and '.join(lacking)}."
        ) from failed[0]
    raise failed[0]


def _absent(coordinator: str, processes: int, timeout: int) -> str:
    """Who was not there in time, and what to do."""
    host, _, port = coordinator.rpartition(":")
    address = coordinator or "the coordinator that the environment names"
    try:
        if coordinator:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return (
            f"{address} was not reached within {timeout} s ({error}): start process 0"
            " on that host, with the same --coordinator as all, and let the port"
            " through."
        )
    return (
        f"not all {processes or 'the'} processes came to {address} within {timeout} s:"
        " start as many as --processes says, each with its own --process."
    )


# --- Of one mind ---------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process is the one that prints and writes: number 0."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Returns when all processes have come here.

    Worth it before the first use of a compiled program: its collectives, when they are
    new to gloo, wait no longer than 30 s for a process that compiles slowly.

    Args:
        what: The same for all.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def agreed(flag: bool) -> bool:
    """Whether any process says so; all must ask, and all get the same answer.

    About a millisecond on loopback, and it waits for the work that was dispatched
    before: not for every step.
    """
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.uint8(flag)).any())


def _others(text: str) -> NumpyArray:
    """The processes that have another text than process 0."""
    from jax.experimental import multihost_utils

    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(mine)
    return np.flatnonzero((digests != digests[0]).any(axis=1))


def check_same(text: str, what: str = "config") -> None:
    """Raises InputError, in every process, where not all have the same text.

    Args:
        text: What must be equal, such as the config as JSON.
        what: What the sentence calls it.
    """
    if jax.process_count() == 1:
        return
    if (others := _others(text)).size:
        raise InputError(
            f"the processes were started with different {what}s (process {others[0]}"
            " has another than process 0): use the same command for all."
        )


def check_shared(folder: str | os.PathLike[str]) -> None:
    """Raises InputError, in every process, where they do not see one folder.

    A checkpoint is written by all of them together: into folders of their own, none
    would ever be complete. Waits some seconds for a file system that is slow to show
    what another host has written.

    Args:
        folder: There is one, of this name, for each of them.
    """
    if jax.process_count() == 1:
        return
    note = Path(folder) / ".processes"
    if is_main():
        note.write_text(os.urandom(16).hex())
    wait("note written")
    others = np.empty(0)
    for _ in range(SHARED):
        others = _others(note.read_text() if note.exists() else "")
        if not others.size:
            break
        time.sleep(1)
    wait("note read")
    if is_main():
        note.unlink()
    if others.size:
        raise InputError(
            f"the folder {os.fspath(folder)} of process {others[0]} is not that of"
            " process 0: put the workdir on a file system that all hosts share."
        )


# --- Ended together ------------------------------------------------------------------


def guarded(main: Callable[[], int]) -> int:
    """Runs ``main`` so that no process of the run outlives another for long.

    Python's own exit waits for the others, up to `SHUTDOWN` seconds and with a
    heartbeat that tells them all is well, while they wait in a collective. So where
    `start` has joined processes, one that fails says why and leaves at once, and those
    that end well meet before they part. Otherwise this is ``main()``.

    Args:
        main: Returns an exit status; 0 in all processes or in none.

    Returns:
        0, or in a process of its own the status of ``main``. One of several does not
        return from a failure: it exits with the status of ``main`` or of its
        SystemExit, with 2 after an InputError, 130 after Ctrl-C, 1 after anything else.
    """
    try:
        try:
            status = main()
        except SystemExit as end:
            if end.code:
                raise
            status = 0
        if status == 0 and jax.distributed.is_initialized():
            wait("end")
            jax.distributed.shutdown()
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status = _last_words(error)
    if status and jax.distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed at the other end
                stream.flush()
        try:
            time.sleep(LAST_WORDS if _number == 0 else 0)
        finally:
            os._exit(status)
    return status


def _last_words(error: BaseException) -> int:
    """Prints why this process ends, each line with its number; the exit status."""
    status = 1
    if isinstance(error, InputError):
        text, status = f"error: {error}\n", 2
    elif isinstance(error, KeyboardInterrupt):
        text, status = "stopped\n", 130
    elif isinstance(error, SystemExit):
        text = "" if isinstance(error.code, int) else f"{error.code}\n"
        status = error.code if isinstance(error.code, int) else 1
    else:
        text = "".join(traceback.format_exception(error))
        if _lost_another(error):
            text = (
                "another process of this run has ended; restart the same command, it"
                f" goes on from the last checkpoint\n{text}"
            )
    name = "" if _number is None else f"process {_number}: "
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(textwrap.indent(text, name, lambda line: True))
    return status


def _lost_another(error: BaseException | None) -> bool:
    """Whether an error, or one it came from, is a collective without its other end."""
    while error is not None:
        # From `float(x)` it is a ValueError, elsewhere a JaxRuntimeError. An OSError is
        # the end of another connection: a download, a file system.
        kind = isinstance(error, ValueError | jax.errors.JaxRuntimeError)
        if kind and any(mark in str(error) for mark in _GONE):
            return True
        error = error.__cause__ or error.__context__
    return False
