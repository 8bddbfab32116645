"""What a pickle of PyTorch may call, and what is answered instead of calling it.

Nothing that a pickle names is ever looked up. Names stand for themselves (`Global`),
tensors for where they lie (`Tensor`), and every other object for its class's name
(`Object`). `call` answers the names listed here and refuses the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from unet_jax.torch_weights.files import REMEDY
from unet_jax.types import InputError

# ---- what stands for something


@dataclass(frozen=True)
class Global:
    """A name in a pickle, ``module.name``; never looked up."""

    name: str


@dataclass(frozen=True, eq=False)
class Object:
    """What stands for an object that no code was run to make: its class's name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of ``count`` elements of ``itemsize`` bytes in the file."""

    key: str
    dtype: str
    itemsize: int
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.itemsize


@dataclass(frozen=True)
class Tensor:
    """A view of a storage as the pickle describes it, unchecked; counts elements."""

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True)
class Odd:
    """A tensor that NumPy cannot hold, and why."""

    what: str


def shown(name: Any) -> str:
    """A name from a file, safe to print."""
    if isinstance(name, Object):
        name = name.name
    if not isinstance(name, str | int | float):
        name = type(name).__name__
    try:
        text = str(name)
    except ValueError:  # an int of thousands of digits
        text = "int"
    text = text if len(text) <= 120 else f"{text[:117]}..."
    return "".join(c if c.isprintable() else "?" for c in text)


# ---- the names listed

# The class of a storage -> (dtype, bytes an element). Those which NumPy lacks are here
# because a file of which they are a part can be read all the same.
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
# an `Object` that has a name and nothing else, whatever their arguments.
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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor has a storage")
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_of_dtype(  # what has no class of storage: uint16, float8 ...
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    *_: Any,
) -> Tensor:
    if not isinstance(storage, Storage) or not isinstance(dtype, Global):
        raise TypeError("a tensor has a storage and a dtype")
    name = dtype.name.removeprefix("torch.")
    return Tensor(storage, name, offset, shape, strides)


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


# ---- the answers


def persistent(name: Any) -> Storage | Global:
    """What a persistent name is: ``("storage", class, key, device, elements)``.

    A legacy file puts None for a view after it, and keeps the source of a whole
    module's classes under a name of its own, ``("module", class, ...)``.

    Args:
        name: From the pickle.

    Raises:
        ValueError: Another name than torch.save writes.
    """
    if not isinstance(name, tuple) or len(name) not in (4, 5, 6):
        raise ValueError("a persistent name is a tuple")
    if name[0] == "module" and isinstance(name[1], Global):
        return name[1]
    tag, made, key, _, count, *view = name
    if tag != "storage" or not isinstance(made, Global) or view not in ([], [None]):
        raise ValueError("of persistent names, only storages are known")
    if not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("a storage has a key and a number of elements")
    kind = made.name.rpartition(".")[2]
    return Storage(key, *_STORAGES.get(kind, (kind, 1)), count)


def call(path: str, made: Any, args: Any) -> Any:
    """The answer to a call; nothing is called.

    Args:
        path: Of the file, for the sentence.
        made: What the pickle calls.
        args: A tuple.

    Raises:
        InputError: A name that is not listed.
        TypeError: No call that torch.save writes.
    """
    if not isinstance(made, Global) or not isinstance(args, tuple):
        raise TypeError("only a name can be called")
    if made.name == "torch._tensor._rebuild_from_type_v2":
        # A tensor with attributes: (how to make it, its class, with what, they).
        made, _, args, _ = args
        if not isinstance(made, Global) or made.name not in _REBUILT:
            refuse(path, made)
    if made.name in _REBUILT:
        return _REBUILT[made.name](*args)
    if made.name in _ODD_TENSORS:
        return Odd(_ODD_TENSORS[made.name])
    if made.name in _DICTS:
        return _dict(*args)
    if made.name not in _INERT:
        refuse(path, made)
    inner = args[0] if args and made.name.endswith("._reconstructor") else made
    return Object(inner.name if isinstance(inner, Global) else made.name)


def new(path: str, made: Any, args: Any) -> Any:
    """The answer to ``made.__new__(*args)``, as for `call`.

    An object of an unknown class that is made without arguments, as pickle does for
    plain classes, is a stand-in too.

    Args:
        path: Of the file, for the sentence.
        made: The class.
        args: A tuple.
    """
    if isinstance(made, Global) and not args and made.name not in _DICTS:
        return Object(made.name)
    return call(path, made, args)


def refuse(path: str, made: Any) -> NoReturn:
    """Says that a file would have to run code to be loaded.

    Args:
        path: Of the file.
        made: What it would have to call.

    Raises:
        InputError: Always.
    """
    name = made.name if isinstance(made, Global) else "a value"
    raise InputError(
        f"{path} would have to call {shown(name)} to be loaded, which no weights need"
        f" and was not done: {REMEDY}."
    )
