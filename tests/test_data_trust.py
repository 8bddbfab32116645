"""unet_jax.data.trust: names, links, sizes and JSON of a stranger."""

import json
import os

import pytest

from unet_jax.data import trust
from unet_jax.types import InputError


def test_memory_is_what_a_process_can_have():
    assert 2**27 < trust.memory() < 2**50


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((), True),
        ((0, 2**60), True),
        ((1000, 500), True),
        ((1001, 500), False),
        ((-1, 5), False),
        ((-1, -5), False),
        ((2**40, 2**40), False),
        ((10**5000, 10**5000), False),
    ],
)
def test_check_bytes(monkeypatch, shape, fits):
    monkeypatch.setattr(trust, "memory", lambda: 2 * 1000 * 500 * 4)
    if fits:
        trust.check_bytes(shape, 4, "a.tif")
        return
    with pytest.raises(InputError, match=r"a\.tif says that it holds .* numbers.* cut"):
        trust.check_bytes(shape, 4, "a.tif")


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("a.png", "a.png"),
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        (r"a\b.png", "a/b.png"),
        ("..a/b..c.png", "..a/b..c.png"),
        (" ä.png", " ä.png"),
    ],
)
def test_named(tmp_path, name, below):
    assert trust.named(tmp_path, name, "x.json, images[0]") == tmp_path / below


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        r"\etc\passwd",
        "C:/a.png",
        r"c:\a.png",
        "c:a.png",
        "..",
        "../a.png",
        "a/../../b.png",
        r"a\..\..\b.png",
        "a/..",
    ],
)
def test_named_out_of_the_folder(tmp_path, name):
    with pytest.raises(InputError, match=r"x\.json, images\[0\] names .*leads out of"):
        trust.named(tmp_path, name, "x.json, images[0]")


@pytest.mark.parametrize("name", [None, 3, [], "", ".", "/", "./.", "a\0b", "\ud800"])
def test_named_nothing(tmp_path, name):
    with pytest.raises(InputError, match=r"x\.json names no file .*mend"):
        trust.named(tmp_path, name, "x.json")


def test_links(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "rootless"
    for folder in (root / "a", outside):
        folder.mkdir(parents=True)
        (folder / "file.png").touch()
    (root / "within.png").symlink_to(root / "a" / "file.png")
    (root / "b").symlink_to(root / "a")
    (tmp_path / "link").symlink_to(root)
    good = [root / "a" / "file.png", root / "within.png", root / "b" / "file.png"]
    trust.check_links(root, good, links=False)
    linked = tmp_path / "link"
    trust.check_links(linked, [linked / "a" / "file.png"], links=False)
    (root / "file.png").symlink_to(outside / "file.png")
    (root / "c").symlink_to(outside)
    (root / "two.png").symlink_to("file.png")
    (root / "none.png").symlink_to("../nowhere.png")
    for name in ("file.png", "c/file.png", "two.png", "none.png", "a/../../x.png"):
        trust.check_links(root, [root / name], links=True)
        with pytest.raises(InputError, match=rf"{name} leads to .*data\.links=True"):
            trust.check_links(root, [*good, root / name], links=False)


def test_read_json(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps({"a": [1, "ä"]}), encoding="utf-8")
    assert trust.read_json(path) == {"a": [1, "ä"]}
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000, b"<html>"):
        path.write_bytes(text)
        with pytest.raises(InputError, match=r"a\.json is no JSON \(.*\): mend it"):
            trust.read_json(path)
    monkeypatch.setattr(trust, "memory", lambda: 5000)
    path.write_text(json.dumps([0] * 100))
    with pytest.raises(InputError, match=r"a\.json has .* GB, and parsed would not"):
        trust.read_json(path)
    with pytest.raises(InputError, match=r"b\.json does not exist"):
        trust.read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match="is not a file"):
        trust.read_json(tmp_path)
    # nobody writes to it: reading it would wait for ever
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json is not a file"):
        trust.read_json(tmp_path / "pipe.json")
