"""One step on every mesh: the same numbers, and nothing gathered that need not be."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from unet_jax.checkpoint import load_for_inference

WORKER = Path(__file__).parent / "scale_worker.py"
NETS = {
    # Smooth: with ReLUs one pixel is within rounding of 0 at the first step, and
    # whether its gradient is let through is a thousandth of every kernel's.
    "bilinear": {"model.up": "bilinear", "model.act": "silu"},
    "valid": {"model.padding": "valid", "train.crop": [48, 48]},
    "unetpp": {"model.name": "unetpp"},
    "attention": {"model.name": "attention_unet"},
    "volumes": {
        "data.cells.rank": 3,
        "data.cells.size": [32, 16, 16],
        "train.crop": [32, 16, 16],
    },
}
# What else the family has; each is a way that a map could be torn out of its place.
OPTIONS = {
    "nearest": {"model.up": "nearest"},
    "bilinear_aligned": {"model.up": "bilinear_aligned"},
    "transpose_wide": {"model.up": "transpose_wide"},
    "pixel_shuffle": {"model.up": "pixel_shuffle_blurred"},
    "strided": {"model.down": "strided"},
    "reflect": {
        "model.padding": "reflect",
        "data.cells.size": [64, 32],
        "train.crop": [64, 32],
    },
    "average": {"model.down": "average"},
    "residual": {"model.name": "resunet", "model.features": [4, 8, 16]},
    "recurrent": {"model.name": "r2unet", "model.features": [4, 8]},
    "gated_full": {"model.name": "attention_unet_full"},
    "instance": {"model.norm": "instance"},
    "group": {"model.norm": "group", "model.norm_groups": 2},
    "excited": {"model.excite": "scse"},
    "supervised": {"model.deep_supervision": True},
    "dropout": {"model.dropout": 0.3},
    "accumulated": {"train.accumulate": 2},
    "remat": {"model.remat": 2},
    "several_steps": {"train.steps_per_call": 3, "train.steps": 300}
    | {f"train.{name}_every": 30 for name in ("log", "eval", "save")},
    "valid_volumes": {
        "model.name": "unet_3d",
        "model.features": [4, 8],
        "data.cells.rank": 3,
        "data.cells.size": [24, 24, 24],
        "train.crop": [24, 24, 24],
        "train.batch_size": 2,
    },
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def work(out, jobs, *, devices, processes=1):
    """Runs the worker in processes of its own; every job's numbers by its name."""
    port = free_port()
    env = {
        **os.environ,
        "PYTHONPATH": str(WORKER.parent.parent),
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Unoptimised code of the same program, which compiles in half the time:
        # partitioning comes before.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        env |= {"JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, str(WORKER), str(out)]
    command += map(json.dumps, jobs)
    started = [
        subprocess.Popen(
            command,
            env={**env, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        texts = [process.communicate(timeout=500)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, texts, strict=True):
        assert process.returncode == 0, text
    answers = {}
    for job in jobs:
        said = json.loads((out / f"{job['name']}.json").read_text())
        answers[job["name"]] = {**said, **dict(np.load(out / f"{job['name']}.npz"))}
    return answers


def assert_same(found, reference, *, tolerance=2e-4):
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=tolerance)
    difference = np.linalg.norm(found["parameters"] - reference["parameters"])
    assert difference <= tolerance * np.linalg.norm(reference["parameters"])
    np.testing.assert_allclose(
        found["evaluation"], reference["evaluation"], rtol=0, atol=2e-3
    )
    np.testing.assert_array_equal(found["picture"], reference["picture"])


def job(name, mesh, changes, **more):
    return {"name": name, "mesh": mesh, "changes": changes, "steps": 5, **more}


def test_the_unet_is_the_same_on_every_mesh(tmp_path):
    found = work(
        tmp_path,
        [
            job("one", (1, 1), {}, plain=False),
            job("data8", (8, 1), {}, plain=False),
            job("space8", (1, 8), {}, plain=False),
            job("both", (2, 4), {}, plain=False),
            job("pmap8", (8, 1), {"mesh.pmap": True}, plain=False),
            job("alone", (1, 8), {}),
        ],
        devices=8,
    )
    for name in ("data8", "space8", "both", "pmap8"):
        assert_same(found[name], found["one"])
    assert not found["one"]["collectives"]
    assert set(found["data8"]["collectives"]) == {"all-reduce"}
    # Without augmentation halos and sums, and with it the image, label and weight.
    assert set(found["alone"]["collectives"]) == {"all-reduce", "collective-permute"}
    gathered, largest = found["space8"]["collectives"]["all-gather"]
    assert gathered == 3 and largest in ("f32[8,32,32]", "u8[8,32,32,1]")
    # Augmentation is in what was compared: without it the run is another.
    difference = found["alone"]["losses"] - found["one"]["losses"]
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize("net", NETS)
def test_a_net_is_the_same_in_parts(net, tmp_path):
    changes = NETS[net]
    meshes = {"one": (1, 1), "space8": (1, 8), "both": (2, 4)}
    jobs = [job(name, mesh, changes) for name, mesh in meshes.items()]
    found = work(tmp_path, jobs, devices=8)
    for name in ("space8", "both"):
        assert_same(found[name], found["one"])
        if net != "valid":
            kinds = set(found[name]["collectives"])
            assert kinds == {"all-reduce", "collective-permute"}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_the_same_in_parts(option, tmp_path):
    jobs = [
        {**job(name, mesh, OPTIONS[option]), "steps": 3}
        for name, mesh in {"one": (1, 1), "space8": (1, 8)}.items()
    ]
    found = work(tmp_path, jobs, devices=8)
    assert_same(found["space8"], found["one"])
    if option != "valid_volumes":
        kinds = set(found["space8"]["collectives"])
        assert kinds == {"all-reduce", "collective-permute"}


def test_split_parameters_give_the_same(tmp_path):
    changes = {"model.features": [8, 32, 64]}
    found = work(
        tmp_path,
        [
            job("one", (1, 1), changes),
            job("fsdp", (4, 1), {**changes, "mesh.fsdp": True}),
        ],
        devices=4,
    )
    assert_same(found["fsdp"], found["one"])
    assert set(found["fsdp"]["parts"]) == {0.25, 1.0}


def test_two_processes_are_the_same_as_one(tmp_path):
    one = work(tmp_path, [job("one", (1, 1), {}, plain=False)], devices=1)["one"]
    jobs = [
        job("data4", (4, 1), {}, plain=False),
        job("both", (2, 2), {}, plain=False),
        job("space4", (1, 4), {}, plain=False),  # an image over both processes
    ]
    found = work(tmp_path, jobs, devices=2, processes=2)
    for name in ("data4", "both", "space4"):
        assert_same(found[name], one)


@pytest.mark.slow
def test_an_image_over_eight_devices_needs_a_seventh_of_one():
    """The 31 M net at 2048 x 2048: compiled, not run."""
    command = [sys.executable, "-m", "benchmarks.scale", "--json"]
    command += ["--cases=2048", "--space=1,8"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    out = subprocess.run(
        command, cwd=WORKER.parent.parent, env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    one, eight = map(json.loads, out.stdout.splitlines())
    assert eight["temporary"] <= one["temporary"] / 6
    assert set(eight["collectives"]) == {"all-reduce", "collective-permute"}


# --- Killed --------------------------------------------------------------------------

RUN = {
    "data.cells.size": "(16,16)",
    "data.cells.examples": 6,
    "model.features": "(2,4)",
    "train.crop": "(16,16)",
    "train.batch_size": 4,
    "train.eval_batch_size": 4,
    "train.steps": 200,
    "train.eval_every": 100,
    "train.save_every": 20,
    "train.log_every": 20,
    "optim.warmup_steps": 0,
    "optim.name": "sgd",
    "optim.learning_rate": 0.01,
}


def start(workdir, *flags, processes, devices):
    """train.py in so many processes."""
    port = free_port()
    command = [sys.executable, "train.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in RUN.items()]
    command += [f"--devices={devices}", *flags]
    if processes > 1:
        command += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return [
        subprocess.Popen(
            [*command, f"--process={number}"] if processes > 1 else command,
            cwd=WORKER.parent.parent,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]


def parameters(workdir, which="latest"):
    _, variables, _, step = load_for_inference(workdir, which=which)
    leaves = jax.tree.leaves(variables["params"])
    return step, np.concatenate([np.ravel(x) for x in leaves])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    (process,) = start(workdir, processes=1, devices=2)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return workdir, *parameters(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "processes"), [(0, 1), (1, 2)])
def test_a_killed_process_ends_all_and_the_run_goes_on(
    killed, processes, uninterrupted, tmp_path
):
    both = start(tmp_path, processes=2, devices=1)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "20").exists():
            assert time.monotonic() < until and both[0].poll() is None
            time.sleep(0.05)
        time.sleep(random.random())
        both[killed].send_signal(signal.SIGKILL)
        text = both[1 - killed].communicate(timeout=60)[0]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1 - killed].returncode != 0, text
    again = start(tmp_path, processes=processes, devices=2 // processes)
    texts = [process.communicate(timeout=300)[0] for process in again]
    assert all(process.returncode == 0 for process in again), texts
    assert "going on from step" in texts[0]
    (step, found), (_, last, expected) = parameters(tmp_path), uninterrupted
    assert step == last == 200
    difference = np.linalg.norm(found - expected)
    assert difference <= 2e-4 * np.linalg.norm(expected)


@pytest.mark.slow
def test_processes_begin_with_weights_of_another_run(uninterrupted, tmp_path):
    workdir = uninterrupted[0]
    flags = ["--config.train.steps=20", "--config.optim.learning_rate=0.0"]
    flags += [f"--config.model.weights={workdir}"]
    both = start(tmp_path, *flags, processes=2, devices=1)
    texts = [process.communicate(timeout=300)[0] for process in both]
    assert all(process.returncode == 0 for process in both), texts
    _, expected = parameters(workdir, "best")
    np.testing.assert_array_equal(parameters(tmp_path)[1], expected)


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    """Two folders of one name, as on the disks of two hosts."""
    both, port = [], free_port()
    for number, host in enumerate(("a", "b")):
        (tmp_path / host).mkdir()
        command = [sys.executable, str(WORKER.parent.parent / "train.py")]
        command += ["--workdir=run", f"--coordinator=127.0.0.1:{port}"]
        command += ["--processes=2", f"--process={number}", "--devices=1"]
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        both.append(
            subprocess.Popen(
                command,
                cwd=tmp_path / host,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], texts
    assert all("file system that all hosts share" in text for text in texts)
