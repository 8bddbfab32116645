"""What PyTorch users keep weights in: read with NumPy alone, and no code of a file run.

    safetensors          by the package of that name
    torch.save, zip      since PyTorch 1.6: a pickle and one entry for each storage
    torch.save, legacy   before it, or on demand: pickles, then the storages in a row

A pickle is a program, and the one of a checkpoint from the internet is somebody else's.
`_Machine` runs its opcodes on plain data: a global is a name that is never imported, a
call of a name on the list below is answered here, and a call of any other is refused.
"""

import contextlib
import io
import math
import mmap
import os
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from unet_jax.types import InputError, NumpyArray

_REMEDY = (
    "save model.state_dict() with torch.save where the net was trained, and convert"
    " that file"
)
# Copies (of tensors whose strides are not those of a plain array) may take as much
# memory as the file has bytes, and this much, which leaves room for small masks that
# were stored expanded.
_SPARE_BYTES = 1 << 26

_DTYPES: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(bool),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{f"float{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    **{f"int{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
}

# The class of a storage -> (dtype, bytes an element). Those which _DTYPES lacks are
# here because a file of which they are a part can be read all the same.
_STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "UntypedStorage": ("uint8", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "QInt32Storage": ("qint32", 4),
}

_SAFETENSORS = {"BOOL", "BF16", "F16", "F32", "F64"}
_SAFETENSORS |= {f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)}

# Calls whose answer is one tensor of another kind than NumPy has.
_ODD_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a class of its own",
}

# Calls that training checkpoints are known to hold beside the weights. Their answer is
# an `_Object` that has a name and nothing else, whatever their arguments.
_BUILTINS = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int",
    "list", "long", "object", "range", "set", "slice", "str", "tuple", "unicode",
)  # fmt: skip
_PATHS = (
    "Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath",
)  # fmt: skip
_NUMPY = ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
_INERT = {
    f"{module}.{name}"
    for module, names in {
        "__builtin__": _BUILTINS,
        "_codecs": ("encode",),
        "builtins": _BUILTINS,
        "collections": ("Counter", "deque"),
        "copy_reg": ("_reconstructor",),
        "copyreg": ("_reconstructor",),
        "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
        "decimal": ("Decimal",),
        "functools": ("partial",),
        "numpy": ("dtype", "ndarray"),
        "numpy._core": _NUMPY,
        "numpy.core": _NUMPY,
        "numpy.random.bit_generator": ("__pyx_unpickle_SeedSequence",),
        "numpy.random._pickle": (
            "__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor",
        ),
        "pathlib": _PATHS,
        "pathlib._local": _PATHS,
        "torch": ("Size", "device"),
        "torch.serialization": ("_get_layout",),
        "torch.torch_version": ("TorchVersion",),
        "uuid": ("UUID",),
    }.items()
    for name in names
}  # fmt: skip

# Names of the state dict in a training checkpoint, the likeliest first.
_KNOWN = [
    "state_dict", "model_state_dict", "model_state", "network_weights", "model", "net",
    "network", "unet", "generator", "module", "weights", "params", "student", "teacher",
    "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema",
]  # fmt: skip

# First parts of keys that a wrapper around the net has put there.
_WRAPPERS = {
    "module", "_orig_mod", "_forward_module", "model", "_model", "net", "network",
    "unet", "generator", "netG", "net_G", "encoder_decoder", "segmentor", "seg_model",
    "segmentation_model", "backbone", "student", "student_model", "ema_model",
}  # fmt: skip
# More of them than any stack of wrappers has: a made-up key could have a million parts.
_MOST_PREFIXES = 8

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class Contents(NamedTuple):
    """What is in a file of weights.

    ``tensors``: the state dict in the order of the file, keys as stored. Tensors that
        share memory in PyTorch share it here.
    ``dropped``: dotted names of what else there is, such as ``optimizer`` or
        ``mask_values``.
    """

    tensors: dict[str, NumpyArray]
    dropped: tuple[str, ...]


