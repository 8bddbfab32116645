"""The mesh: batches over it, refusals with the nearest that works."""

import numpy as np
import pytest

from unet_jax import sharding
from unet_jax.types import InputError


def test_prefetch_keeps_order_and_places_rows_over_the_devices():
    mesh = sharding.make_mesh()
    assert mesh.shape == {"data": 2, "space": 1}
    batches = [{"image": np.full((4, 2), i, np.uint8)} for i in range(5)]
    placed = list(sharding.prefetch(iter(batches), mesh))
    assert [int(b["image"][0, 0]) for b in placed] == [0, 1, 2, 3, 4]
    assert placed[0]["image"].sharding.is_equivalent_to(sharding.split(mesh, 2), 2)
    shards = placed[0]["image"].addressable_shards
    assert [s.data.shape for s in shards] == [(2, 2), (2, 2)]


def test_prefetch_never_asks_for_more_than_it_is_told():
    def source():
        for i in range(3):
            asked.append(i)
            yield {"x": np.zeros((2, 1), np.float32)}

    asked = []
    stream = sharding.prefetch(source(), sharding.make_mesh(), ahead=1)
    next(stream)
    assert asked == [0, 1]


def test_what_does_not_fit_the_devices_is_refused():
    with pytest.raises(InputError, match="there are 2 devices"):
        sharding.make_mesh(3)
    with pytest.raises(InputError, match="use 4 or 6"):
        sharding.check_batch(sharding.make_mesh(), 5, "train.batch_size")
    sharding.check_batch(sharding.make_mesh(), 6, "train.batch_size")
