"""Several processes on loopback: they start, agree, and end together."""

import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from unet_jax import distributed
from unet_jax.types import InputError

ROOT = Path(distributed.__file__).parents[1]

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}

# A process: it joins the others, and `body` is what it does then, as i of n.
WORKER = """
import os, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from unet_jax import distributed
from unet_jax.types import InputError

def total(x):
    "The sum over all devices of all processes; every device brings an x."
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows = np.full(jax.local_device_count(), x, np.float32)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("data")), rows)
    return float(jax.jit(jnp.sum)(rows))

{before}

def main():
    several = distributed.start({start})
    i, n = jax.process_index(), jax.process_count()
    print("started", flush=True)
{body}
    return 0

sys.exit(distributed.guarded(main))
"""


class Ended(NamedTuple):
    """How a process ended: status, what it printed, seconds since it was started."""

    status: int
    out: str
    err: str
    seconds: float


def _environ(**more):
    names = ("SLURM", "OMPI", "JAX_", "CUDA_VISIBLE", "KUBERNETES", "XLA_FLAGS")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    flags = "--xla_force_host_platform_device_count=2"
    here = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return {**environ, **here, **more}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(tmp_path, body, *, before="", starts=None, environs=({}, {}), limit=60):
    """Starts a process for each environment and waits for all of them.

    `before` is run before the processes join, by hand if not as `starts` says.
    """
    if starts is None:
        by_hand = f"coordinator='127.0.0.1:{_free_port()}', processes=2, process="
        starts = [f"{by_hand}{i}" for i in range(len(environs))]
    running, begin = [], time.monotonic()
    try:
        for i, (start, environ) in enumerate(zip(starts, environs, strict=True)):
            body = textwrap.indent(textwrap.dedent(body), "    ")
            code = WORKER.format(before=before, start=start, body=body)
            files = [tmp_path / f"{i}.{name}" for name in ("out", "err")]
            with files[0].open("w") as out, files[1].open("w") as err:
                process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdout=out,
                    stderr=err,
                    env=_environ(**environ),
                    cwd=tmp_path,
                )
            running.append((process, files))
        ends = {}
        while len(ends) < len(running) and time.monotonic() - begin < limit:
            for i, (process, _) in enumerate(running):
                if i not in ends and process.poll() is not None:
                    ends[i] = time.monotonic() - begin
            time.sleep(0.05)
    finally:
        for process, _ in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [
        Ended(p.returncode, out.read_text(), err.read_text(), ends.get(i, math.inf))
        for i, (p, (out, err)) in enumerate(running)
    ]