def read(path: str | os.PathLike[str]) -> Contents:
    """The state dict of a file, from whichever container it is in.

    Of a training checkpoint it is the mapping, at most two levels down, that holds
    tensors under a name that is known for it (``state_dict``, ``model``, ...), else
    the one with most tensors; never that of an optimizer.

    Args:
        path: A safetensors file, or what ``torch.save`` has written.

    Returns:
        The tensors and the names of the rest.

    Raises:
        InputError: No such file or none of weights, a damaged one, one that would have
            to run code to be loaded (a whole pickled module), or a tensor that NumPy
            has no dtype for.
    """
    name = os.fsdecode(path)
    if os.path.isdir(name):
        raise InputError(f"{name} is a folder: give the file of weights in it.")
    try:
        with open(name, "rb") as file:
            begin = file.read(512)
            return _read(_File(name, file, os.fstat(file.fileno()).st_size), begin)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist: check the path.") from None
    except OSError as error:
        raise InputError(
            f"{name} cannot be read ({error.strerror or error}): check the file and"
            " your rights to it."
        ) from error


def unwrapped(
    tensors: Mapping[str, NumpyArray],
) -> Iterator[tuple[str, dict[str, NumpyArray], tuple[str, ...]]]:
    """A state dict under the names that its net may know it by.

    Wrappers put a name before every key: ``module.`` (DataParallel), ``_orig_mod.``
    (torch.compile), ``model.`` (Lightning), and one another's. Some nets' own keys
    begin with such a name, so every stage is given and the caller knows its own. A
    first part is taken off where all keys have it, or where it is a known wrapper's
    and more than half of them do.

    Args:
        tensors: By name, as `read` gives them.

    Yields:
        ``(prefix, tensors, outside)``: what was taken off, the tensors without it, and
        the stored names of those that did not have it. First as stored.
    """
    prefix, now, outside = "", dict(tensors), ()
    yield prefix, now, outside
    for _ in range(_MOST_PREFIXES):
        first = _wrapper(now)
        if first is None:
            return
        rest = tuple(prefix + k for k in now if not k.startswith(first))
        now = {k.removeprefix(first): v for k, v in now.items() if k.startswith(first)}
        prefix, outside = prefix + first, outside + rest
        yield prefix, now, outside


def _wrapper(keys: Mapping[str, Any]) -> str | None:
    """The first part that can be taken off, with its dot."""
    counts: dict[str, int] = {}
    for key in keys:
        first, dot, rest = key.partition(".")
        if dot and rest:
            counts[first] = counts.get(first, 0) + 1
    for first, count in counts.items():
        if count == len(keys) or (first in _WRAPPERS and 2 * count > len(keys)):
            return f"{first}."
    return None


# ---- which container


