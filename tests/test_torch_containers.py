"""Files of weights: every container, and what a hostile or broken one may do: nothing.

Most checkpoints here are written byte by byte (`pickled`, `checkpoint`), so that they
can say what PyTorch never would, and need no PyTorch.
"""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from unet_jax.torch_weights import containers
from unet_jax.torch_weights.storages import MAGIC, PROTOCOL
from unet_jax.types import InputError

# ---- a writer of pickles that imports nothing


class Name(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    made: Any
    args: tuple
    opcode: bytes = pickle.REDUCE


class Build(NamedTuple):
    target: Any
    state: Any


class Items(NamedTuple):
    target: Any
    items: dict


class Stored(NamedTuple):
    kind: str
    key: str
    count: int


class Raw(NamedTuple):
    code: bytes


def opcodes(value: Any) -> bytes:
    match value:
        case Raw(code):
            return code
        case Name(module, name):
            return b"c" + f"{module}\n{name}\n".encode()
        case Call(made, args, opcode):
            return opcodes(made) + opcodes(tuple(args)) + opcode
        case Build(target, state):
            return opcodes(target) + opcodes(state) + pickle.BUILD
        case Items(target, items):
            inner = b"".join(opcodes(k) + opcodes(v) for k, v in items.items())
            return opcodes(target) + pickle.MARK + inner + pickle.SETITEMS
        case Stored(kind, key, count):
            name = Name(*kind.rsplit(".", 1))
            return opcodes(("storage", name, key, "cpu", count)) + pickle.BINPERSID
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.LONG + str(value).encode() + b"L\n"
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            data = value.encode()
            return pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        case bytes():
            return pickle.BINBYTES + struct.pack("<I", len(value)) + value
        case dict():
            return opcodes(Items(Raw(pickle.EMPTY_DICT), value))
        case list():
            inner = b"".join(map(opcodes, value))
            return pickle.EMPTY_LIST + pickle.MARK + inner + pickle.APPENDS
        case tuple():
            return pickle.MARK + b"".join(map(opcodes, value)) + pickle.TUPLE
    raise TypeError(value)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + pickle.STOP


def ordered(items: dict) -> Items:
    return Items(Call(Name("collections", "OrderedDict"), ()), items)


def tensor(key, shape, *, strides=None, offset=0, count=None, kind="FloatStorage"):
    shape = tuple(shape)
    count = int(np.prod(shape)) if count is None else count
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    storage = Stored(f"torch.{kind}", key, count)
    return Call(
        Name("torch._utils", "_rebuild_tensor_v2"),
        (storage, offset, shape, strides, False, ordered({})),
    )


def checkpoint(
    path, top, storages=None, *, order="little", compress=(), root="weights"
):
    """Writes a zip as torch.save would: entries stored, one for each storage."""
    entries = {"data.pkl": pickled(top) if not isinstance(top, bytes) else top}
    if order is not None:
        entries["byteorder"] = order.encode()
    for key, array in (storages or {}).items():
        entries[f"data/{key}"] = array if isinstance(array, bytes) else array.tobytes()
    entries["version"] = b"3\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            kind = zipfile.ZIP_DEFLATED if name in compress else zipfile.ZIP_STORED
            archive.writestr(f"{root}/{name}", data, compress_type=kind)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.pth"


ONE = np.arange(6, dtype=np.float32)
NET = {"conv.weight": tensor("0", (2, 3)), "conv.bias": tensor("1", (2,))}
NET_STORAGES = {"0": ONE, "1": np.array([7, 8], np.float32)}


def check_net(contents: containers.Contents) -> None:
    assert list(contents.tensors) == ["conv.weight", "conv.bias"]
    np.testing.assert_array_equal(contents.tensors["conv.weight"], ONE.reshape(2, 3))
    np.testing.assert_array_equal(contents.tensors["conv.bias"], [7, 8])


def refused(path, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        containers.read(path)
    text = str(caught.value)
    assert path.name in text and text.endswith(".") and "\n" not in text


# ---- what can be read


@pytest.mark.parametrize("order", ["little", None])
def test_a_plain_state_dict(path, order):
    contents = containers.read(
        checkpoint(path, ordered(NET), NET_STORAGES, order=order)
    )
    check_net(contents)
    assert contents.dropped == ()
    assert all(a.flags.c_contiguous for a in contents.tensors.values())
    check_net(containers.read(os.fspath(path)))


def test_it_needs_neither_torch_nor_the_modules_named(path):
    """Reading imports nothing that the pickle speaks of."""
    top = {"state_dict": ordered(NET), "x": Name("antigravity", "geohash")}
    checkpoint(path, top, NET_STORAGES)
    code = (
        "import sys; from unet_jax.torch_weights import containers;"
        f" containers.read({os.fspath(path)!r});"
        " sys.exit(int('torch' in sys.modules or 'antigravity' in sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


KINDS = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(path, kind, order):
    values = np.array([0, 1, 2, 3, 1, 5]).astype(KINDS[kind])
    plain = values.view(f"u{values.itemsize}")
    stored = plain if order == "little" else plain.astype(plain.dtype.newbyteorder(">"))
    top = {"a": tensor("0", (2, 3), kind=kind)}
    array = containers.read(checkpoint(path, top, {"0": stored}, order=order)).tensors[
        "a"
    ]
    assert array.dtype == values.dtype
    np.testing.assert_array_equal(array, values.reshape(2, 3))


def test_a_bool_is_zero_or_one(path):
    top = {"a": tensor("0", (3,), kind="BoolStorage")}
    array = containers.read(checkpoint(path, top, {"0": b"\0\2\xff"})).tensors["a"]
    assert array.view(np.uint8).tolist() == [0, 1, 1]


def test_dtypes_without_a_storage_of_their_own(path):
    storage = Stored("torch.storage.UntypedStorage", "0", 4)
    args = storage, 0, (2,), (1,), False, ordered({})
    made = Name("torch._utils", "_rebuild_tensor_v3")
    values = np.array([1, 65535], np.uint16)
    top = {"a": Call(made, (*args, Name("torch", "uint16"), None))}
    array = containers.read(checkpoint(path, top, {"0": values})).tensors["a"]
    assert array.dtype == np.uint16
    np.testing.assert_array_equal(array, values)
    top = {"a": Call(made, (*args, Name("torch", "float8_e5m2"), None))}
    refused(checkpoint(path, top, {"0": values}), "tensor a of .* float8_e5m2")


def test_shapes_and_strides(path):
    """0-d, empty, transposed, sliced, expanded, channels-last."""
    values = np.arange(120, dtype=np.float32)
    last = (2 * 3 * 4, 1, 2 * 4, 2)  # of [5, 2, 3, 4], stored as [5, 3, 4, 2]

    def of(shape, **options):
        return tensor("0", shape, count=120, **options)

    top = {
        "scalar": of((), offset=7),
        "empty": of((0, 3)),
        "none": tensor("1", (0,)),
        "transposed": of((3, 2), strides=(1, 3)),
        "sliced": of((4,), strides=(10,), offset=5),
        "expanded": of((4, 2), strides=(0, 1), offset=118),
        "channels_last": of((5, 2, 3, 4), strides=last),
        "one": of((1, 3), strides=(1 << 70, 1)),
    }
    tensors = containers.read(checkpoint(path, top, {"0": values, "1": b""})).tensors
    expected = {
        "scalar": np.float32(7),
        "empty": np.zeros((0, 3)),
        "none": np.zeros(0),
        "transposed": values[:6].reshape(2, 3).T,
        "sliced": [5, 15, 25, 35],
        "expanded": [[118, 119]] * 4,
        "channels_last": values.reshape(5, 3, 4, 2).transpose(0, 3, 1, 2),
        "one": [[0, 1, 2]],
    }
    for name, value in expected.items():
        assert tensors[name].shape == np.shape(value), name
        assert tensors[name].flags.c_contiguous
        np.testing.assert_array_equal(tensors[name], value)


def test_aliases_share_memory(path):
    top = {
        "a": tensor("0", (2, 3)),
        "b": tensor("0", (2, 3)),
        "c": tensor("0", (3,), offset=3, count=6),
        "d": tensor("0", (3, 2), strides=(1, 3)),
        "e": tensor("0", (3, 2), strides=(1, 3)),
    }
    got = containers.read(checkpoint(path, top, {"0": ONE})).tensors
    for one, other in ("ab", "ac", "de"):
        assert np.shares_memory(got[one], got[other])
    np.testing.assert_array_equal(got["c"], [3, 4, 5])


def test_parameters(path):
    data = NET["conv.weight"]
    parameter = Name("torch._utils", "_rebuild_parameter")
    with_state = Name("torch._utils", "_rebuild_parameter_with_state")
    from_type = Name("torch._tensor", "_rebuild_from_type_v2")
    kind = Name("torch.nn.parameter", "Parameter")
    top = {
        "a": Call(parameter, (data, True, ordered({}))),
        "b": Call(with_state, (data, True, ordered({}), {"note": 1})),
        "c": Call(from_type, (data.made, kind, data.args, {"note": 1})),
    }
    for array in containers.read(checkpoint(path, top, {"0": ONE})).tensors.values():
        np.testing.assert_array_equal(array, ONE.reshape(2, 3))


# ---- where the state dict is


@pytest.mark.parametrize(
    ("top", "dropped"),
    [
        ({"state_dict": NET, "epoch": 3}, ("epoch",)),
        ({"epoch": 3, "network_weights": NET, "x": None}, ("epoch", "x")),
        ({"my own name": NET, "best": 0.5}, ("best",)),
        ({"run": {"model": NET, "step": 1}, "lr": 1.0}, ("lr", "run.step")),
        ({**NET, "mask_values": [0, 1]}, ("mask_values",)),
        ({"net": {**NET, "x": b"x", 5: NET["conv.bias"]}}, ("net.x", "net.5")),
        ({"ema": NET, "model": NET}, ("ema",)),
        ({"mean": NET["conv.bias"], "state_dict": NET}, ("mean",)),
        (Build(ordered(NET), {"_metadata": ordered({})}), ()),
        (Call(Name("collections", "OrderedDict"), ([*map(list, NET.items())],)), ()),
    ],
)  # fmt: skip
def test_where_the_state_dict_is(path, top, dropped):
    contents = containers.read(checkpoint(path, top, NET_STORAGES))
    check_net(contents)
    assert contents.dropped == dropped


def test_an_optimizer_is_no_net(path):
    many = {f"m{i}": NET["conv.bias"] for i in range(9)}
    top = {"optimizer": many, "x": {"Optim_state": many}, "net": NET}
    contents = containers.read(checkpoint(path, top, NET_STORAGES))
    check_net(contents)
    assert contents.dropped == ("optimizer", "x")
    refused(
        checkpoint(path, {"optimizer": many}, NET_STORAGES), "no state dict .*optim"
    )


def test_most_tensors_beat_a_known_name_with_few(path):
    many = {f"m{i}": NET["conv.bias"] for i in range(9)}
    contents = containers.read(
        checkpoint(path, {"weights": {"a": NET["conv.bias"]}, "x": many}, NET_STORAGES)
    )
    assert list(contents.tensors) == list(many) and contents.dropped == ("weights",)


def test_what_training_checkpoints_hold_beside_the_weights(path):
    """NumPy scalars and arrays, paths, namespaces, config and plain classes: inert."""
    encoded = Call(Name("_codecs", "encode"), ("\x00", "latin1"))
    dtype = Build(Call(Name("numpy", "dtype"), ("f8", False, True)), (3, "<", None))
    config = Call(Name("omegaconf.dictconfig", "DictConfig"), (), pickle.NEWOBJ)
    user = Call(Name("my_project.options", "Options"), (), pickle.NEWOBJ)
    arguments = Name("numpy", "ndarray"), (0,), b"b"
    old = Name("some.old", "Thing"), Name("__builtin__", "object"), None
    top = {
        "network_weights": NET,
        "best": Call(Name("numpy.core.multiarray", "scalar"), (dtype, encoded)),
        "best2": Call(Name("numpy._core.multiarray", "scalar"), (dtype, b"\0" * 8)),
        "plans": Call(Name("numpy.core.multiarray", "_reconstruct"), arguments),
        "args": Build(Call(Name("argparse", "Namespace"), (), pickle.NEWOBJ), {"a": 1}),
        "path": Call(Name("pathlib", "PosixPath"), ("/", "data")),
        "device": Call(Name("torch", "device"), ("cuda", 0)),
        "version": Call(Name("torch.torch_version", "TorchVersion"), ("2.4",)),
        "cfg": Build(Items(config, {"a": 1}), {"_content": {}}),
        "hyper_parameters": {"options": Build(user, {"lr": 1}), "norm": Name("a", "B")},
        "old": Call(Name("copy_reg", "_reconstructor"), old),
        "labels": Call(Name("__builtin__", "set"), ([1, 2],)),
        "counts": Items(
            Call(Name("collections", "defaultdict"), (Name("builtins", "int"),)), {1: 2}
        ),
    }
    contents = containers.read(checkpoint(path, top, NET_STORAGES))
    check_net(contents)
    assert contents.dropped == tuple(top)[1:]


def test_names_are_safe_to_print(path):
    top = {"net": NET, "a\n\x1b[31m": 1, "b" * 500: 2, ("c",): 3}
    *_, red, long, odd = containers.read(checkpoint(path, top, NET_STORAGES)).dropped
    assert red == "a??[31m" and len(long) == 120 and odd == "tuple"


# ---- hostile pickles


HARM = "touched"


def attacks():
    """Pickles that make a file named `HARM` where they are loaded, in every way."""
    run = Name("os", "system"), (f"touch {HARM}",)
    evil = f"open({HARM!r}, 'w')"
    stack_global = Raw(opcodes("torch._utils") + opcodes("os.system") + b"\x93")
    tuple_of = opcodes(run[1])
    return {
        "os.system": Call(*run),
        "posix.system": Call(Name("posix", "system"), run[1]),
        "builtins.eval": Call(Name("builtins", "eval"), (evil,)),
        "__builtin__.exec": Call(Name("__builtin__", "exec"), (evil,)),
        "torch._utils.os.system": Call(stack_global, run[1]),
        "subprocess.Popen": Call(
            Name("subprocess", "Popen"), (["touch", HARM],), pickle.NEWOBJ
        ),
        "builtins.getattr": Call(Name("builtins", "getattr"), (Name("os", "x"), "y")),
        "os.popen": Raw(b"(" + opcodes(f"touch {HARM}") + b"ios\npopen\n"),
        "os.spawnlp": Raw(b"(" + opcodes(Name("os", "spawnlp")) + b"o"),
        "os.execv": Raw(
            opcodes(Name("os", "execv")) + tuple_of + opcodes({}) + b"\x92"
        ),
        "torch.storage._load_from_bytes": Call(
            Name("torch.storage", "_load_from_bytes"), (b"x",)
        ),
        "os.putenv": Call(
            Name("torch._tensor", "_rebuild_from_type_v2"),
            (Name("os", "putenv"), None, ("a", "b"), None),
        ),
        "os": Build(Name("", "os"), {"system": 1}),
        "numpy.testing.runstring": Call(Name("numpy.testing", "runstring"), (evil, {})),
        "torch.hub.load": Call(Name("torch.hub", "load"), ("a/b", "c")),
    }


@pytest.mark.parametrize("name", attacks())
@pytest.mark.parametrize("beside", [False, True])
def test_no_call_is_made(path, monkeypatch, name, beside):
    """Refused by name, alone or hidden in an optimizer's state, and nothing ran."""
    monkeypatch.chdir(path.parent)
    attack = attacks()[name]
    top = {"state_dict": NET, "optimizer": [attack]} if beside else attack
    refused(checkpoint(path, top, NET_STORAGES), rf"{name} .*model\.state_dict\(\)")
    assert not (path.parent / HARM).exists()


def test_state_is_thrown_away(path, monkeypatch):
    """BUILD calls no ``__setstate__`` and sets no attribute."""
    monkeypatch.chdir(path.parent)
    state = {"__setstate__": Name("os", "system"), "__dict__": {"x": 1}}
    net = Build(Build(ordered(NET), state), f"touch {HARM}")
    odd = Call(Name("os", "environ"), (), pickle.NEWOBJ)
    top = {"state_dict": net, "x": Build(Items(odd, {"HARM": "1"}), {"a": 1})}
    check_net(containers.read(checkpoint(path, top, NET_STORAGES)))
    assert not (path.parent / HARM).exists() and "HARM" not in os.environ


def test_a_whole_module_is_refused(path):
    made = Build(Call(Name("nets.unet", "UNet"), (), pickle.NEWOBJ), {"training": True})
    says = r"whole pickled object of the class nets\.unet\.UNet.*model\.state_dict\(\)"
    refused(checkpoint(path, made), says)
    refused(checkpoint(path, {"epoch": 1, "model": made}), says)


@pytest.mark.parametrize(
    "code",
    [
        b"",
        b".",
        b"0.",
        b"N",
        b"\x85.",
        b"t.",
        b"}u.",
        b"(}u.",
        b"}(NNNu.",
        b"Na.",
        b"NQ.",
        b"Pname\n.",
        b"h\x07.",
        b"\x82\x01.",
        b"\x97.",
        b"\x8b\xff\xff\xff\x7f.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x96" + b"\xff" * 7 + b"\x7f.",
        b"I1" + b"0" * 5000 + b"\n.",
        b"Sx\n.",
        b"NR.",
        b"cos\nsystem\nNR.",
        b"(lp0\n(((((.",
    ],
)
def test_broken_pickles(path, code):
    refused(checkpoint(path, b"\x80\x02" + code), "damaged|no state dict")


def test_deep_pickles(path):
    """A hundred thousand levels: no recursion, not in reading, hashing or freeing."""
    deep = 100_000
    refused(checkpoint(path, b"]" * deep + b"a" * (deep - 1) + b"."), "no state dict")
    key = Raw(b")" + b"\x85" * deep)
    contents = containers.read(checkpoint(path, {**NET, key: 1}, NET_STORAGES))
    check_net(contents)
    assert contents.dropped == ("tuple",)


def test_a_memo_allocates_nothing(path):
    top = {**NET, "x": Raw(b"Nr\xff\xff\xff\xff")}
    check_net(containers.read(checkpoint(path, top, NET_STORAGES)))


# ---- tensors that lie


@pytest.mark.parametrize(
    "options",
    [
        {"shape": (3, 3)},
        {"shape": (2,), "offset": 5},
        {"shape": (2,), "offset": -1},
        {"shape": (2,), "strides": (-1,), "offset": 5},
        {"shape": (2,), "strides": (6,)},
        {"shape": (-2, -3)},
        {"shape": (2, 3), "strides": (1,)},
        {"shape": (1 << 70,)},
        {"shape": (True,)},
        {"shape": (2.0,), "strides": (1,)},
        {"shape": (1,) * 33},
        {"shape": (2,), "strides": (1 << 62,)},
        {"shape": (), "offset": 6},
    ],
)
def test_a_tensor_outside_its_storage(path, options):
    top = {"a.weight": tensor("0", count=6, **options)}
    refused(
        checkpoint(path, top, {"0": ONE}), r"tensor a\.weight .* inside its storage"
    )


def test_a_tensor_larger_than_the_file(path):
    """Expanded to a terabyte out of one number, at once or piece by piece."""
    top = {"a": tensor("0", (1 << 19, 1 << 19), strides=(0, 0), count=6)}
    refused(checkpoint(path, top, {"0": ONE}), "tensor a .* needs .* bytes")
    top = {"a": tensor("0", (0, 1 << 62), count=6)}
    refused(checkpoint(path, top, {"0": ONE}), "tensor a .* needs .* bytes")
    part = {"count": 6, "strides": (0,)}
    top = {f"a{i}": tensor("0", (10_000_000 + i,), **part) for i in range(3)}
    refused(checkpoint(path, top, {"0": ONE}), "tensor a1 .* needs .* bytes")


def test_storages(path):
    huge = {"a": tensor("0", (1,), count=1 << 60)}
    refused(checkpoint(path, huge, {"0": ONE}), "data/0 has 24 bytes")
    refused(checkpoint(path, NET, {"0": ONE}), "entry weights/data/1 is missing")
    refused(
        checkpoint(path, {"a": tensor("../x", (6,))}, {"0": ONE}), r"\.\./x is miss"
    )
    two = {"a": tensor("0", (6,)), "b": tensor("0", (3,), kind="DoubleStorage")}
    refused(checkpoint(path, two, {"0": ONE}), "damaged")
    negative = {"a": tensor("0", (1,), count=-6)}
    refused(checkpoint(path, negative, {"0": ONE}), "damaged")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("ComplexFloatStorage", "complex64"),
        ("QInt8Storage", "qint8"),
        ("NoSuchStorage", "NoSuchStorage"),
    ],
)
def test_dtypes_that_numpy_lacks(path, kind, says):
    top = {"a": tensor("0", (3,), kind=kind)}
    refused(checkpoint(path, top, {"0": ONE}), f"tensor a of .* is of dtype {says}")
    beside = {"state_dict": NET, "fft": [tensor("9", (3,), kind=kind)]}
    check_net(containers.read(checkpoint(path, beside, NET_STORAGES)))


def test_tensors_that_numpy_lacks(path):
    made = Name("torch._utils", "_rebuild_qtensor")
    top = {"a": Call(made, (Stored("torch.QInt8Storage", "0", 6),))}
    refused(checkpoint(path, top), "tensor a of .* is a quantized tensor")


# ---- files that are none


def test_a_compressed_entry(path):
    """A bomb: a thousandth of what it unpacks to."""
    top = {"a": tensor("0", (1 << 20,))}
    bomb = {"0": b"\0" * (1 << 22)}
    checkpoint(path, top, bomb, compress=["data/0"])
    refused(path, "compressed entry weights/data/0")
    checkpoint(path, top, bomb, compress=["data.pkl"])
    refused(path, "compressed entry weights/data.pkl")


def test_entries_that_overlap(path):
    """Two storages whose entries are the same bytes of the file."""
    count = 4096
    top = {f"a{i}": tensor(str(i), (count,)) for i in range(4)}
    whole = io.BytesIO()
    checkpoint(whole, top, {str(i): b"\0" * 4 * count for i in range(4)})
    data = whole.getvalue()
    archive = zipfile.ZipFile(whole)
    first = archive.getinfo("weights/data/0")
    directory = bytearray(data[archive.start_dir :])
    for i in range(1, 4):
        at = directory.index(f"weights/data/{i}".encode())
        directory[at - 4 : at] = struct.pack("<I", first.header_offset)
        directory[at : at + 14] = b"weights/data/0"
    path.write_bytes(data[: archive.start_dir] + bytes(directory))
    refused(path, "damaged")


def test_a_size_that_lies(path):
    """The list of entries says more than the file has."""
    checkpoint(path, {"a": tensor("0", (6,), count=1 << 26)}, {"0": ONE})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"weights/data/0")
    data[at - 26 : at - 18] = struct.pack("<II", 1 << 28, 1 << 28)
    path.write_bytes(data)
    refused(path, "data/0 has an impossible size")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"x", "no file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\x89HDF\r\n\x1a\n", "no file of weights"),
        (b"PK\x03\x04", "damaged"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save has not written"),
        (pickle.dumps(print), "would have to call|has not written"),
        (b"\x80\x02", "damaged"),
        (struct.pack("<Q", 1 << 40) + b"{}", "damaged"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
    ],
)
def test_no_weights(path, content, says):
    path.write_bytes(content)
    refused(path, says)


