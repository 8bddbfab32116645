"""The log of a run: rows that survive a kill, and a resume that repeats none."""

import errno
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from unet_jax import log
from unet_jax.log import RunLog, read_table, replace_file
from unet_jax.types import InputError


def read_events(workdir):
    """All events of all files, in the order they were written."""
    events = []
    files = sorted((workdir / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime)
    for file in files:
        data, at = file.read_bytes(), 0
        while at < len(data):
            # length u64, its checksum u32, the event, its checksum u32
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return events


def test_rows_and_events_hold_the_same_numbers(tmp_path):
    run = RunLog(tmp_path, resume_step=0)
    run.scalars("train", 10, {"loss": 0.5, "learning_rate": 1e-3})
    run.scalars("train", 20, {"loss": np.float32(0.25), "learning_rate": 1e-3})
    run.scalars("evaluation", 20, {"loss": 0.3, "dice/cell": math.nan})
    # All is there before close.
    text = (tmp_path / "train.csv").read_text()
    assert text == "step,loss,learning_rate\n10,0.5,0.001\n20,0.25,0.001\n"
    table = read_table(tmp_path / "evaluation.csv")
    assert list(table) == ["step", "loss", "dice/cell"]
    assert table["step"][0] == 20 and math.isnan(table["dice/cell"][0])
    found = [
        (event.step, value.tag, round(value.simple_value, 6))
        for event in read_events(tmp_path)
        for value in event.summary.value
    ]
    assert found == [
        (10, "train/loss", 0.5),
        (10, "train/learning_rate", 0.001),
        (20, "train/loss", 0.25),
        (20, "train/learning_rate", 0.001),
        (20, "evaluation/loss", 0.3),
    ]
    run.close()


def test_numbers_keep_float32_precision(tmp_path):
    run = RunLog(tmp_path, resume_step=0)
    value = np.float32(1) / np.float32(3)
    run.scalars("train", 1, {"loss": value})
    run.close()
    assert np.float32(read_table(tmp_path / "train.csv")["loss"][0]) == value


def test_a_resumed_run_equals_one_that_was_not_killed(tmp_path):
    def steps(workdir, first, last, resume_step):
        run = RunLog(workdir, resume_step=resume_step)
        for step in range(first, last + 1):
            run.scalars("train", step, {"loss": 1 / step})
            if step % 2 == 0:
                run.scalars("evaluation", step, {"dice": step / 10})
        run.close()

    steps(tmp_path / "whole", 1, 9, 0)
    steps(tmp_path / "killed", 1, 7, 0)
    with (tmp_path / "killed/train.csv").open("a") as file:
        file.write("8,0.1")  # killed in the middle of a row
    steps(tmp_path / "killed", 5, 9, 4)
    for name in ("train.csv", "evaluation.csv"):
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == whole
    starts = [
        event.step
        for event in read_events(tmp_path / "killed")
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    assert starts == [5]
    assert not list(tmp_path.rglob("*.part"))


def test_a_row_cut_short_by_a_kill_is_dropped_though_it_parses(tmp_path):
    (tmp_path / "train.csv").write_text("step,loss\n1,0.5\n2,0.2")
    assert list(read_table(tmp_path / "train.csv")["step"]) == [1]
    RunLog(tmp_path, resume_step=2).close()
    assert (tmp_path / "train.csv").read_text() == "step,loss\n1,0.5\n"


def test_starting_anew_forgets_old_rows_and_columns(tmp_path):
    (tmp_path / "train.csv").write_text("step,old\n1,0.5\n2,0.2\n")
    run = RunLog(tmp_path, resume_step=0)
    assert not (tmp_path / "train.csv").exists()
    run.scalars("train", 1, {"loss": 2.0})
    run.close()
    assert (tmp_path / "train.csv").read_text() == "step,loss\n1,2\n"


def test_a_column_that_comes_late_and_one_that_is_missing(tmp_path):
    run = RunLog(tmp_path, resume_step=0)
    run.scalars("evaluation", 1, {"loss": 1.0, "dice/a, b": 0.5})
    run.scalars("evaluation", 2, {"loss": 2.0, "iou": 0.25})
    run.close()
    table = read_table(tmp_path / "evaluation.csv")
    np.testing.assert_array_equal(table["loss"], [1, 2])
    np.testing.assert_array_equal(table["dice/a, b"], [0.5, np.nan])
    np.testing.assert_array_equal(table["iou"], [np.nan, 0.25])


def test_no_file_and_no_table(tmp_path):
    assert read_table(tmp_path / "train.csv") == {}
    (tmp_path / "train.csv").write_text("something else\n")
    assert read_table(tmp_path / "train.csv") == {}


def test_an_image_is_an_event(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (7, 5), (1, 2, 3)).save(path)
    run = RunLog(tmp_path, resume_step=0)
    run.image(30, path)
    run.close()
    (event,) = [e for e in read_events(tmp_path) if e.summary.value]
    (value,) = event.summary.value
    assert (event.step, value.tag) == (30, "evaluation/picture")
    assert (value.image.width, value.image.height) == (7, 5)
    assert value.image.encoded_image_string == path.read_bytes()


def test_a_killed_process_loses_no_row(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from unet_jax.log import RunLog\n"
        "run = RunLog(sys.argv[1], resume_step=0)\n"
        "for step in range(1, 4):\n"
        "    run.scalars('train', step, {'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(log.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root)
    assert done.returncode == -9
    assert list(read_table(tmp_path / "train.csv")["step"]) == [1, 2, 3]
    assert [e.step for e in read_events(tmp_path) if e.summary.value] == [1, 2, 3]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    run = RunLog(tmp_path, resume_step=0)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"train\.csv .* disk is full: free"):
        run.scalars("train", 1, {"loss": 0.5})
    monkeypatch.undo()
    monkeypatch.setattr(run._events._writer, "write_event", full)
    with pytest.raises(InputError, match="disk is full"):
        run.scalars("train", 1, {"loss": 0.5})
    run.close()


def test_replace_file_leaves_the_old_one_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "new" / "curves.png"
    replace_file(path, b"old")

    def refuse(*args):
        raise PermissionError("no")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]
