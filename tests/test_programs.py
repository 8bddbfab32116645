"""Programs that are kept give the same bits; those begun early are the right ones."""

import dataclasses
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache as cache

import train
from configs import default
from unet_jax import programs, sharding
from unet_jax.run import build
from unet_jax.types import InputError

ROOT = Path(__file__).parent.parent
TINY = {
    "data.cells.size": (17, 16),
    "data.cells.examples": 5,
    "model.features": (2, 4),
    "train.crop": (16, 16),
    "train.batch_size": 4,
    "train.eval_batch_size": 4,
    "train.steps": 2,
    "train.eval_every": 2,
    "mesh.data": 1,
}


def _run(**changes):
    config = default.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({**TINY, **changes})
    config = train.chosen(config)
    return build(config, sharding.make_mesh(**{k: config["mesh"][k] for k in _MESH}))


_MESH = ("data", "space")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of programs, empty, as a command has it."""
    names = ("enable_compilation_cache", "compilation_cache_dir")
    names += ("persistent_cache_min_compile_time_secs",)
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "get_executable_and_time", cache.get_executable_and_time)
    cache.reset_cache()
    jax.config.update("jax_enable_compilation_cache", True)
    yield programs.keep()
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()


def _bits(tree):
    return [
        np.asarray(jax.random.key_data(x) if _is_key(x) else x).tobytes()
        for x in jax.tree.leaves(tree)
    ]


def _is_key(x):
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


# --- Kept from run to run ------------------------------------------------------------


def test_a_step_from_the_folder_gives_the_same_bits(kept, capfd):
    run = _run(**{"model.dropout": 0.3})
    batch = next(run.placed_batches(0))
    shapes = run.shapes, run.batch_shapes()
    state, found = run.begin(), {}
    for expected in ("stored", "loaded"):
        jax.clear_caches()  # what this process still has in its memory
        program = programs.compiled(run.train_step, *shapes)
        assert program.kept == expected
        new, stats = program.call(jax.tree.map(jnp.copy, state), batch)
        found[expected] = _bits((new, stats))
        # What a step gives is what the next step and an evaluation are begun for.
        assert programs._described(new) == programs._described(run.shapes)
        memory = program.call.memory_analysis().temp_size_in_bytes
        found[expected].append(memory)
    assert found["stored"] == found["loaded"]
    # XLA's sentence about what every program for a CPU prefers is left out.
    assert "machine feature" not in capfd.readouterr().err


def test_a_damaged_entry_is_compiled_again(kept):
    fn = jax.jit(lambda x: jnp.sin(x) * 2)
    x = jax.ShapeDtypeStruct((4,), np.float32)
    assert programs.compiled(fn, x).kept == "stored"
    (entry,) = kept.glob("*-cache")
    whole = entry.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-9] + bytes(9)):
        entry.write_bytes(damaged)
        for expected in ("stored", "loaded"):
            jax.clear_caches()
            assert programs.compiled(fn, x).kept == expected


def test_a_folder_that_takes_nothing_breaks_nothing(kept, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    path = type(cache.LRUCache(str(kept), max_size=-1).path)
    monkeypatch.setattr(path, "write_bytes", full)
    fn = jax.jit(lambda x: jnp.cos(x) * 2)
    program = programs.compiled(fn, jax.ShapeDtypeStruct((4,), np.float32))
    assert program.kept == "" and program.text().startswith("compiled in")


def test_what_the_user_has_set_stays(kept, monkeypatch, tmp_path):
    assert kept.is_relative_to(tmp_path / "unet_jax" / "programs")
    # On already: by this, or by JAX_COMPILATION_CACHE_DIR, which JAX reads the same.
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    assert programs.keep() is None
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert programs.keep() is None and jax.config.jax_compilation_cache_dir is None


def test_without_a_folder_to_write_to_nothing_is_kept(kept, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert programs.keep() is None and jax.config.jax_compilation_cache_dir is None


def test_another_machine_has_another_folder(monkeypatch):
    def machine(text):
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
        return programs.machine()

    one = "model name\t: A\ncpu MHz\t\t: 2.0\nflags\t\t: avx avx2\n\nmodel name\t: A"
    assert machine(one) == machine(one.replace("2.0", "3.1"))
    assert machine(one) != machine(one.replace("avx2", "avx512f"))
    assert machine(one) != machine(one.replace(": A\ncpu", ": B\ncpu"))


def test_what_was_not_used_for_long_goes_first(tmp_path):
    for age, name in enumerate(["a/new", "b/older", "a/old"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (10_000 - age, 10_000 - age))
    programs.trim(tmp_path, 300)
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 3
    programs.trim(tmp_path, 199)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["new"]
    programs.trim(tmp_path / "nowhere", 0)


def test_a_command_takes_its_programs_from_the_one_before(tmp_path):
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    told = []
    for _ in range(2):
        command = [sys.executable, "train.py", "--dry_run", *flags]
        out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert out.returncode == 0 and "machine feature" not in out.stderr, out.stderr
        told.append(out.stdout)
    folder = tmp_path / "cache" / "unet_jax"
    assert f"the next run takes it from {folder}" in told[0]
    assert f"taken from {folder}" in told[1]
    # All else that is said is the same: it is the same program.
    told = [re.sub(r".* in \d+\.\d s.*\n", "", text) for text in told]
    assert told[0] == told[1]


# --- Begun early ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"mesh.space": 2, "train.steps_per_call": 2}, {"train.ema": 0.9}],
    ids=["one", "space", "ema"],
)
def test_what_is_expected_is_what_comes(changes):
    """Else a run would compile each of its programs twice."""
    run = _run(**changes)
    nothing = types.SimpleNamespace(lower=lambda *_: _Lowered())
    training, evaluation = programs.Early(nothing), programs.Early(nothing)
    training.begin(run.shapes, run.batch_shapes())
    evaluation.begin(run.shapes.variables, run.evaluation_shapes())
    state, came = run.begin(), []
    batch = next(run.placed_batches(0))
    assert training.expects(state, batch)

    def evaluated(variables, batch):
        came.append((variables, batch))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        dataclasses.replace(run, eval_step=evaluated).evaluate(state)
    assert evaluation.expects(*came[0])


class _Lowered:
    """What takes no time to compile."""

    def compile(self):
        return lambda *args: ("early", *args)


def test_early_is_the_program_or_else_the_function():
    fn = jax.jit(lambda x: x + 1)
    early = programs.Early(fn)
    x, y = jnp.arange(3.0), jnp.arange(4.0)
    assert not early.ready(x) and early(x).tolist() == [1, 2, 3]
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    early.begin(like)
    assert early.program(x).call(x).tolist() == [1, 2, 3]
    assert early.ready(x) and early(x).tolist() == [1, 2, 3]
    assert not early.expects(y) and early(y).tolist() == [1, 2, 3, 4]
    assert programs.compiled(early, y).call(y).tolist() == [1, 2, 3, 4]


def _until_idle():
    for thread in threading.enumerate():
        if thread.name == programs._THREAD:
            thread.join(60)
            _until_idle()


def test_what_is_begun_later_is_not_compiled_twice():
    def unreadable():
        raise InputError("an image is damaged")

    x = jnp.arange(3.0)
    for called in (False, True):
        early = programs.Early(jax.jit(lambda x: x - 1))
        early.begin_after(x, unreadable)
        _until_idle()
        assert not early.expects(x)
        if called:
            assert early(x).tolist() == [-1, 0, 1]
        early.begin_after(x, lambda: [x])
        _until_idle()
        assert early.ready(x) != called and early(x).tolist() == [-1, 0, 1]


def test_what_goes_wrong_in_the_thread_comes_out():
    def bad(x):
        raise ValueError("in the middle")

    def worse():
        raise ValueError("at the end")

    x = jax.ShapeDtypeStruct((), np.float32)
    with pytest.raises(ValueError, match="in the middle"):
        programs.Early(jax.jit(bad)).begin(x)
    lowered = types.SimpleNamespace(compile=worse)
    early = programs.Early(types.SimpleNamespace(lower=lambda *_: lowered))
    early.begin(x)
    with pytest.raises(ValueError, match="at the end"):
        early.program(x)


def test_the_end_does_not_wait_for_a_program():
    code = (
        "import threading, time\n"
        "from unet_jax import programs\n"
        "class Slow:\n"
        "    def lower(self):\n"
        "        return self\n"
        "    def compile(self):\n"
        "        time.sleep(60)\n"
        "early = programs.Early(Slow())\n"
        "early.begin()\n"
        "print('said')\n"
        "programs.leave(3)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50
    )
    assert (out.returncode, out.stdout) == (3, "said\n")
    with pytest.raises(SystemExit):
        programs.leave(0)


def test_only_what_takes_long_is_spoken_of():
    told, heard = [], threading.Event()

    def say(text):
        told.append(text)
        heard.set()

    with programs.waited("reading", say, after=60):
        pass
    assert told == []
    with programs.waited("reading", say, after=0.01):
        assert heard.wait(30)
    assert told[0] == "reading ..." and told[1].startswith("reading took ")
