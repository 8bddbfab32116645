"""Tensors out of a file, each checked to lie in it, from three layouts.

    safetensors          by the package of that name
    torch.save, zip      since PyTorch 1.6: a pickle and one entry for each storage
    torch.save, legacy   before it, or on demand: pickles, then the storages in a row

A pickle only says where a tensor lies (`calls.Tensor`). `Tensors` reads it, and takes
neither a size nor an offset on the pickle's word.
"""

import io
import math
import mmap
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from unet_jax.torch_weights.calls import Odd, Storage, Tensor, shown
from unet_jax.torch_weights.files import REMEDY, File
from unet_jax.torch_weights.pickles import Machine
from unet_jax.types import InputError, NumpyArray

# How a legacy file begins, each a pickle of its own.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

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

_SAFETENSORS = {"BOOL", "BF16", "F16", "F32", "F64"}
_SAFETENSORS |= {f"{sign}{bits}" for sign in "IU" for bits in (8, 16, 32, 64)}

# ---- the tensors


class Tensors:
    """Reads tensors, each storage once and nothing on the pickle's word.

    Args:
        file: Where they are.
        fetch: The bytes of a storage, as many as it says.
        order: Their byte order, ``<`` or ``>``.
    """

    def __init__(
        self, file: File, fetch: Callable[[Storage], bytes], order: str
    ) -> None:
        self._file, self._fetch, self._order = file, fetch, order
        self._storages: dict[tuple[str, str], NumpyArray] = {}
        self._copies: dict[Tensor, NumpyArray] = {}
        self._spare = file.size + _SPARE_BYTES
        self._unread = file.size

    def __call__(self, key: str, tensor: Tensor | Odd) -> NumpyArray:
        """One tensor, C-contiguous.

        Raises:
            InputError: It is of a kind NumPy lacks, or not inside its storage.
        """
        path = self._file.path
        if isinstance(tensor, Odd):
            raise _no_dtype(path, key, tensor.what)
        if tensor.dtype not in _DTYPES:
            raise _no_dtype(path, key, f"of dtype {shown(tensor.dtype)}")
        dtype = _DTYPES[tensor.dtype]
        if not _is_inside(tensor, dtype.itemsize):
            raise InputError(
                f"the tensor {shown(key)} of {path} does not lie inside its storage:"
                " the file is damaged or made up, download or save it again."
            )
        if tensor in self._copies:
            return self._copies[tensor]
        # Also asked of an empty tensor, for which NumPy multiplies the other axes.
        least = math.prod(max(n, 1) for n in tensor.shape) * dtype.itemsize
        if least > self._spare:
            raise InputError(
                f"the tensor {shown(key)} of {path} says that it needs {least} bytes,"
                f" far more than the file holds: {REMEDY}."
            )
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

    def _flat(self, storage: Storage, dtype: np.dtype[Any]) -> NumpyArray:
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


def _is_inside(tensor: Tensor, itemsize: int) -> bool:
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
        f"the tensor {shown(key)} of {path} is {what}, which a net here cannot hold:"
        " convert the net to float32 in PyTorch and save its state_dict() again."
    )


# ---- the layouts


def from_safetensors(file: File) -> dict[str, NumpyArray]:
    """The tensors of a safetensors file, in its order.

    Args:
        file: The file, open.

    Raises:
        InputError: A damaged file, one without tensors, or a tensor of a dtype that
            NumPy lacks.
    """
    import safetensors

    tensors: dict[str, NumpyArray] = {}
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
    return tensors


def from_zip(file: File) -> tuple[Any, Tensors]:
    """The object of a zip checkpoint, and what reads its tensors.

    Args:
        file: The file, open.

    Raises:
        InputError: A damaged file, or a zip file of another kind.
    """
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
            raise file.damaged(f"the entry {shown(name)} is missing")
        info = entries[name]
        # Stored as it is, an entry cannot be larger than the file: nothing is
        # allocated on its word.
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(
                f"{file.path} holds the compressed entry {shown(name)}, which"
                " torch.save never writes: save the weights again with torch.save."
            )
        if info.file_size != info.compress_size or info.file_size > file.size:
            raise file.damaged(f"the entry {shown(name)} has an impossible size")
        if size is not None and info.file_size != size:
            raise file.damaged(
                f"the entry {shown(name)} has {info.file_size} bytes and its tensor"
                f" needs {size}"
            )
        with file.parsing(f"the entry {shown(name)} does not match its checksum"):
            return archive.read(info)

    order = "little"
    if f"{root}byteorder" in entries:
        order = entry(f"{root}byteorder").decode("ascii", "replace")
    if order not in ("little", "big"):
        raise file.damaged("its byte order is neither little nor big")

    def fetch(storage: Storage) -> bytes:
        return entry(f"{root}data/{storage.key}", storage.size)

    top = Machine(file, io.BytesIO(entry(pickles[0]))).run()
    return top, Tensors(file, fetch, ">" if order == "big" else "<")


def from_legacy(file: File) -> tuple[Any, Tensors]:
    """The object of a checkpoint of before PyTorch 1.6, and what reads its tensors.

    PyTorch itself is not asked: its ``weights_only`` did not hold for files of this
    kind before 2.6 (CVE-2025-32434).

    Args:
        file: The file, open.

    Raises:
        InputError: A damaged file, or a pickle of another kind.
    """
    with file.parsing("it cannot be mapped"):
        # Unlike a file, a map does not allocate what a length that lies asks for.
        data = mmap.mmap(file.stream.fileno(), 0, access=mmap.ACCESS_READ)
    if Machine(file, data).run() != MAGIC:
        raise InputError(
            f"{file.path} is a pickle that torch.save has not written: {REMEDY}."
        )
    if Machine(file, data).run() != PROTOCOL:
        raise file.damaged("its version is unknown")
    Machine(file, data).run()  # the types' sizes on the machine that wrote it
    machine = Machine(file, data)
    top = machine.run()
    keys = Machine(file, data).run()
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
            raise file.damaged(f"the storage {shown(key)} is not whole")
        begins[key] = begin
        data.seek(begin + storage.size)

    def fetch(storage: Storage) -> bytes:
        if storage.key not in begins:
            raise file.damaged(f"the storage {shown(storage.key)} is missing")
        begin = begins[storage.key]
        return data[begin : begin + storage.size]

    return top, Tensors(file, fetch, "<")