@dataclass(frozen=True)
class _File:
    """An open file, its path for the sentences and its size for the checks."""

    path: str
    stream: BinaryIO
    size: int

    def damaged(self, how: str) -> InputError:
        return InputError(
            f"{self.path} is cut short or damaged ({how}): download or save it again."
        )

    @contextlib.contextmanager
    def parsing(self, what: str) -> Iterator[None]:
        """Whatever the standard library's parsers raise on bad bytes, as a sentence."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            # They were not written for hostile bytes: struct.error, IndexError,
            # UnicodeError, NotImplementedError ... come out of them, and mean the file.
            raise self.damaged(what) from error


def _read(file: _File, begin: bytes) -> Contents:
    path = file.path
    if not file.size:
        raise InputError(f"{path} is empty: download or save it again.")
    if begin.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is the pointer of Git LFS to a file of weights, not the weights:"
            " run `git lfs pull`, or download it itself."
        )
    if begin.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise InputError(
            f"{path} is a web page, not weights: download the file that it shows."
        )
    # Asked first: the number before the brace may begin like any of the others.
    if begin[8:9] == b"{":
        return _safetensors(file)
    if begin.startswith(b"PK\x03\x04"):
        top, tensor = _zip(file)
    elif begin.startswith(b"\x80"):
        top, tensor = _legacy(file)
    elif path.endswith(".safetensors"):
        raise file.damaged("no safetensors file begins so")
    else:
        raise InputError(
            f"{path} is no file of weights that is known here: give a safetensors file"
            " or what torch.save(model.state_dict(), ...) has written."
        )
    where, state = _find(path, top)
    tensors = {
        key: tensor(key, value)
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, _Tensor | _Odd)
    }
    return Contents(tensors, tuple(_dropped(top, where)))


def _safetensors(file: _File) -> Contents:
    import safetensors

    tensors = {}
    try:
        with safetensors.safe_open(file.path, framework="numpy") as stored:
            for key in stored.offset_keys():
                dtype = stored.get_slice(key).get_dtype()
                if dtype not in _SAFETENSORS:
                    raise _no_dtype(file.path, key, f"of dtype {dtype}")
                tensors[key] = stored.get_tensor(key)
    except safetensors.SafetensorError as error:
        raise file.damaged("no safetensors file can be read from it") from error
    if not tensors:
        raise InputError(f"{file.path} holds no tensors: save a net's weights in it.")
    return Contents(tensors, ())


# ---- the two containers of torch.save


def _zip(file: _File) -> tuple[Any, "_Tensors"]:
    """The object of a zip checkpoint, and what reads its tensors."""
    with file.parsing("its list of entries is not whole"):
        archive = zipfile.ZipFile(file.stream)
        entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickles) != 1:
        raise InputError(
            f"{file.path} is a zip file that torch.save has not written: give the file"
            " of weights, unpacked if it is in there."
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise InputError(
            f"{file.path} is a TorchScript program, not weights: save the"
            " state_dict() of torch.jit.load(...) with torch.save, and convert that."
        )

    def entry(name: str, size: int | None = None) -> bytes:
        if name not in entries:
            raise file.damaged(f"the entry {_shown(name)} is missing")
        info = entries[name]
        # Stored as it is, an entry cannot be larger than the file: nothing is
        # allocated on its word.
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{file.path} holds the compressed entry {_shown(name)}, which"
                " torch.save never writes: save the weights again with torch.save."
            )
        if info.file_size != info.compress_size or info.file_size > file.size:
            raise file.damaged(f"the entry {_shown(name)} has an impossible size")
        if size is not None and info.file_size != size:
            raise file.damaged(
                f"the entry {_shown(name)} has {info.file_size} bytes and its tensor"
                f" needs {size}"
            )
        with file.parsing(f"the entry {_shown(name)} does not match its checksum"):
            return archive.read(info)

    order = "little"
    if f"{root}byteorder" in entries:
        order = entry(f"{root}byteorder").decode("ascii", "replace")
    if order not in ("little", "big"):
        raise file.damaged("its byte order is neither little nor big")

    def fetch(storage: _Storage) -> bytes:
        return entry(f"{root}data/{storage.key}", storage.size)

    top = _Machine(file, io.BytesIO(entry(pickles[0]))).run()
    return top, _Tensors(file, fetch, ">" if order == "big" else "<")


def _legacy(file: _File) -> tuple[Any, "_Tensors"]:
    """The object of a checkpoint of before PyTorch 1.6, and what reads its tensors.

    PyTorch itself is not asked: its ``weights_only`` did not hold for files of this
    kind before 2.6 (CVE-2025-32434).
    """
    with file.parsing("it cannot be mapped"):
        # Unlike a file, a map does not allocate what a length that lies asks for.
        data = mmap.mmap(file.stream.fileno(), 0, access=mmap.ACCESS_READ)
    if _Machine(file, data).run() != _MAGIC:
        raise InputError(
            f"{file.path} is a pickle that torch.save has not written: {_REMEDY}."
        )
    if _Machine(file, data).run() != _PROTOCOL:
        raise file.damaged("its version is unknown")
    _Machine(file, data).run()  # the types' sizes on the machine that wrote it
    machine = _Machine(file, data)
    top = machine.run()
    keys = _Machine(file, data).run()
    if not isinstance(keys, list):
        raise file.damaged("its list of storages is missing")
    begins: dict[str, int] = {}
    for key in keys:
        storage = machine.storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise file.damaged("it lists a storage that no tensor has")
        # The number of elements in 8 bytes, then the elements; always little-endian.
        begin = data.tell() + 8
        count = int.from_bytes(data.read(8), "little", signed=True)
        if count != storage.count or begin + storage.size > file.size:
            raise file.damaged(f"the storage {_shown(key)} is not whole")
        begins[key] = begin
        data.seek(begin + storage.size)

    def fetch(storage: _Storage) -> bytes:
        if storage.key not in begins:
            raise file.damaged(f"the storage {_shown(storage.key)} is missing")
        begin = begins[storage.key]
        return data[begin : begin + storage.size]

    return top, _Tensors(file, fetch, "<")


@dataclass(frozen=True)
class _Storage:
    """A run of ``count`` elements of ``itemsize`` bytes in the file."""

    key: str
    dtype: str
    itemsize: int
    count: int

    @property
    def size(self) -> int:
        return self.count * self.itemsize


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage as the pickle describes it, unchecked; counts elements."""

    storage: _Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True)