# --- What the environment says -------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        # A shell in an allocation of two tasks, and a batch script, which has no step.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "1"}, False),
        ({"JAX_NUM_PROCESSES": "4"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_ID": "0"}, False),
    ],
)
def test_the_environment_says_whether_there_are_several(environ, several):
    assert distributed.detected(environ) is several


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE = 'two'"):
        distributed.detected({"OMPI_COMM_WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        ({}, []),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        (SLURM, []),  # one task a node: all of its GPUs
        ({**SLURM, "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}, [3]),
        # The launcher has given each its own: its number there is always 0.
        (
            {**SLURM, "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}
            | {"CUDA_VISIBLE_DEVICES": "3"},
            [],
        ),
        (
            {**SLURM, "SLURM_NTASKS": "8", "SLURM_LOCALID": "3"}
            | {"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "6,7"},
            [],
        ),
        (
            {**SLURM, "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}
            | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"},
            [3],
        ),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}, [5]),
    ],
)
def test_a_process_gets_its_gpus(environ, devices):
    assert distributed.local_devices(environ) == devices


def test_alone_nothing_is_started_nothing_is_asked_and_errors_pass(monkeypatch):
    for name in [*SLURM, "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"]:
        monkeypatch.delenv(name, raising=False)
    assert distributed.start() is False
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert distributed.start(False, coordinator="a:1", processes=2) is False
    assert distributed.is_main()
    assert distributed.agreed(True) is True
    assert distributed.agreed(False) is False
    distributed.check_same("anything")
    distributed.wait("nobody")
    assert distributed.guarded(lambda: 3) == 3
    for error in (InputError("a"), ZeroDivisionError(), SystemExit(4)):
        with pytest.raises(type(error)) as caught:
            distributed.guarded(lambda error=error: (_ for _ in ()).throw(error))
        assert caught.value is error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"coordinator": "node1", "processes": 2, "process": 0}, "write HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "from 0 to 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        distributed.start(**arguments)


# --- Starting ------------------------------------------------------------------------

AGREE = """
    assert several and n == 2 and jax.device_count() == 4
    assert total(1 + i) == 2 * 1 + 2 * 2
    assert distributed.is_main() is (i == 0)
    assert [distributed.agreed(i == k) for k in (0, 1, 2)] == [True, True, False]
    distributed.check_same("the same")
    print("agreed", i, flush=True)
    if i == 0:
        time.sleep({late})  # the other waits for the last word, such as a picture
"""


def _slurm(port, i):
    # jax takes the port 61440 + job % 4096.
    return {
        **SLURM,
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
        "SLURM_STEP_NUM_NODES": "1",
    }


def _open_mpi(i):
    return {
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }


def _high_port():
    """A free port among those that jax makes of a job's number."""
    for port in range(61440 + os.getpid() % 4000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.parametrize("how", ["by hand", "variables", "slurm", "open mpi"])
def test_two_processes_start_agree_and_end(tmp_path, how):
    starts, environs = ["", ""], [{}, {}]
    address = f"127.0.0.1:{_free_port()}"
    if how == "by hand":
        starts = None
    elif how == "variables":
        # As in Kubernetes, of which jax then need not ask anything.
        names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
        names["KUBERNETES_SERVICE_HOST"] = "127.0.0.1"
        environs = [{**names, "JAX_PROCESS_ID": str(i)} for i in range(2)]
    elif how == "slurm":
        port = _high_port()
        environs = [_slurm(port, i) for i in range(2)]
    else:
        starts = [f"coordinator='{address}'"] * 2
        environs = [_open_mpi(i) for i in range(2)]
    # Longer than the time for parting, which is counted from the last meeting.
    late, before = (3, "distributed.SHUTDOWN = 1") if how == "by hand" else (0, "")
    ends = _run(
        tmp_path,
        AGREE.format(late=late),
        before=before,
        starts=starts,
        environs=environs,
    )
    for i, end in enumerate(ends):
        assert (end.status, end.err) == (0, "")
        assert f"agreed {i}\n" in end.out


def test_different_configs_are_refused_by_all(tmp_path):
    body = "distributed.check_same('steps = 1' + '0' * i)"
    for i, end in enumerate(_run(tmp_path, body)):
        assert end.status == 2
        assert end.err.startswith(f"process {i}: error: the processes were started")
        assert "different configs (process 1 has" in end.err


# One of several cannot be asked for in this process: jax is in use here already.
@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (
            "True",
            "does not say which others there are (coordinator_address should be"
            " defined): give --coordinator=HOST:PORT and --processes=N and"
            " --process=I.",
        ),
        ("True, processes=2, process=0", "defined): give --coordinator=HOST:PORT."),
        ("True, coordinator='127.0.0.1:{port}', processes=2", "give --process=I."),
        (
            "coordinator='127.0.0.1:{port}', processes=2, process=1, timeout=3",
            "process 1: error: 127.0.0.1:{port} was not reached within 3 s",
        ),
        (
            "coordinator='127.0.0.1:{port}', processes=2, process=0, timeout=3",
            "process 0: error: not all 2 processes came to 127.0.0.1:{port} within 3 s",
        ),
    ],
)
def test_a_start_that_cannot_be_is_a_sentence(tmp_path, start, sentence):
    port = _free_port()
    (end,) = _run(tmp_path, "", starts=[start.format(port=port)], environs=[{}])
    assert sentence.format(port=port) in end.err.splitlines()[-1]
    assert "started" not in end.out
    # Before jax has begun to join, the error is the caller's.
    assert end.status == (2 if "process " in sentence else 1)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"listen on the port of {address} "):
            distributed.start(coordinator=address, processes=2, process=0)


