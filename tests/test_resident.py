"""A training set on the device gives the batches, and the run, of one that is sent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from configs import default
from unet_jax import budget, compiled, data, options, resident, run, sharding
from unet_jax.data.source import Labelled, Standardised
from unet_jax.layers import mirror
from unet_jax.resident.crops import reflected
from unet_jax.types import InputError


class Drawn:
    """Noise, and labels in the middle of it; the weight is of a kind for each test."""

    label_names = ("background", "a", "b")

    def __init__(self, *sizes, channels=1, weight="ones", dtype=np.uint8):
        self.sizes, self.channels, self.dtype = sizes, channels, dtype
        self.weight, self.reads = weight, []

    def __len__(self):
        return len(self.sizes)

    def name(self, i):
        return f"image-{i}.png"

    def size(self, i):
        return self.sizes[i]

    def __getitem__(self, i):
        self.reads.append(i)
        rng, size = np.random.default_rng(i), self.sizes[i]
        image = rng.integers(0, 255, (*size, self.channels)).astype(self.dtype)
        label = np.zeros(size, np.uint8)
        label[tuple(slice(n // 4, n // 2 + 1) for n in size)] = 1 + i % 2
        weights = {
            "ones": np.ones(size, np.float32),
            "void": rng.integers(0, 2, size).astype(np.float32),
            "map": rng.random(size, np.float32),
        }
        # Of several kinds in one set the first is all ones.
        kind = self.weight if i else "ones"
        return {"image": image, "label": label, "weight": weights[kind]}


def kept(source, crop, *, mesh=None, wanted=True, say=None):
    mesh = mesh or sharding.make_mesh(1)
    return resident.Kept(
        source, crop=crop, mesh=mesh, wanted=wanted, threads=lambda size: 2, say=say
    )


SAME = ((20, 18),) * 3
MIXED = ((20, 18), (15, 26), (9, 12), (23, 17))
CASES = {
    "inside": (Drawn(*SAME), {}),
    "channels": (Drawn(*SAME, channels=3, dtype=np.uint16), {}),
    "margin": (Drawn(*SAME), {"margin": 5}),
    "smaller": (Drawn(*MIXED), {"crop": (22, 16)}),
    "much_smaller": (Drawn((5, 1), (30, 20), (30, 30)), {"crop": (28, 16)}),
    "sizes": (Drawn(*MIXED, weight="void"), {"margin": (3, 1)}),
    "map": (Drawn(*MIXED, weight="map"), {"foreground": 0.5}),
    "foreground": (Drawn(*MIXED), {"margin": 2, "foreground": 1.0}),
    "labels": (
        Labelled(Drawn(*MIXED, weight="void"), task="labels"),
        {"crop": (16, 14), "foreground": 0.4},
    ),
    "floats": (Standardised(Drawn(*SAME)), {"start": 7}),
    "volumes": (
        Drawn((8, 9, 10), (12, 7, 8), weight="map"),
        {"crop": (8, 8, 8), "margin": (0, 1, 2), "foreground": 0.3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_crops_are_those_that_would_be_sent(case):
    source, changes = CASES[case]
    asked = {"seed": 3, "batch_size": 4, "crop": (12, 10), **changes}
    start = asked.pop("start", 0)
    sent = data.train_batches(source, **asked, start=start, threads=0)
    there = kept(source, asked["crop"])()
    read = data.crop_reader(source, np.asarray(there.size), **asked)
    cut, mesh = jax.jit(resident.cut), sharding.make_mesh(1)
    given = resident.placed(data.endless(read, start=start, threads=0), there, mesh)
    for one, crops in itertools.islice(zip(sent, given, strict=True), 6):
        found = cut(crops)
        assert found.keys() == one.keys()
        for key, array in one.items():
            assert found[key].dtype == array.dtype
            np.testing.assert_array_equal(found[key], array, err_msg=key)


def test_places_outside_are_mirrored():
    mirrored, far = jax.jit(reflected), 99
    for size in range(1, 41):
        found = mirrored(jnp.arange(-far, far), size)
        expected = mirror(np.arange(size), ((far, far - size),), axis=0)
        np.testing.assert_array_equal(found, expected)


def test_only_what_a_crop_is_aimed_at_is_read_again():
    source = Drawn(*SAME)
    there = kept(source, (12, 10))()
    asked = {"seed": 0, "batch_size": 4, "crop": (12, 10)}
    for part, expected in ((0.0, 0), (1.0, 8)):
        read = data.crop_reader(
            source, np.asarray(there.size), **asked, foreground=part
        )
        source.reads.clear()
        for step in range(2):
            read(step)
        assert len(source.reads) == expected


@pytest.mark.parametrize(
    ("weight", "shape", "dtype"),
    [
        ("ones", (1, 23, 26), np.uint8),
        ("void", (4, 23, 26), np.uint8),
        ("map", (4, 23, 26), np.float32),
    ],
)
def test_weights_take_what_they_must(weight, shape, dtype):
    there = kept(Drawn(*MIXED, weight=weight), (12, 10))()
    assert there.weight.shape == shape and there.weight.dtype == dtype
    assert there.image.shape == (4, 23, 26, 1) and there.image.dtype == np.uint8


# --- Whether it is done --------------------------------------------------------------


def test_what_fits_a_tenth_of_the_device_is_kept(monkeypatch):
    source, size, said = Drawn(*SAME), 3 * 20 * 18 * 2, []
    for memory, there in ((None, False), (10 * size - 10, False), (10 * size, True)):
        monkeypatch.setattr(budget, "device_memory", lambda memory=memory: memory)
        keep = kept(source, (12, 10), wanted=None, say=said.append)
        assert (keep() is not None) == there
        assert keep() is keep()  # read once
    assert said == ["3 training images are kept on the device (2.5 KB)"]
    sizes = Drawn((40, 40), (10, 9), (9, 9), (9, 9))
    monkeypatch.setattr(budget, "device_memory", lambda: 2**30)
    assert kept(sizes, (8, 8), wanted=None)() is None
    with pytest.raises(InputError, match="in the size of the largest, 40 x 40"):
        kept(sizes, (8, 8))()
    monkeypatch.setattr(budget, "device_memory", lambda: 4000)
    with pytest.raises(InputError, match=r"2\.1 KB for 3 images of up to 20 x 18"):
        kept(source, (12, 10))()


class Broken(Drawn):
    def __getitem__(self, i):
        if i == 2:
            raise InputError("image-2.png is damaged.")
        return super().__getitem__(i)


class Wrong(Drawn):
    def size(self, i):
        return (9, 9) if i == 1 else (8, 8)


def test_files_at_fault_are_named():
    with pytest.raises(InputError, match=r"image-2\.png is damaged"):
        kept(Broken(*SAME), (12, 10))()
    with pytest.raises(InputError, match=r"image-1\.png has the size 20 x 18, but its"):
        kept(Wrong((8, 8), (20, 18)), (4, 4))()


def config(**changes):
    values = {
        "data.cells.size": (20, 18),
        "data.cells.examples": 5,
        "data.cells.radius": (3.0, 6.0),
        "model.features": (2, 4),
        "train.crop": (16, 16),
        "train.batch_size": 4,
        "train.resident": True,
        "optim.name": "sgd",
        "optim.learning_rate": 0.05,
        "optim.warmup_steps": 0,
    }
    made = default.get_config()
    with made.unlocked():
        for key, value in {**values, **changes}.items():
            made.update_from_flattened_dict({key: value})
    return train.chosen(made)


def test_runs_that_cannot_say_so(monkeypatch):
    mesh = sharding.make_mesh(1)
    with pytest.raises(InputError, match=r"mesh\.pmap = True: leave out train\.res"):
        run.build(config(**{"mesh.pmap": True}), mesh)
    with pytest.raises(InputError, match="does not go with members"):
        options.check(config(**{"members.seeds": 2}))
    assert resident.wanted(config(), mesh) is True
    assert resident.wanted({"train": {}}, mesh) is False  # on CPU nothing is gained
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="does not go with 2 processes"):
        resident.wanted(config(), mesh)
    assert resident.wanted({"train": {}}, mesh) is False


# --- Runs ----------------------------------------------------------------------------


def compiled_step(wired, *, quick=True):
    """The step; unoptimised code of the same program compiles in half the time."""
    lowered = wired.train_step.lower(wired.shapes, wired.batch_shapes())
    level = {"xla_backend_optimization_level": 0}
    return lowered.compile(compiler_options=level if quick else None)


def trained(wired, step, calls, state):
    where = jax.tree.map(lambda x: x.sharding, wired.shapes)
    state = jax.device_put(jax.tree.map(lambda x: x.copy(), state), where)
    batches = wired.placed_batches(int(state.step))
    for _ in range(calls):
        state, _ = step(state, next(batches))
    return state


def numbers(state):
    leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
    return np.concatenate([np.ravel(x) for x in leaves])


@pytest.fixture(scope="module")
def sent():
    """A run that is sent its batches, where it begins, and three steps later."""
    wired = run.build(config(**{"train.resident": False}), sharding.make_mesh(1))
    begin, step = wired.begin(), compiled_step(wired, quick=False)
    return wired, begin, numbers(trained(wired, step, 3, begin))


def test_a_run_is_the_same_to_the_last_bit(sent):
    other, begin, expected = sent
    here = run.build(config(), sharding.make_mesh(1))
    step = compiled_step(here, quick=False)
    state = trained(here, step, 3, begin)
    np.testing.assert_array_equal(numbers(state), expected)
    # A run that goes on takes the same crops.
    again = trained(here, step, 1, trained(here, step, 2, begin))
    np.testing.assert_array_equal(numbers(again), expected)

    batch, cut = next(here.placed_batches(0)), next(other.placed_batches(0))
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), here.batch_shapes())
    assert expected == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
    assert here.batch_bytes() == 4 * (1 + 2) * 4
    # What takes a batch takes crops, as the evaluation of a batch learned by heart.
    found = here.eval_step(state.variables, batch)
    for key, array in here.eval_step(state.variables, cut).items():
        jax.tree.map(np.testing.assert_array_equal, found[key], array)


def test_several_steps_a_call_are_the_same(sent):
    mesh, found = sharding.make_mesh(1), []
    changes = {"train.steps_per_call": 3, "train.accumulate": 2}
    changes |= {f"train.{name}_every": 30 for name in ("log", "eval", "save")}
    for kept_there in (True, False):
        wired = run.build(config(**changes, **{"train.resident": kept_there}), mesh)
        found.append(numbers(trained(wired, compiled_step(wired), 2, sent[1])))
    np.testing.assert_array_equal(*found)


def test_a_run_on_a_mesh_is_the_same(sent):
    _, begin, expected = sent
    for parts, fsdp in (((2, 1), True), ((1, 2), False)):
        wired = run.build(config(**{"mesh.fsdp": fsdp}), sharding.make_mesh(*parts))
        step = compiled_step(wired)
        found = numbers(trained(wired, step, 3, begin))
        assert np.linalg.norm(found - expected) <= 2e-4 * np.linalg.norm(expected)
        if parts == (1, 2):
            # Each device cuts its own: no image goes from one to another.
            assert "all-gather" not in compiled.costs(step).collectives


def test_what_does_not_divide_over_space_is_filled_up():
    source, mesh = Drawn(*MIXED), sharding.make_mesh(1, 2)
    asked = {"seed": 0, "batch_size": 2, "crop": (11, 10), "margin": 2}
    there = kept(source, (11, 10), mesh=mesh)()
    read = data.crop_reader(source, np.asarray(there.size), **asked)
    given = next(resident.placed(data.endless(read, threads=0), there, mesh))
    batch = next(data.train_batches(source, **asked, threads=0))
    placed = sharding.place(batch, mesh)
    for whole in (False, True):
        cut = jax.jit(
            sharding.within(mesh, lambda b, whole=whole: resident.cut(b, whole=whole))
        )
        for key, array in cut(given).items():
            np.testing.assert_array_equal(array, placed[key])
            if not whole:
                assert array.sharding.is_equivalent_to(placed[key].sharding, array.ndim)