class _Odd:
    """A tensor that NumPy cannot hold, and why."""

    what: str


class _Tensors:
    """Reads tensors, each storage once and nothing on the pickle's word.

    Args:
        file: Where they are.
        fetch: The bytes of a storage, as many as it says.
        order: Their byte order, ``<`` or ``>``.
    """

    def __init__(
        self, file: _File, fetch: Callable[[_Storage], bytes], order: str
    ) -> None:
        self._file, self._fetch, self._order = file, fetch, order
        self._storages: dict[tuple[str, str], NumpyArray] = {}
        self._copies: dict[_Tensor, NumpyArray] = {}
        self._spare = file.size + _SPARE_BYTES
        self._unread = file.size

    def __call__(self, key: str, tensor: _Tensor | _Odd) -> NumpyArray:
        """One tensor, C-contiguous.

        Raises:
            InputError: It is of a kind NumPy lacks, or not inside its storage.
        """
        path = self._file.path
        if isinstance(tensor, _Odd):
            raise _no_dtype(path, key, tensor.what)
        if tensor.dtype not in _DTYPES:
            raise _no_dtype(path, key, f"of dtype {_shown(tensor.dtype)}")
        dtype = _DTYPES[tensor.dtype]
        if not _is_inside(tensor, dtype.itemsize):
            raise InputError(
                f"the tensor {_shown(key)} of {path} does not lie inside its storage:"
                " the file is damaged or made up, download or save it again."
            )
        if tensor in self._copies:
            return self._copies[tensor]
        # Also asked of an empty tensor, for which NumPy multiplies the other axes.
        least = math.prod(max(n, 1) for n in tensor.shape) * dtype.itemsize
        self._check_spare(key, least)
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, dtype)
        flat = self._flat(tensor.storage, dtype)
        strides = [
            # The stride of an axis of one says nothing and may be anything.
            s * dtype.itemsize if n > 1 else dtype.itemsize
            for n, s in zip(tensor.shape, tensor.strides, strict=True)
        ]
        # NumPy checks the bounds once more.
        view = np.ndarray(
            tensor.shape, flat.dtype, flat, tensor.offset * dtype.itemsize, strides
        )
        if not view.flags.c_contiguous:
            self._spare -= least
            view = self._copies[tensor] = view.copy(order="C").view(dtype)
        return view.view(dtype)

    def _check_spare(self, key: str, size: int) -> None:
        if size > self._spare:
            raise InputError(
                f"the tensor {_shown(key)} of {self._file.path} says that it needs"
                f" {size} bytes, far more than the file holds: {_REMEDY}."
            )

    def _flat(self, storage: _Storage, dtype: np.dtype[Any]) -> NumpyArray:
        """A storage as unsigned integers of the dtype's size, for any dtype."""
        where = storage.key, dtype.name
        if where not in self._storages:
            data = self._fetch(storage)
            # Entries of a zip file can be made to overlap.
            self._unread -= len(data)
            if self._unread < 0:
                raise self._file.damaged("its storages overlap")
            kind = f"u{dtype.itemsize}"
            flat = np.frombuffer(data, self._order + kind).astype(kind)
            # A bool of another value than 0 and 1 is none for NumPy.
            self._storages[where] = (
                (flat != 0).view("u1") if dtype.kind == "b" else flat
            )
        return self._storages[where]