# --- Ending --------------------------------------------------------------------------

GONE = "another process of this run has ended; restart the same command"
ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
# Steps with a collective each, and at the third something happens to one of the two.
STEPS = """
    for step in range(1000):
        total(step)
        if step == 2 and i == {who}:
            print("now", flush=True)
            {what}
        time.sleep(0.05)
"""


def test_only_a_collective_without_its_other_end_is_another_s_death():
    text = "Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1"
    wrapped = RuntimeError("the evaluation failed")
    wrapped.__cause__ = ValueError(text)
    assert distributed._lost_another(jax.errors.JaxRuntimeError(text))
    assert distributed._lost_another(wrapped)
    assert not distributed._lost_another(ConnectionResetError(text))
    assert not distributed._lost_another(jax.errors.JaxRuntimeError("OUT_OF_MEMORY"))


def _ends(tmp_path, who, what):
    """How the two end, which they do within a minute."""
    body = STEPS.format(who=who, what=what)
    ends = _run(tmp_path, body, environs=(ONE_DEVICE, ONE_DEVICE), limit=90)
    assert max(end.seconds for end in ends) < 60
    return ends


def test_an_exception_in_one_ends_both_with_its_traceback(tmp_path):
    ends = _ends(tmp_path, 1, "raise KeyError('the culprit')")
    assert [end.status for end in ends] == [1, 1]
    assert "process 1: Traceback (most recent call last):" in ends[1].err
    assert "process 1: KeyError: 'the culprit'\n" in ends[1].err
    assert ends[0].err.startswith(f"process 0: {GONE}")
    assert "process 0: Traceback" in ends[0].err


# jax would catch SIGTERM, and nothing would end.
@pytest.mark.parametrize(
    ("number", "who"), [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGTERM, 1)]
)
def test_a_signal_to_one_ends_both(tmp_path, number, who):
    ends = _ends(tmp_path, who, f"os.kill(os.getpid(), {int(number)})")
    assert ends[who].status == -number
    assert ends[1 - who].status != 0
    assert ends[1 - who].err != ""
    if who == 1:  # not so of process 0, with which the service dies: jax may abort
        assert ends[0].err.startswith(f"process 0: {GONE}")


def test_a_mistake_in_one_is_a_sentence_there_and_ends_both(tmp_path):
    what = "raise InputError('no space left on this disk: free some.')"
    ends = _ends(tmp_path, 1, what)
    sentence = "process 1: error: no space left on this disk: free some.\n"
    assert (ends[1].status, ends[1].err) == (2, sentence)
    assert ends[0].status == 1


def test_process_0_takes_no_other_down_before_it_has_spoken(tmp_path):
    body = """
        time.sleep(i)
        raise InputError(f"the disk of process {i} is full: free some.")
    """
    for i, end in enumerate(_run(tmp_path, body)):
        sentence = f"process {i}: error: the disk of process {i} is full: free some.\n"
        assert (end.status, end.err) == (2, sentence)


def test_a_status_of_one_is_a_failure_of_all(tmp_path):
    ends = _run(tmp_path, "return 5 * i")
    assert ends[1].status == 5
    assert ends[0].status == 1
    assert GONE in ends[0].err


@pytest.mark.parametrize("busy", ["time.sleep(1000)", "total(1); total(2)"])
def test_a_death_is_noticed_by_the_heartbeat(tmp_path, busy):
    """All there is while no collective fails, or one that waits instead.

    As on two devices a process: one of them meets the closed connection, the other
    waits for the first.
    """
    body = f"""
        total(0)
        if i == 1:
            os._exit(7)
        {busy}
    """
    ends = _run(tmp_path, body, before="distributed.HEARTBEAT = 5", limit=90)
    assert max(end.seconds for end in ends) < 60
    assert [end.status for end in ends] == [-signal.SIGABRT, 7]
    assert "stopped sending heartbeats" in ends[0].err
