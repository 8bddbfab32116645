"""unet_jax.data.images, formats and masks: files in, exact numbers out."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unet_jax.data import images
from unet_jax.data.masks import Coding, choose
from unet_jax.types import InputError


def png16(array: np.ndarray) -> bytes:
    """A PNG of 16 bits and 1 to 4 channels, which Pillow cannot write."""
    height, width, channels = array.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = (
        chunk(b"IHDR", head),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".bmp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_are_exact(tmp_path, rng, suffix, channels):
    array = rng.integers(0, 256, (5, 7, channels), np.uint8)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array.squeeze()).save(path)
    got = images.read_image(path)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, array)
    assert images.image_size(path) == (5, 7)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_16_bits_and_drops_alpha(tmp_path, rng, channels):
    array = rng.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(png16(array))
    want = array[..., : channels - 1] if channels in (2, 4) else array
    got = images.read_image(path)
    assert got.dtype == np.uint16
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(images.decode_image(path.read_bytes(), "a"), want)


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_dropped(tmp_path, rng, mode, suffix):
    array = rng.integers(0, 256, (5, 7, len(mode)), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(array, mode if mode == "LA" else None).save(path)
    np.testing.assert_array_equal(images.read_image(path), array[..., :-1])


def test_palette_image_has_colours_and_palette_mask_its_index(tmp_path, rng):
    index = rng.integers(0, 3, (5, 7), np.uint8)
    colours = np.asarray([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
    for suffix in (".png", ".tif", ".gif"):
        path = tmp_path / f"a{suffix}"
        image = Image.fromarray(index)
        image.putpalette(colours.tobytes())
        image.save(path)
        np.testing.assert_array_equal(images.read_image(path), colours[index])
        if suffix != ".gif":  # whose writer reorders the palette
            np.testing.assert_array_equal(images.read_mask(path), index)


def test_1_bit_and_2_bit(tmp_path, rng):
    bits = rng.integers(0, 2, (5, 7)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_mask(tmp_path / "a.png"), bits)
    np.testing.assert_array_equal(
        images.read_image(tmp_path / "a.png")[..., 0], bits * np.uint8(255)
    )
    ids = np.asarray([[0, 1, 2, 3]], np.uint8)
    head = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    data = png16(np.zeros((1, 4, 1), np.uint16))
    body = zlib.compress(b"\0" + bytes([0b00011011]))

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    data = data[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    (tmp_path / "b.png").write_bytes(data)
    np.testing.assert_array_equal(images.read_mask(tmp_path / "b.png"), ids)
    np.testing.assert_array_equal(
        images.read_image(tmp_path / "b.png")[..., 0], ids * 85
    )


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("uint16", "uint16"),
        (">u2", "uint16"),
        ("bool", "uint8"),
        *((kind, "float32") for kind in ("int16", "int32", "float16", "float64")),
    ],
)
def test_number_types(tmp_path, stored, read):
    array = np.asarray([[0, 1], [1, 0]]).astype(stored)
    np.save(tmp_path / "a.npy", array)
    got = images.read_image(tmp_path / "a.npy")
    assert got.dtype == np.dtype(read) and got.dtype.isnative
    scale = 255 if stored == "bool" else 1
    np.testing.assert_array_equal(got[..., 0], array.astype(np.float32) * scale)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_tiff_layouts(tmp_path, rng, dtype):
    array = (rng.random((3, 5, 7)) * 99).astype(dtype)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array[0], photometric="minisblack")
    np.testing.assert_array_equal(images.read_image(path)[..., 0], array[0])
    tifffile.imwrite(path, array, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(images.read_image(path), array.transpose(1, 2, 0))
    tifffile.imwrite(path, array, imagej=True, metadata={"axes": "CYX"})
    np.testing.assert_array_equal(images.read_image(path), array.transpose(1, 2, 0))
    assert images.image_size(path) == (5, 7)
    tifffile.imwrite(path, array, photometric="minisblack")
    for read in (images.read_image, images.image_size):
        with pytest.raises(InputError, match=r"a\.tif is a stack of 3 pages.*volumes"):
            read(path)


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_any_number_of_channels(tmp_path, rng, count):
    pages = rng.integers(0, 65536, (count, 6, 7)).astype(np.uint16)
    want = pages.transpose(1, 2, 0)
    grey = {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "pages.tif", pages, **grey)
    tifffile.imwrite(tmp_path / "planar.tif", pages, planarconfig="separate", **grey)
    tifffile.imwrite(tmp_path / "last.tif", want, planarconfig="contig", **grey)
    tifffile.imwrite(
        tmp_path / "imagej.tif", pages, imagej=True, metadata={"axes": "CYX"}
    )
    tifffile.imwrite(tmp_path / "z.ome.tif", pages, ome=True, metadata={"axes": "ZYX"})
    np.save(tmp_path / "first.npy", pages)
    np.save(tmp_path / "last.npy", want)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(images.read_image(path, channels=count), want)
        assert images.image_size(path, channels=count) == (6, 7)
    with pytest.raises(InputError, match=rf"set `channels` to {count} if the pages"):
        images.read_image(tmp_path / "pages.tif", channels=count + 2)


def test_which_axis_of_npy_is_channels(tmp_path, rng):
    array = rng.integers(0, 256, (3, 4, 3), np.uint8)
    np.save(tmp_path / "a.npy", array)
    for channels in (0, 3):  # as it is where both could be meant
        np.testing.assert_array_equal(
            images.read_image(tmp_path / "a.npy", channels=channels), array
        )
    np.save(tmp_path / "b.npy", array[:, :, :2])
    assert images.read_image(tmp_path / "b.npy").shape == (3, 4, 2)
    assert images.image_size(tmp_path / "b.npy") == (3, 4)
    assert images.read_image(tmp_path / "b.npy", channels=3).shape == (4, 2, 3)
    assert images.image_size(tmp_path / "b.npy", channels=3) == (4, 2)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_a_channel_where_four_are_asked_for(tmp_path, rng, suffix):
    array = rng.integers(0, 256, (5, 7, 4), np.uint8)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(array).save(path)
    np.testing.assert_array_equal(images.read_image(path, channels=4), array)
    np.testing.assert_array_equal(images.read_image(path, channels=3), array[..., :3])


def test_planes(tmp_path, rng):
    """A mask whose channels, or pages, are labels."""
    array = rng.integers(0, 2, (5, 7, 4), np.uint8)
    Image.fromarray(array).save(tmp_path / "rgba.png")
    (tmp_path / "deep.png").write_bytes(png16(array.astype(np.uint16)))
    tifffile.imwrite(
        tmp_path / "pages.tif", array.transpose(2, 0, 1), photometric="minisblack"
    )
    np.save(tmp_path / "a.npy", array.astype(bool))
    np.save(tmp_path / "b.npy", array.astype(np.float32))
    for path in tmp_path.iterdir():
        got = images.read_planes(path)
        assert got.dtype.kind in "iu"
        np.testing.assert_array_equal(got, array)
        assert images.image_size(path, channels=-1) == (5, 7)
    Image.fromarray(array[..., 0]).save(tmp_path / "one.png")
    np.testing.assert_array_equal(
        images.read_planes(tmp_path / "one.png"), array[..., :1]
    )
    np.save(tmp_path / "a.npy", array + 0.5)
    with pytest.raises(InputError, match=r"a\.npy has the value .* whole numbers"):
        images.read_planes(tmp_path / "a.npy")


def test_compressed_tiff_without_extra_packages(tmp_path, rng):
    array = rng.integers(0, 256, (32, 32, 3), np.uint8)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        Image.fromarray(array).save(tmp_path / "a.tif", compression=compression)
        np.testing.assert_array_equal(images.read_image(tmp_path / "a.tif"), array)


def test_photograph_is_turned_upright(tmp_path):
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert images.read_image(tmp_path / "a.jpg").shape == (6, 4, 3)
    assert images.image_size(tmp_path / "a.jpg") == (6, 4)


def test_to_channels():
    rgb = np.asarray([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]], np.uint8)
    grey = images.to_channels(rgb, 1)
    assert grey.dtype == np.uint8
    np.testing.assert_array_equal(grey[0, :, 0], [76, 150, 29, 9])
    np.testing.assert_array_equal(images.to_channels(grey, 3)[..., 2], grey[..., 0])
    rgba = np.concatenate([rgb, rgb[..., :1]], -1)
    np.testing.assert_array_equal(images.to_channels(rgba, 3), rgb)
    np.testing.assert_array_equal(images.to_channels(rgba, 1), grey)
    assert images.to_channels(rgba, 0) is rgba
    f32 = images.to_channels(rgb.astype(np.float32) / 255, 1)
    assert f32.dtype == np.float32
    np.testing.assert_allclose(f32[0, 0, 0], 0.299, atol=1e-6)
    with pytest.raises(InputError, match="5 channels, which cannot become 3"):
        images.to_channels(np.zeros((2, 2, 5)), 3)


@settings(max_examples=20, deadline=None)
@given(high=st.integers(0, 65535), suffix=st.sampled_from([".png", ".tif", ".npy"]))
def test_label_round_trip(tmp_path_factory, high, suffix):
    label = np.asarray([[0, high], [high // 2, 1 if high else 0]])
    path = tmp_path_factory.mktemp("label") / f"a{suffix}"
    images.write_label(path, label)
    got = images.read_mask(path)
    assert got.dtype == (np.uint8 if high < 256 else np.uint16)
    np.testing.assert_array_equal(got, label)


def test_label_errors(tmp_path):
    with pytest.raises(InputError, match=r"labels from -1 to 0.*0 to 65535"):
        images.write_label(tmp_path / "a.png", np.asarray([[-1, 0]]))
    with pytest.raises(InputError, match=r"a\.png cannot hold a 3-D label"):
        images.write_label(tmp_path / "a.png", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InputError, match=r"a\.png cannot be written \(no such file"):
        images.write_label(tmp_path / "no" / "a.png", np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy", ".gif"])
def test_damaged_files_are_named(tmp_path, rng, suffix):
    path = tmp_path / f"bad{suffix}"
    array = rng.integers(0, 256, (64, 64), np.uint8)
    if suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:size])
        for read in (images.read_image, images.read_mask):
            with pytest.raises(
                InputError, match=rf"bad\{suffix} cannot be read \(.*\):"
            ):
                read(path)
    path.write_bytes(b"<html>404 Not Found</html>" * 20)
    for read in (images.read_image, images.read_mask, images.image_size):
        with pytest.raises(InputError, match=rf"bad\{suffix} cannot be read"):
            read(path)
    path.unlink()
    with pytest.raises(InputError, match=rf"bad\{suffix} does not exist"):
        images.read_image(path)


def test_pickled_npy_is_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.asarray([{}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"a\.npy cannot be read"):
        images.read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_pixels_are_named(tmp_path, bad):
    array = np.zeros((4, 4), np.float32)
    array[1, 2] = bad
    tifffile.imwrite(tmp_path / "a.tif", array)
    with pytest.raises(
        InputError, match=r"a\.tif has NaN or infinite pixels \(1 of 16"
    ):
        images.read_image(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"mask .*a\.tif has the value (nan|inf)"):
        images.read_mask(tmp_path / "a.tif")


def test_too_many_pixels(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "a.png")
    for limit in (350, 150):  # Pillow warns from the limit on and fails at its double
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match=r"a\.png has more pixels than"):
            images.read_image(tmp_path / "a.png")


def test_mask_that_is_no_mask(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 2), 0.5))
    with pytest.raises(InputError, match=r"a\.npy has the value 0\.5: .*whole numbers"):
        images.read_mask(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.zeros((2, 2, 5), np.uint8))
    with pytest.raises(InputError, match=r"a\.npy has 5 channels"):
        images.read_mask(tmp_path / "a.npy")


# ---- masks: what the numbers mean


def masks(tmp_path: Path, *arrays: np.ndarray, suffix: str = ".png") -> list[Path]:
    paths = [tmp_path / f"m{i}{suffix}" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(np.asarray(array)).save(path)
    return paths


def u8(*values: int) -> np.ndarray:
    return np.asarray([values], np.uint8)


@pytest.mark.parametrize("white", [1, 7, 255])
def test_auto_binary(tmp_path, white):
    paths = masks(tmp_path, u8(0, 0), u8(0, white))
    coding = choose(paths, images.read_mask)
    assert coding.kind == "binary" and coding.foreground == white
    assert coding.label_names == ("background", "foreground")
    label, weight = coding.decode(u8(white, 0), "m")
    assert label.dtype == np.uint8 and weight is None
    np.testing.assert_array_equal(label, u8(1, 0))
    with pytest.raises(InputError, match=r"m\.png has the value 3, but a binary mask"):
        coding.decode(u8(0, 3), "m.png")


def test_auto_index(tmp_path):
    paths = masks(tmp_path, u8(0, 1, 1), u8(0, 2, 3))
    coding = choose(paths, images.read_mask)
    assert coding.kind == "index"
    assert coding.label_names == ("background", "class_1", "class_2", "class_3")
    named = choose(paths, images.read_mask, label_names="abcde")
    assert named.label_names == tuple("abcde")
    with pytest.raises(
        InputError,
        match=r"m\.png has the value 5, but the 5 classes a, b, c, d, e are 0",
    ):
        named.decode(u8(0, 5), "m.png")


def test_auto_colors(tmp_path):
    red, green = [200, 0, 0], [0, 200, 0]
    first = np.asarray([[[0, 0, 0], red]], np.uint8)
    second = np.asarray([[[0, 0, 0], green]], np.uint8)
    black = np.zeros((1, 2, 3), np.uint8)
    coding = choose(masks(tmp_path, first, second, black), images.read_mask)
    assert coding.colors == ((0, 0, 0), (0, 200, 0), (200, 0, 0))
    assert coding.label_names == ("background", "#00c800", "#c80000")
    np.testing.assert_array_equal(coding.decode(first, "m")[0], u8(0, 2))
    np.testing.assert_array_equal(coding.decode(u8(0, 0), "m")[0], u8(0, 0))
    with pytest.raises(InputError, match=r"m\.png has the colour \(1, 2, 3\) in 1 pix"):
        coding.decode(np.asarray([[[0, 0, 0], [1, 2, 3]]], np.uint8), "m.png")
    table = choose([], images.read_mask, colors=[red, [0, 0, 0]], label_names="ab")
    np.testing.assert_array_equal(table.decode(first, "m")[0], u8(1, 0))


@pytest.mark.parametrize("kind", ["index", "binary", "instances", "colors"])
def test_ignored_value_gets_weight_0(kind):
    table = ((0, 0, 0), (1, 1, 1)) if kind == "colors" else ()
    coding = Coding(kind, ("a", "b"), colors=table, ignore=255)
    label, weight = coding.decode(u8(0, 1, 255), "m")
    np.testing.assert_array_equal(label, u8(0, 1, 0))
    np.testing.assert_array_equal(weight, [[1, 1, 0]])
    assert weight.dtype == np.float32


def test_ignored_value_is_no_class(tmp_path):
    paths = masks(tmp_path, u8(0, 1, 2, 255))
    assert len(choose(paths, images.read_mask, ignore=255).label_names) == 3
    with pytest.raises(
        InputError, match=r"values 0, 1, 2, 255 .*m0\.png.*`ignore` to 255"
    ):
        choose(paths, images.read_mask)


def test_binary_cuts_soft_edges_in_the_middle():
    coding = Coding("binary", ("a", "b"))
    np.testing.assert_array_equal(
        coding.decode(u8(0, 127, 128, 255), "m.png")[0], u8(0, 0, 1, 1)
    )
    np.testing.assert_array_equal(
        coding.decode(u8(0, 3, 1, 2), "m.JPG")[0], u8(0, 0, 0, 0)
    )
    np.testing.assert_array_equal(coding.decode(u8(0, 1), "m.png")[0], u8(0, 1))
    with pytest.raises(InputError, match=r"m\.png has the value 2"):
        coding.decode(u8(0, 1, 2), "m.png")


def test_instances_and_shift():
    coding = Coding("instances", ("background", "cell"))
    many = np.asarray([[0, 1, 700]], np.uint16)
    np.testing.assert_array_equal(coding.decode(many, "m")[0], u8(0, 1, 1))
    with pytest.raises(InputError, match=r"m\.npy has the value -4"):
        coding.decode(np.asarray([[-4, 1]]), "m.npy")
    shifted = Coding("index", ("pet", "background", "outline"), shift=1)
    np.testing.assert_array_equal(shifted.decode(u8(1, 2, 3), "m")[0], u8(0, 1, 2))
    with pytest.raises(InputError, match=r"m\.png has the value 0, but .* are 1 to 3"):
        shifted.decode(u8(0, 1), "m.png")


def test_auto_refuses_what_it_cannot_tell(tmp_path, rng):
    noisy = rng.integers(0, 256, (32, 32), np.uint8)
    with pytest.raises(InputError, match=r"m0\.jpg is a JPEG.*PNG.*binary"):
        choose(masks(tmp_path, noisy, suffix=".jpg"), images.read_mask)
    with pytest.raises(InputError, match=r"values 0, 1, 2.*to instances"):
        choose(masks(tmp_path, np.arange(256, dtype=np.uint8)[None]), images.read_mask)
    slip = masks(tmp_path, u8(0, 255), u8(0, 128, 255), u8(0, 255))
    with pytest.raises(InputError, match=r"such as 128 in .*m1\.png.*to binary"):
        choose(slip, images.read_mask)
    picture = rng.integers(0, 256, (32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"masks have \d+ colours, as in .*m0\.png"):
        choose(masks(tmp_path, picture), images.read_mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "indices"}, "mask='indices' is not known: choose auto, binary"),
        ({"mask": "binary", "label_names": "abc"}, "3 names, but binary masks"),
        ({"mask": "binary", "colors": [(0, 0, 0)]}, "`colors` needs mask='colors'"),
        ({"colors": [(0, 0, 300)]}, "is not a colour"),
        ({"colors": [(0, 0, 0)], "label_names": "ab"}, "2 names, but there are 1 colo"),
    ],
)
def test_options_that_contradict(options, message):
    with pytest.raises(InputError, match=message):
        choose([], images.read_mask, **options)


def test_coloured_mask_where_ids_are_wanted():
    with pytest.raises(InputError, match=r"m\.png is coloured: set `mask` to colors"):
        Coding("index", ("a", "b")).decode(np.zeros((2, 2, 3), np.uint8), "m.png")