def _is_inside(tensor: _Tensor, itemsize: int) -> bool:
    """Whether every element of a tensor is an element of its storage."""
    offset, shape, strides = tensor.offset, tensor.shape, tensor.strides
    if not (isinstance(shape, tuple) and isinstance(strides, tuple)):
        return False
    if len(shape) != len(strides) or len(shape) > 32:
        return False
    # Of the type itself: a bool is no size.
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)):
        return False
    if 0 in shape:
        return True
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return (last + 1) * itemsize <= tensor.storage.size


def _no_dtype(path: str, key: str, what: str) -> InputError:
    return InputError(
        f"the tensor {_shown(key)} of {path} is {what}, which a net here cannot hold:"
        " convert the net to float32 in PyTorch and save its state_dict() again."
    )


# ---- the pickle


@dataclass(frozen=True)
class _Global:
    """A name in a pickle, ``module.name``; never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class _Object:
    """What stands for an object that no code was run to make: its class's name."""

    name: str


class _Machine:
    """Runs a pickle on None, numbers, text, bytes, tuples, lists, dicts and stand-ins.

    A call is answered by `_call` for the names listed, and refused for others. An
    object of an unknown class that is made without arguments (as pickle does for plain
    classes) is a stand-in too; its state is thrown away.

    Args:
        file: For the sentences.
        stream: Where the pickle begins; left where it ends.

    Attributes:
        storages: By key, those that the pickle speaks of.
    """

    def __init__(self, file: _File, stream: Any) -> None:
        self.storages: dict[str, _Storage] = {}
        self._file, self._pickle = file, stream
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object of the pickle.

        Raises:
            InputError: It is no whole pickle, or one that calls what is not listed.
        """
        with self._file.parsing("its pickle is not whole"):
            # A walk with a stack of its own: however deep the object, no recursion.
            for opcode, argument, _ in pickletools.genops(self._pickle):
                if opcode.name in _PUSHED:
                    self._stack.append(argument)
                elif opcode.name in _CONSTANTS:
                    self._stack.append(_CONSTANTS[opcode.name]())
                elif opcode.name == "STOP":
                    return self._stack.pop()
                else:
                    self._step(opcode.name, argument)
        raise self._file.damaged("its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(stack)
                self._stack = []
            case "POP":
                # On nothing, it takes the mark off.
                self._stack.pop() if stack else self._popped()
            case "POP_MARK":
                self._popped()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                self._push(tuple(self._args(count)))
            case "TUPLE":
                self._push(tuple(self._popped()))
            case "LIST":
                self._push(self._popped())
            case "FROZENSET":
                self._popped()
                self._push(_Object("frozenset"))
            case "DICT":
                items = self._popped()
                self._push({})
                self._set_items(items)
            case "APPEND":
                self._extend(self._args(1))
            case "APPENDS" | "ADDITEMS":
                self._extend(self._popped())
            case "SETITEM":
                self._set_items(self._args(2))
            case "SETITEMS":
                self._set_items(self._popped())
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case _:
                self._make(name, argument)

    def _make(self, name: str, argument: Any) -> None:
        """The opcodes with which a pickle runs code."""
        match name:
            case "GLOBAL":
                self._push(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, attribute = self._args(2)
                self._push(_Global(f"{module}.{attribute}"))
            case "REDUCE":
                self._push(self._call(*self._args(2)))
            case "NEWOBJ":
                self._push(self._new(*self._args(2)))
            case "NEWOBJ_EX":
                made, args, keywords = self._args(3)
                self._push(self._new(made, (*args, *keywords)))
            case "OBJ":
                made, *args = self._popped()
                self._push(self._call(made, tuple(args)))
            case "INST":
                made = _Global(argument.replace(" ", "."))
                self._push(self._call(made, tuple(self._popped())))
            case "BUILD":
                target, _ = self._args(2)
                # The state may be a hook's argument or attributes: neither is kept.
                if isinstance(target, _Global):
                    self._refuse(target)
                self._push(target)
            case _:
                raise ValueError(f"torch.save writes no {name}")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _args(self, count: int) -> list[Any]:
        """The last ``count`` values."""
        if len(self._stack) < count:
            raise IndexError("the stack is too short")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _popped(self) -> list[Any]:
        """The values since the last mark."""
        values, self._stack = self._stack, self._marks.pop()
        return values

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, _Object):
            raise TypeError("only a list can be added to")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, _Object):
            return
        if not isinstance(target, dict):
            raise TypeError("only a dict has items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a deep tuple would overflow the interpreter's stack.
            plain = isinstance(key, str | int | float | bytes | None | _Object)
            target[key if plain else _Object(_shown(key))] = value

    def _persistent(self, name: Any) -> Any:
        """``("storage", class, key, device, elements)``; legacy has a view after it."""
        if not isinstance(name, tuple) or len(name) not in (4, 5, 6):
            raise ValueError("a persistent name is a tuple")
        if name[0] == "module" and isinstance(name[1], _Global):
            # How legacy files keep the source of a whole module's classes.
            return name[1]
        tag, made, key, _, count, *view = name
        if (
            tag != "storage"
            or not isinstance(made, _Global)
            or view not in ([], [None])
        ):
            raise ValueError("of persistent names, only storages are known")
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError("a storage has a key and a number of elements")
        kind = made.name.rpartition(".")[2]
        storage = _Storage(key, *_STORAGES.get(kind, (kind, 1)), count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage has one dtype and size")
        return storage

    def _new(self, made: Any, args: Any) -> Any:
        if isinstance(made, _Global) and not args and made.name not in _DICTS:
            return _Object(made.name)
        return self._call(made, args)

    def _call(self, made: Any, args: Any) -> Any:
        if not isinstance(made, _Global) or not isinstance(args, tuple):
            raise TypeError("only a name can be called")
        if made.name == "torch._tensor._rebuild_from_type_v2":
            # A tensor with attributes: (how to make it, its class, with what, they).
            made, _, args, _ = args
            if not isinstance(made, _Global) or made.name not in _REBUILT:
                self._refuse(made)
        if made.name in _REBUILT:
            return _REBUILT[made.name](*args)
        if made.name in _ODD_TENSORS:
            return _Odd(_ODD_TENSORS[made.name])
        if made.name in _DICTS:
            return _dict(*args)
        if made.name not in _INERT:
            self._refuse(made)
        inner = args[0] if args and made.name.endswith("._reconstructor") else made
        return _Object(inner.name if isinstance(inner, _Global) else made.name)

    def _refuse(self, made: Any) -> NoReturn:
        name = made.name if isinstance(made, _Global) else "a value"
        raise InputError(
            f"{self._file.path} would have to call {_shown(name)} to be loaded, which"
            f" no weights need and was not done: {_REMEDY}."
        )


_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT",
    "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: _Object("set"),
}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor has a storage")
    return _Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_of_dtype(  # what has no class of storage: uint16, float8 ...
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Global):
        raise TypeError("a tensor has a storage and a dtype")
    name = dtype.name.removeprefix("torch.")
    return _Tensor(storage, name, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _dict(*args: Any) -> dict[Any, Any]:
    # A defaultdict's factory comes first; Python 2 gave an OrderedDict's items.
    items = args[-1] if args and isinstance(args[-1], list) else []
    if not all(
        isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)
        for item in items
    ):
        raise TypeError("a dict is made of named items")
    return dict(items)


# The calls that make a state dict, and what answers them.
_REBUILT: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_DICTS = {"collections.OrderedDict", "collections.defaultdict"}


# ---- the state dict in the object


def _find(path: str, top: Any) -> tuple[tuple[str, ...], dict[Any, Any]]:
    """The state dict of a checkpoint and the keys that lead to it.

    Raises:
        InputError: There is none; the sentence says what there is.
    """
    found = []
    for where, mapping in _mappings(top, (), set()):
        count = sum(
            isinstance(k, str) and isinstance(v, _Tensor | _Odd)
            for k, v in mapping.items()
        )
        if count and 2 * count >= len(mapping):
            found.append((where, mapping, count))
    if not found:
        raise InputError(f"{path} holds {_instead(top)}: {_REMEDY}.")
    most = max(count for *_, count in found)

    def order(
        candidate: tuple[tuple[str, ...], dict[Any, Any], int],
    ) -> tuple[int, int]:
        where, _, count = candidate
        known = where[-1] in _KNOWN if where else False
        rank = _KNOWN.index(where[-1]) if known else len(_KNOWN)
        return (rank if where else -1), -count

    # A few tensors under a good name (a loss's weights) are not the net.
    where, mapping, _ = min((c for c in found if 2 * c[2] > most), key=order)
    return where, mapping


def _mappings(
    tree: Any, where: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """The mappings at most two levels down that are no optimizer's, each once."""
    if not isinstance(tree, dict) or id(tree) in seen:
        return
    seen.add(id(tree))
    yield where, tree
    if len(where) < 2:
        for key, value in tree.items():
            if isinstance(key, str) and "optim" not in key.lower():
                yield from _mappings(value, (*where, key), seen)


