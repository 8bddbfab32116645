"""What no run can be, each refused in one sentence with the nearest that works."""

import jax
import pytest

import train
from configs import default
from unet_jax import feasible, models, run, sharding
from unet_jax.types import InputError


def config(**changes):
    """The default config, small, with some keys changed."""
    values = {
        "data.cells.size": (32, 32),
        "data.cells.examples": 4,
        "model.features": (2, 4, 8),
        "train.crop": (32, 32),
        "train.batch_size": 4,
    }
    made = default.get_config()
    with made.unlocked():
        for key, value in {**values, **changes}.items():
            made.update_from_flattened_dict({key: value})
    return train.chosen(made)


class Mesh:
    """The shape of a mesh that this machine has no devices for."""

    def __init__(self, data, space):
        self.shape = {"data": data, "space": space}


@pytest.mark.parametrize(
    ("fields", "crop", "space", "says"),
    [
        # Four levels: 8 times smaller at the coarsest.
        ({}, (32, 32), 8, "a device needs 8 rows.* use mesh.space=4 or"),
        ({}, (4, 32), 2, "use mesh.space=1 or less, or a crop of at least 16"),
        ({}, (72, 72), 2, "use 64 or 80 for its first axis"),
        ({"strides": (2, 2, 1)}, (36, 36), 2, "use 32 or 40 for its first axis"),
        ({"padding": "valid", "features": (2, 4)}, (42, 42), 8, "use 48 for its first"),
        # Two rows each, where they are mirrored.
        ({"padding": "reflect"}, (64, 64), 8, "needs 16 rows.* use mesh.space=4"),
        ({"padding": "reflect"}, (48, 48), 2, "use 32 or 64"),
    ],
)
def test_crops_that_do_not_divide_over_space(fields, crop, space, says):
    model = models.build("unet", num_classes=2, **{"features": (2, 4, 8, 8)} | fields)
    with pytest.raises(InputError, match=says):
        feasible.check_space(model, crop, Mesh(1, space))
    feasible.check_space(model, crop, Mesh(8, 1))


@pytest.mark.parametrize(
    ("fields", "crop", "space"),
    [
        ({}, (64, 20), 8),
        ({"padding": "valid"}, (92, 60), 8),  # 96 rows on the devices, and 92 again
        ({"strides": (2, 1, 1)}, (16, 8), 8),
    ],
)
def test_crops_that_divide(fields, crop, space):
    model = models.build("unet", num_classes=2, **{"features": (2, 4, 8, 8)} | fields)
    feasible.check_space(model, crop, Mesh(1, space))


@pytest.mark.parametrize(
    ("data", "space", "says"),
    [
        (-1, 3, "mesh.space = 3 does not divide the 2 devices: use mesh.space=2"),
        (2, 2, "needs 4 devices, but there are 2 devices: use mesh.data=1"),
        (1, 5, "needs 5 devices, but there are 2 devices: use a smaller mesh"),
        (0, 1, "must be 1 or more"),
        (1, 0, "must be 1 or more"),
    ],
)
def test_meshes_that_the_devices_do_not_allow(data, space, says):
    with pytest.raises(InputError, match=says):
        sharding.make_mesh(data, space)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.batch_size": 3}, "does not divide over 2 devices: use 2 or 4"),
        (
            {"train.batch_size": 6, "train.accumulate": 2},
            "over 2 devices and 2 microbatches: use 4 or 8",
        ),
        (
            {"train.steps_per_call": 7},
            "train.steps_per_call = 7 does not divide train.steps = 300: use steps=294",
        ),
        ({"train.steps_per_call": 20, "train.log_every": 10}, "use log_every=20"),
        ({"train.steps_per_call": 0}, "must be 1 or more"),
        ({"mesh.pmap": True, "mesh.fsdp": True}, "does not go with mesh.fsdp = True"),
        (
            {"mesh.pmap": True, "loss.over": "batch"},
            "does not go with loss.over = 'batch'",
        ),
        (
            {"train.batch_size": 0, "model.remat": -1},
            "one depends on the other: give one of them",
        ),
        ({"train.batch_size": 0}, "state it, as in --config.train.memory_gb=16"),
        ({"train.batch_size": 0, "train.memory_gb": -1.0}, "must be 0 or more"),
    ],
)
def test_configs_that_no_mesh_allows(changes, says):
    with pytest.raises(InputError, match=says):
        run.build(config(**changes), sharding.make_mesh(2))


def test_what_fits_is_found_by_compiling():
    mesh = sharding.make_mesh(2, devices=jax.devices())
    plain = {"model.features": (2, 4)}
    plain |= {f"augment.{key}": False for key in ("flip", "quarter_turns")}
    peaks = {}
    for size in (2, 4):
        wired = run.build(config(**plain, **{"train.batch_size": size}), mesh)
        waiting = sharding.AHEAD * wired.batch_bytes()
        assert wired.batch_bytes() == size // 2 * (32 * 32 * (1 + 1 + 4) + 4)
        peaks[size] = wired.costs().peak + waiting
    limit = (peaks[2] + peaks[4]) / 2 / 2**30
    lines = []
    changes = {**plain, "train.batch_size": 0, "train.memory_gb": limit}
    found = run.build(config(**changes), mesh, say=lines.append)
    assert found.config["train"]["batch_size"] == 2
    assert found.meta.config == found.config
    assert any("batch 4" in line for line in lines)
    # What was found is kept by a run that goes on, and nothing is compiled again.
    lines.clear()
    again = run.build(config(**changes), mesh, found.meta, say=lines.append)
    assert again.config["train"]["batch_size"] == 2 and not lines
    # With room for all, nothing is computed again.
    roomy = {**plain, "train.memory_gb": 1.0, "model.remat": -1}
    assert run.build(config(**roomy), mesh).model.remat == 0
