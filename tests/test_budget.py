"""The largest batch and the least recomputation, of memories known in closed form."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import budget, compiled, losses, models, optim, training
from unet_jax.types import InputError


class Memory:
    """A step's memory by a formula, which remembers what it was asked for."""

    def __init__(self, formula):
        self.formula = formula
        self.asked = []

    def __call__(self, n):
        self.asked.append(n)
        value = self.formula(n)
        if value is None:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 15G hbm")
        return value


def largest(memory, **options):
    """`largest_batch`, held to its promise."""
    options = {"multiple": 1, "most": None, **options}
    found = budget.largest_batch(memory, **options)
    multiple, most, limit = (options[k] for k in ("multiple", "most", "limit"))
    assert len(set(memory.asked)) == len(memory.asked)
    assert all(n % multiple == 0 for n in memory.asked)
    assert most is None or max(memory.asked) <= most
    assert found in memory.asked and memory.formula(found) <= limit
    after = found + multiple
    if most is None or after <= most:
        assert after in memory.asked
        value = memory.formula(after)
        assert value is None or value > limit
    return found


# --- Batches -------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 2, 8])
@pytest.mark.parametrize("rows", [8, 16, 24, 96, 1000, 4096])
@pytest.mark.parametrize("spare", [0, 6])
def test_an_affine_memory_takes_at_most_four_compilations(multiple, rows, spare):
    memory = Memory(lambda n: 1000 + 7 * n)
    found = largest(memory, multiple=multiple, limit=1000 + 7 * rows + spare)
    assert found == rows // multiple * multiple
    assert len(memory.asked) <= 4