def test_no_file(tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "no.pth", "does not exist: check the path")


def test_other_zip_files(path):
    np.savez(path.with_suffix(".npz"), a=ONE)
    refused(path.with_suffix(".npz"), "zip file that torch.save has not written")
    checkpoint(path, ordered(NET), NET_STORAGES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("weights/constants.pkl", b"")
    refused(path, "TorchScript")
    checkpoint(path, ordered(NET), NET_STORAGES, order="middle")
    refused(path, "byte order")


def read_or_refuse(path) -> bool:
    """Nothing but a sentence may come out; whether the file was read."""
    try:
        containers.read(path)
    except InputError as error:
        assert "\n" not in str(error)
        return False
    return True


def legacy(top: Any, storages: dict[str, np.ndarray]) -> bytes:
    """What torch.save wrote before 1.6."""
    parts = [MAGIC, PROTOCOL, {"little_endian": True}]
    data = b"".join(map(pickled, [*parts, top, list(storages)]))
    for array in storages.values():
        data += struct.pack("<q", array.size) + array.tobytes()
    return data


def safetensors_bytes() -> bytes:
    from safetensors.numpy import save

    return save({"conv.weight": ONE.reshape(2, 3), "conv.bias": ONE[:2]})


def all_kinds(path) -> dict[str, bytes]:
    checkpoint(path, {"state_dict": ordered(NET), "x": [1.5, (None,)]}, NET_STORAGES)
    return {
        "zip": path.read_bytes(),
        "legacy": legacy({"state_dict": ordered(NET), "epoch": 1}, NET_STORAGES),
        "safetensors": safetensors_bytes(),
    }


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_short(path, kind):
    data = all_kinds(path)[kind]
    path.write_bytes(data)
    assert read_or_refuse(path)
    for length in range(0, len(data), max(1, len(data) // 150)):
        path.write_bytes(data[:length])
        assert not read_or_refuse(path)
    path.write_bytes(data[:-1])
    assert not read_or_refuse(path)


@pytest.mark.parametrize("kind", ["zip", "pickle", "legacy", "safetensors"])
def test_flipped_bytes(path, kind):
    """A few bytes of nonsense: read or refused, never another exception."""
    random_ = random.Random(kind)
    top = {"state_dict": ordered(NET), "x": [1.5, (None,), {"a": b"b"}]}
    data = pickled(top) if kind == "pickle" else all_kinds(path)[kind]
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(random_.choice([1, 1, 2, 5])):
            broken[random_.randrange(len(broken))] = random_.randrange(256)
        if kind == "pickle":  # with a checksum that holds
            checkpoint(path, bytes(broken), NET_STORAGES)
        else:
            path.write_bytes(broken)
        read_or_refuse(path)


# ---- legacy files


def test_legacy(path):
    path.write_bytes(legacy({"model": ordered(NET), "epoch": 1}, NET_STORAGES))
    contents = containers.read(path)
    check_net(contents)
    assert contents.dropped == ("epoch",)


def test_legacy_files_that_lie(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    path.write_bytes(legacy(attacks()["os.system"], {}))
    refused(path, r"would have to call os\.system")
    path.write_bytes(legacy(NET, {"0": ONE}))
    refused(path, "storage 1 is missing")
    path.write_bytes(legacy(NET, {"0": ONE[:3], "1": ONE[:2]}))
    refused(path, "storage 0 is not whole")
    path.write_bytes(legacy(NET, {**NET_STORAGES, "2": ONE}))
    refused(path, "a storage that no tensor has")
    huge = {"a": tensor("0", (1,), count=1 << 60)}
    path.write_bytes(
        legacy(huge, {})[:-3] + opcodes(["0"]) + b"." + b"\0" * 7 + b"\x10"
    )
    refused(path, "storage 0 is not whole")
    module = Name("nets", "UNet")
    stored = Raw(opcodes(("module", module, "unet.py", "class UNet")) + b"Q")
    path.write_bytes(legacy(Call(stored, (), pickle.NEWOBJ), {}))
    refused(path, r"whole pickled object of the class nets\.UNet")
    assert not (path.parent / HARM).exists()


# ---- safetensors


def test_safetensors(path):
    from safetensors.numpy import save_file

    arrays = {
        "a": np.array(1.5, np.float64),
        "b": ONE.reshape(2, 3),
        "c": ONE.astype(np.float16),
        "d": ONE.astype(ml_dtypes.bfloat16),
        "e": np.array([True, False]),
        "f": np.zeros((0, 3), np.int32),
        "g": np.array([1, 2], np.uint16),
    }
    save_file(arrays, path, metadata={"format": "pt"})
    contents = containers.read(path)
    assert contents.dropped == ()
    assert set(contents.tensors) == set(arrays)
    for name, array in arrays.items():
        assert contents.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(contents.tensors[name], array)


@pytest.mark.parametrize("begin", [b"\x80", b"P", b"<"])
def test_safetensors_that_begin_like_another_file(path, begin):
    """The file begins with the header's length, which may be any byte."""
    data = safetensors_bytes()
    size = int.from_bytes(data[:8], "little")
    grown = size + (begin[0] - size) % 256
    header = data[8 : 8 + size].ljust(grown)
    path.write_bytes(struct.pack("<Q", grown) + header + data[8 + size :])
    assert path.read_bytes().startswith(begin)
    assert set(containers.read(path).tensors) == {"conv.weight", "conv.bias"}


def test_safetensors_of_another_dtype(path):
    from safetensors.numpy import save_file

    save_file({"a.b": np.array([1j], np.complex64)}, path)
    refused(path, r"tensor a\.b of .* is of dtype C64")


# ---- prefixes


def stages(*keys):
    return list(containers.unwrapped(dict.fromkeys(keys, ONE)))


def test_prefixes_come_off_one_by_one():
    got = stages("module._orig_mod.model.a.weight", "module._orig_mod.model.b.weight")
    assert [prefix for prefix, *_ in got] == [
        "", "module.", "module._orig_mod.", "module._orig_mod.model.",
    ]  # fmt: skip
    assert [list(tensors) for _, tensors, _ in got][-1] == ["a.weight", "b.weight"]
    assert list(got[0][1]) == [f"{got[-1][0]}{name}" for name in got[-1][1]]
    assert all(outside == () for *_, outside in got)


def test_what_is_outside_a_wrapper_is_named():
    got = stages("net.model.0.w", "net.model.1.w", "criterion.weight", "net.steps")
    assert [(prefix, list(t), out) for prefix, t, out in got[1:]] == [
        ("net.", ["model.0.w", "model.1.w", "steps"], ("criterion.weight",)),
        ("net.model.", ["0.w", "1.w"], ("criterion.weight", "net.steps")),
    ]


def test_a_nets_own_parts_stay():
    """A part most keys share is a wrapper's only where it has a wrapper's name."""
    got = stages("encoder.a.weight", "encoder.b.weight", "encoder.c.weight", "head.w")
    assert len(got) == 1
    assert [p for p, *_ in stages("odd.a.w", "odd.b.w")] == ["", "odd."]
    assert len(stages("model.a", "b", "c")) == 1
    assert [p for p, *_ in stages("weight")] == [""]
    assert [p for p, *_ in stages("module.", "module.")] == [""]
    assert stages() == [("", {}, ())]
    assert len(stages(".".join("a" * 100_000))) == 9


# ---- files of PyTorch's own


def shared_containers() -> Path:
    here = Path(__file__).resolve().parents[1]
    place = os.environ.get("UNET_JAX_DATA", here.parent / "shared" / "data")
    place = Path(place).parent / "golden" / "containers"
    if not place.is_dir():
        pytest.skip(f"{place} is not there (set UNET_JAX_DATA)")
    return place


FIXTURES = {
    "bf16.safetensors": ("", ()),
    "bfloat16.pth": ("", ()),
    "channels_last_strides.pth": ("", ()),
    "compiled_orig_mod_prefix.pth": ("_orig_mod.", ()),
    "dataparallel_module_prefix.pth": ("module.", ()),
    "ddp_compiled_module_orig_mod.pth": ("module._orig_mod.", ()),
    "half_precision.pth": ("", ()),
    "legacy_nonzip.pth": ("", ()),
    "lightning_model_prefix.ckpt": (
        "model.",
        (
            "epoch", "global_step", "pytorch-lightning_version", "optimizer_states",
            "lr_schedulers", "hyper_parameters",
        ),
    ),
    "lightning_net_prefix.ckpt": ("net.", ()),
    "milesial_v4_mask_values.pth": ("", ("mask_values",)),
    "model_key.pt": ("", ()),
    "model_state_dict.pytorch": (
        "",
        ("num_epochs", "num_iterations", "best_eval_score", "optimizer_state_dict"),
    ),
    "nested_state_dict.pth.tar": ("", ("epoch", "optimizer", "best")),
    "nnunetv2_network_weights.pth": (
        "",
        (
            "optimizer_state", "grad_scaler_state", "logging", "_best_ema",
            "current_epoch", "init_args", "trainer_name",
            "inference_allowed_mirroring_axes",
        ),
    ),
    "no_num_batches_tracked.pth": ("", ()),
    "parameters_wrapped.pth": ("", ()),
    "plain_state_dict.pth": ("", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_one_net_in_every_container(name):
    folder = shared_containers()
    prefix, dropped = FIXTURES[name]
    plain = containers.read(folder / "plain.safetensors").tensors
    contents = containers.read(folder / name)
    assert contents.dropped == dropped
    *_, (last, tensors, outside) = containers.unwrapped(contents.tensors)
    assert (last, outside) == (prefix, ())
    counters = [k for k in plain if k.endswith("num_batches_tracked")]
    assert set(plain) - set(tensors) == (set(counters) if "no_num" in name else set())
    halves = {"bf": ml_dtypes.bfloat16, "half": np.float16}
    dtype = next((d for start, d in halves.items() if name.startswith(start)), None)
    for key, array in tensors.items():
        expected = plain[key]
        if dtype is not None and expected.dtype == np.float32:
            expected = expected.astype(dtype)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_the_whole_module_is_refused():
    path = shared_containers() / "WHOLE_MODULE_pickle_UNSAFE.pth"
    refused(
        path, r"class .*\.UNet, which .*: save model\.state_dict\(\) with torch\.save"
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves(path, zipped, protocol):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8))
    state = net.to(memory_format=torch.channels_last).state_dict()
    base = torch.randn(4, 6)
    state |= {
        f"of.{np.dtype(kind).name}": (base * 3).to(getattr(torch, np.dtype(kind).name))
        for kind in KINDS.values()
    }
    state |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "part": base[1:3, 2:],
        "turned": base.T,
        "tied": base,
        "tied.too": base,
        "stretched": base[:1].expand(5, 6),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    adam = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 4, 8, 8)).sum().backward()
    adam.step()
    top = {
        "epoch": np.int64(3),
        "loss": np.float64(0.5),
        "curve": np.arange(3.0),
        "where": Path("a/b"),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "rng": torch.get_rng_state(),
        "wave": torch.zeros(2, dtype=torch.complex64),
        "version": torch.torch_version.TorchVersion("2.0"),
        "optimizer": adam.state_dict(),
        "state_dict": state,
    }
    torch.save(
        top, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
    )
    contents = containers.read(path)
    assert list(contents.tensors) == list(state)
    assert contents.dropped == tuple(k for k in top if k != "state_dict")
    for key, value in state.items():
        array = contents.tensors[key]
        if value.dtype == torch.bfloat16:
            assert array.dtype == ml_dtypes.bfloat16
            array, value = array.astype(np.float32), value.float()
        expected = value.detach().numpy()
        assert array.dtype == expected.dtype and array.flags.c_contiguous
        np.testing.assert_array_equal(array, expected, strict=True)
    flat = contents.tensors["tied"], contents.tensors["parameter"]
    assert not np.shares_memory(*flat)
    assert np.shares_memory(contents.tensors["tied.too"], flat[0])
    assert torch.from_numpy(contents.tensors["tied"]).equal(base)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_and_is_refused(path, zipped):
    torch = pytest.importorskip("torch")

    def save(top):
        torch.save(top, path, _use_new_zipfile_serialization=zipped)

    save({"a.b": torch.zeros(2, dtype=torch.complex64)})
    refused(path, r"tensor a\.b of .* is of dtype complex64")
    save({"a": torch.zeros(2, 2).to_sparse()})
    refused(path, "tensor a of .* is a sparse tensor")
    save(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    refused(path, r"class torch\.nn\.modules\.container\.Sequential, .*state_dict\(\)")
    save(torch.zeros(2))
    refused(path, "a single tensor")
    save({})
    refused(path, "no state dict")


def test_torchscript_is_refused(path):
    torch = pytest.importorskip("torch")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), path)
    refused(path, "TorchScript")
