"""Examples kept on disk, and examples that cannot be had."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from unet_jax import data
from unet_jax.data.keeping import Mapped, Skipping, skipped
from unet_jax.data.source import Labelled, NoInstances, instances
from unet_jax.types import InputError


class Some:
    """Examples of several sizes; those of ``broken`` cannot be read."""

    label_names = ("background", "cell")

    def __init__(self, count=6, broken=(), headless=()):
        self.count, self.broken, self.headless, self.reads = count, broken, headless, 0

    def __len__(self):
        return self.count

    def name(self, i):
        return f"{i}.png"

    def size(self, i):
        if i in self.headless:
            raise InputError(f"{i}.png has no header.")
        return (5 + i, 7)

    def __getitem__(self, i):
        self.reads += 1
        if i in self.broken or i in self.headless:
            raise InputError(f"{i}.png is damaged.")
        rng = np.random.default_rng(i)
        shape = self.size(i)
        return {
            "image": rng.integers(0, 2**16, (*shape, 3), np.uint16),
            "label": rng.integers(0, 2, shape, np.uint8),
            "weight": rng.random(shape, np.float32),
        }


def _assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        np.testing.assert_array_equal(one[key], other[key])


def test_mapped_examples_are_decoded_once_and_leave_no_file(tmp_path):
    plain, inner = Some(), Some()
    source = Mapped(inner, tmp_path / "cache")
    for _ in range(3):
        for i in (4, 0, 5, 1):
            _assert_same(source[i], plain[i])
    assert inner.reads == 4
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match="read-only"):
        source[0]["image"][0] = 1
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    held = [source[i % 6] for i in range(50)]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + len(held) * 3
        del held
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_full_disk_only_costs_time(tmp_path, monkeypatch, caplog):
    source, inner = Some(), Some()
    mapped = Mapped(inner, tmp_path)
    write = os.pwrite

    def full(fd, view, offset):
        if inner.reads > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        for i in range(4):
            _assert_same(mapped[i], source[i])
    assert inner.reads == 4 + 2
    assert caplog.text.count("takes no more (No space left on device): 2 of 6") == 1


def test_a_cache_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache_dir = .*file"):
        Mapped(Some(), tmp_path / "file")


def test_skipped_examples_count_nowhere_and_all_others_keep_their_numbers(caplog):
    inner = Some(broken=(1,), headless=(4,))
    source = Skipping(inner, inner[0])
    for i in (0, 2, 3, 5):
        _assert_same(source[i], inner[i])
    for i, size in ((1, (6, 7)), (4, (5, 7))):
        assert source.size(i) == size
        example = source[i]
        assert example["image"].shape == (*size, 3)
        assert example["image"].dtype == np.uint16
        assert not example["weight"].any()
    assert skipped(Labelled(source, task="classes")) == [
        "1.png is damaged.",
        "4.png has no header.",
    ]
    source[1], source[4]
    assert caplog.text.count("left out: ") == 2
    assert skipped(inner) == []


def _folder(root, count=6):
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        image = rng.integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(image).save(root / "images" / f"{i}.png")
        Image.fromarray((image > 99) * np.uint8(255)).save(root / "masks" / f"{i}.png")
    return root


def _build(root, **options):
    return data.build(
        source="folder",
        root=str(root),
        train="train[:4]",
        evaluation="train[4:]",
        task="classes",
        **options,
    )


def test_a_damaged_file_stops_or_is_skipped(tmp_path):
    root = _folder(tmp_path / "data")
    whole = _build(root)
    path = root / "images" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        _build(root)
    with pytest.raises(InputError, match="'ignore' is not known"):
        _build(root, on_error="ignore")
    found = _build(root, on_error="skip", cache_dir=str(tmp_path / "cache"))
    assert len(found.train) == 4
    for i in (0, 1, 3):
        _assert_same(found.train[i], whole.train[i])
    assert not found.train[2]["weight"].any()
    assert len(data.skipped(found.train)) == 1


def test_auto_normalisation_is_by_the_type_of_the_pixels(tmp_path):
    from unet_jax import normalisation

    rng = np.random.default_rng(0)
    eight = rng.integers(0, 9, (3, 4, 4, 1), np.uint8)
    twelve = rng.integers(0, 4096, (3, 4, 4, 2), np.uint16)
    assert normalisation.measure("auto", eight)["kind"] == "range"
    measured = normalisation.measure("auto", twelve)
    assert measured == normalisation.measure("standard", twelve)
    assert normalisation.measure("auto", twelve.astype(np.float32))["kind"] == (
        "standard"
    )
    with pytest.raises(InputError, match="auto"):
        normalisation.stated("auto", 1)


def test_sound_examples_keep_their_objects_and_borders(tmp_path):
    root = _folder(tmp_path / "data")
    border = {"w0": 10.0, "cache": "none"}
    stop, skip = (
        _build(root, on_error=way, border=dict(border)) for way in ("stop", "skip")
    )
    for i in range(4):
        _assert_same(stop.train[i], skip.train[i])
    # Masks of classes have no numbers of objects, which is no fault of theirs.
    with pytest.raises(NoInstances):
        instances(skip.train, 0)
    assert data.skipped(skip.train) == []


def test_a_file_that_can_be_read_again_counts_again(tmp_path):
    root = _folder(tmp_path / "data")
    found = _build(root, on_error="skip")
    path = root / "images" / "1.png"
    whole = found.train[1]
    again = _build(root, on_error="skip", cache_mb=0)
    stored = path.read_bytes()
    path.write_bytes(b"")
    assert not again.train[1]["weight"].any()
    path.write_bytes(stored)
    _assert_same(again.train[1], whole)


def test_nothing_that_counts_is_one_sentence():
    from unet_jax import normalisation

    empty = [{"image": np.zeros((2, 2, 1), np.uint8), "weight": np.zeros((2, 2))}]
    with pytest.raises(InputError, match="no image of the training data"):
        normalisation.measure("auto", normalisation.spread(empty))
