"""The lock of a workdir: one run at a time, and none left by a run that was killed."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from unet_jax import distributed, lock
from unet_jax.types import InputError

fcntl = pytest.importorskip("fcntl")

HOLDER = """
    import os, subprocess, sys, time
    from unet_jax import lock
    with lock.hold(sys.argv[1]):
        # A child, forked or started, does not hold it on.
        child = os.fork()
        if child == 0:
            time.sleep(60)
        started = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
        print(child, started.pid, flush=True)
        time.sleep(60)
"""


def test_a_second_run_is_told_who_is_in_it(tmp_path):
    with (
        lock.hold(tmp_path),
        pytest.raises(InputError, match=rf"process {os.getpid()} on host \S+ since 2"),
        lock.hold(tmp_path),
    ):
        pass
    with lock.hold(tmp_path, say=pytest.fail), lock.hold(tmp_path.parent):
        found = json.loads((tmp_path / "lock").read_text())
    assert found["pid"] == os.getpid()


def test_a_killed_run_leaves_no_lock_though_its_children_live(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), os.fspath(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    children = [int(pid) for pid in holder.stdout.readline().split()]
    try:
        with pytest.raises(
            InputError, match=rf"process {holder.pid} on host .*--workd"
        ):
            lock.hold(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        for child in children:
            os.kill(child, 0)  # it is still there
        with lock.hold(tmp_path, say=pytest.fail):
            pass
    finally:
        holder.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_it_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock.hold(tmp_path):
        raise KeyError
    with lock.hold(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", "\0\xff", "[" * 10**5])
def test_what_stands_in_the_file_does_not_matter(tmp_path, text):
    with lock.hold(tmp_path):
        (tmp_path / "lock").write_bytes(text.encode("latin-1"))
        with (
            pytest.raises(InputError, match="in use by another process: wait"),
            lock.hold(tmp_path),
        ):
            pass


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said = []
    with lock.hold(tmp_path, say=said.append):
        pass
    assert len(said) == 1
    assert "has no locks (No locks available)" in said[0]


def test_a_workdir_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "lock").mkdir()
    with (
        pytest.raises(InputError, match=r"lock cannot be written .*--workdir"),
        lock.hold(tmp_path),
    ):
        pass


def test_only_process_0_holds_it_and_a_platform_may_have_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, lock.hold(tmp_path):
        patch.setattr(distributed, "is_main", lambda: False)
        with lock.hold(tmp_path):
            pass
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.hold(tmp_path), lock.hold(tmp_path):
        pass
