"""Pickles, run on plain data by a machine that can call nothing.

A pickle is a program, and the one of a checkpoint from the internet is somebody else's.
`Machine` runs its opcodes: a global is a name that is never imported, a call of a name
that `calls` lists is answered there, and a call of any other is refused.
"""

import pickletools
from collections.abc import Callable
from typing import Any

from unet_jax.torch_weights.calls import (
    Global,
    Object,
    Storage,
    call,
    new,
    persistent,
    refuse,
    shown,
)
from unet_jax.torch_weights.files import File

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
    "EMPTY_SET": lambda: Object("set"),
}


class Machine:
    """Runs a pickle on None, numbers, text, bytes, tuples, lists, dicts and stand-ins.

    A call is answered by `calls.call`, or refused. An object's state is thrown away.

    Args:
        file: For the sentences.
        stream: Where the pickle begins; left where it ends.

    Attributes:
        storages: By key, those that the pickle speaks of.
    """

    def __init__(self, file: File, stream: Any) -> None:
        self.storages: dict[str, Storage] = {}
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
                self._push(Object("frozenset"))
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
                stack.append(self._storage(stack.pop()))
            case _:
                self._make(name, argument)

    def _make(self, name: str, argument: Any) -> None:
        """The opcodes with which a pickle runs code."""
        path = self._file.path
        match name:
            case "GLOBAL":
                self._push(Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                module, attribute = self._args(2)
                self._push(Global(f"{module}.{attribute}"))
            case "REDUCE":
                self._push(call(path, *self._args(2)))
            case "NEWOBJ":
                self._push(new(path, *self._args(2)))
            case "NEWOBJ_EX":
                made, args, keywords = self._args(3)
                self._push(new(path, made, (*args, *keywords)))
            case "OBJ":
                made, *args = self._popped()
                self._push(call(path, made, tuple(args)))
            case "INST":
                made = Global(argument.replace(" ", "."))
                self._push(call(path, made, tuple(self._popped())))
            case "BUILD":
                target, _ = self._args(2)
                # The state may be a hook's argument or attributes: neither is kept.
                if isinstance(target, Global):
                    refuse(path, target)
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
        elif not isinstance(target, Object):
            raise TypeError("only a list can be added to")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Object):
            return
        if not isinstance(target, dict):
            raise TypeError("only a dict has items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a deep tuple would overflow the interpreter's stack.
            plain = isinstance(key, str | int | float | bytes | None | Object)
            target[key if plain else Object(shown(key))] = value

    def _storage(self, name: Any) -> Storage | Global:
        """What a persistent name is; a storage is remembered."""
        named = persistent(name)
        if isinstance(named, Global):
            return named
        if self.storages.setdefault(named.key, named) != named:
            raise ValueError("a storage has one dtype and size")
        return named