def _dropped(top: dict[Any, Any], where: tuple[str, ...]) -> Iterator[str]:
    """The names of what is beside the state dict, and in it and no tensor."""
    tree = top
    for depth in range(len(where) + 1):
        before = "".join(f"{_shown(key)}." for key in where[:depth])
        inside = depth == len(where)
        for key, value in tree.items():
            kept = isinstance(key, str) and isinstance(value, _Tensor | _Odd)
            if not (kept if inside else key == where[depth]):
                yield before + _shown(key)
        tree = tree if inside else tree[where[depth]]


def _instead(top: Any) -> str:
    """What a file holds instead of a state dict, in words."""
    if isinstance(top, _Object):
        return (
            f"a whole pickled object of the class {_shown(top.name)}, which only that"
            " class's own code could load, and no state dict"
        )
    if isinstance(top, _Tensor | _Odd):
        return "a single tensor and no state dict"
    if not isinstance(top, dict) or not top:
        return "no state dict"
    for key, value in top.items():
        if isinstance(value, _Object) and key in _KNOWN:
            return (
                f"a whole pickled object of the class {_shown(value.name)} as"
                f" {_shown(key)}, which only that class's own code could load, and no"
                " state dict"
            )
    names = [_shown(key) for key in list(top)[:8]]
    return f"no state dict (but {', '.join(names)}{', ...' if len(top) > 8 else ''})"


def _shown(name: Any) -> str:
    """A name from a file, safe to print."""
    if isinstance(name, _Object):
        name = name.name
    if not isinstance(name, str | int | float):
        name = type(name).__name__
    try:
        text = str(name)
    except ValueError:  # an int of thousands of digits
        text = "int"
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return "".join(c if c.isprintable() else "?" for c in text)