def test_one_that_takes_steps_is_found_whatever_the_first_guess():
    # Every 32 rows another workspace: the line through 1 and 2 says nothing of it.
    for limit in range(1100, 9000, 97):
        memory = Memory(lambda n: 1000 + 7 * n + 500 * (n // 32))
        found = largest(memory, limit=limit)
        fits = [n for n in range(1, 2000) if memory.formula(n) <= limit]
        assert found == fits[-1]
        # Doubling until it does not fit, and then halving, would take as many.
        assert len(memory.asked) <= 2 * math.log2(found) + 2


@pytest.mark.parametrize(
    "formula",
    [
        lambda n: 100 + n * n,
        lambda n: 100 + int(n**0.5),
        lambda n: 100 if n < 3 else 50 + n,  # none between the first two
        lambda n: 120 - 5 * n if n < 5 else 100 + n,  # that fall at first
        lambda n: 100 + 3 * n + 40 * (n % 2),  # padded to even rows
        lambda n: 100 + 2 * n + 60 * (10 < n < 20),  # a bump
        lambda n: 100 + 2 * n if n < 37 else None,  # then refused
    ],
)
def test_memories_that_are_not_affine(formula):
    for limit in (150, 160, 175, 190):
        memory = Memory(formula)
        largest(memory, limit=limit)
        assert len(memory.asked) <= 30


@pytest.mark.parametrize(
    ("multiple", "most", "asked"), [(4, 50, 3), (4, 48, 3), (5, 5, 1), (5, 14, 2)]
)
def test_where_everything_fits_the_bound_decides(multiple, most, asked):
    memory = Memory(lambda n: 10 * n)
    found = largest(memory, multiple=multiple, limit=10**9, most=most)
    assert found == most // multiple * multiple
    assert len(memory.asked) == asked


def test_a_memory_that_never_grows_ends():
    memory = Memory(lambda n: 5)
    assert budget.largest_batch(memory, multiple=2, limit=10) == 2 * 2**16
    assert len(memory.asked) <= 20


def test_a_compiler_that_refuses_everything_but_the_smallest():
    memory = Memory(lambda n: 10 if n == 4 else None)
    assert largest(memory, multiple=4, limit=100) == 4
    assert memory.asked == [4, 8]


def test_nothing_fits():
    memory = Memory(lambda n: 3 * 2**30 * n)
    with pytest.raises(InputError, match=r"batch of 2, .* needs 6\.0 GB a device, and"):
        budget.largest_batch(memory, multiple=2, limit=2**30)
    assert memory.asked == [2]
    with pytest.raises(
        InputError,
        match=r"needs more than the compiler allows, .* are 1\.0 GB: .* train\.crop",
    ):
        budget.largest_batch(Memory(lambda n: None), multiple=2, limit=2**30)


def test_fewer_examples_than_devices():
    memory = Memory(lambda n: n)
    with pytest.raises(InputError, match=r"smallest batch is 8 .* allowed 5: use"):
        budget.largest_batch(memory, multiple=8, limit=100, most=5)
    assert not memory.asked


def test_other_errors_of_the_compiler_stay_what_they_are():
    def broken(n):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        budget.largest_batch(broken, multiple=1, limit=1)


def test_every_compilation_is_told():
    lines = []
    memory = Memory(lambda n: n * 2**29 if n < 20 else None)
    found = largest(memory, multiple=4, limit=10 * 2**30, most=100, say=lines.append)
    assert found == 16
    assert len(lines) == len(memory.asked)
    assert lines[0] == "batch 4: 2.0 GB a device"
    assert "batch 16: 8.0 GB a device" in lines
    refused = "more than the compiler allows, and there are 10.0 GB"
    assert f"batch 20: {refused}" in lines


# --- Recomputation -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "found", "asked"),
    [
        (100, 0, [0]),
        (99, 1, [0, 5, 2, 1]),
        (60, 2, [0, 5, 2, 1]),
        (49, 3, [0, 5, 2, 3]),
        (40, 4, [0, 5, 2, 3, 4]),
        (38, 5, [0, 5, 2, 3, 4]),
    ],
)
def test_the_fewest_levels(limit, found, asked):
    memory = Memory([100, 70, 50, 42, 39, 38].__getitem__)
    assert budget.least_remat(memory, levels=5, limit=limit) == found
    assert memory.asked == asked


def test_levels_that_cost_more_than_they_save():
    peaks = [100, 70, 50, 60, 80, 90]
    memory = Memory(peaks.__getitem__)
    assert budget.least_remat(memory, levels=5, limit=55) == 2
    # All of them were worth a look before nothing is said to fit.
    memory = Memory([p * 2**20 for p in peaks].__getitem__)
    lines = []
    with pytest.raises(InputError, match=r"least memory, 50\.0 MB .* model\.remat = 2"):
        budget.least_remat(memory, levels=5, limit=45 * 2**20, say=lines.append)
    assert sorted(memory.asked) == [0, 1, 2, 3, 4, 5]
    assert lines[0] == "model.remat 0: 100.0 MB a device, and there are 45.0 MB"


def test_no_levels_and_refused_ones():
    with pytest.raises(InputError, match=r"model\.remat = 0"):
        budget.least_remat(Memory(lambda n: 10), levels=0, limit=5)
    memory = Memory(lambda n: None if n < 3 else 10)
    assert budget.least_remat(memory, levels=4, limit=50) == 3


# --- Devices -------------------------------------------------------------------------


def test_the_memory_of_a_device(monkeypatch):
    def refuse():
        raise NotImplementedError

    def device(stats):
        found = [SimpleNamespace(memory_stats=stats)]
        monkeypatch.setattr(jax, "local_devices", lambda: found)
        return budget.device_memory()

    assert budget.device_memory() is None  # the CPU's
    assert device(lambda: {"bytes_limit": 7, "bytes_in_use": 2}) == 7
    assert device(dict) is None
    assert device(refuse) is None


def test_a_real_step():
    model = models.UNet(num_classes=2, features=(4, 8), norm="none")
    tx, _ = optim.build(total_steps=9, name="sgd", learning_rate=0.1)
    loss = losses.build(task="classes", cross_entropy=1.0)
    stats = {"kind": "range", "shift": (0.0,), "scale": (1 / 255,)}
    step = training.make_train_step(model, tx, loss, stats=stats)
    state = jax.eval_shape(
        lambda: training.init_state(model, tx, seed=0, image_shape=(1, 32, 32, 1))
    )
    # It is only asked for its memory, and that is told sooner without optimisation.
    quick = {"xla_backend_optimization_level": 0}

    @functools.cache
    def peak(rows):
        sizes = {"image": (32, 32, 1), "label": (32, 32), "weight": (32, 32)}
        dtypes = {"image": np.uint8, "label": np.uint8, "weight": np.float32}
        batch = {
            k: jax.ShapeDtypeStruct((rows, *size), dtypes[k])
            for k, size in sizes.items()
        }
        batch["index"] = jax.ShapeDtypeStruct((rows,), jnp.int32)
        jitted = jax.jit(step, donate_argnums=0, compiler_options=quick)
        found = compiled.costs(jitted.lower(state, batch).compile()).peak
        assert found is not None
        return found

    assert peak(2) < peak(4) < peak(6)
    limit = (peak(4) + peak(6)) // 2
    assert budget.largest_batch(peak, multiple=2, limit=limit) == 4
    assert budget.largest_batch(peak, multiple=2, limit=limit, most=3) == 2
    with pytest.raises(InputError, match="a batch of 4"):
        budget.largest_batch(peak, multiple=4, limit=peak(4) - 1)
