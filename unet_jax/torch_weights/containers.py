"""What PyTorch users keep weights in: read with NumPy alone, and no code of a file run.

`storages` reads the layouts there are, `pickles` runs the program that a checkpoint of
``torch.save`` is, and `calls` says what such a program may call. Here the state dict is
found in what comes out, and taken out of what is wrapped around it.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from unet_jax.torch_weights.calls import Object, Odd, Tensor, shown
from unet_jax.torch_weights.files import REMEDY, File
from unet_jax.torch_weights.storages import from_legacy, from_safetensors, from_zip
from unet_jax.types import InputError, NumpyArray

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
            return _read(File(name, file, os.fstat(file.fileno()).st_size), begin)
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


def _read(file: File, begin: bytes) -> Contents:
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
        return Contents(from_safetensors(file), ())
    if begin.startswith(b"PK\x03\x04"):
        top, tensor = from_zip(file)
    elif begin.startswith(b"\x80"):
        top, tensor = from_legacy(file)
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
        if _is_weight(key, value)
    }
    return Contents(tensors, tuple(_dropped(top, where)))


# ---- the state dict in the object


def _find(path: str, top: Any) -> tuple[tuple[str, ...], dict[Any, Any]]:
    """The state dict of a checkpoint and the keys that lead to it.

    Raises:
        InputError: There is none; the sentence says what there is.
    """
    found = []
    for where, mapping in _mappings(top, (), set()):
        count = sum(_is_weight(key, value) for key, value in mapping.items())
        if count and 2 * count >= len(mapping):
            found.append((where, mapping, count))
    if not found:
        raise InputError(f"{path} holds {_instead(top)}: {REMEDY}.")
    most = max(count for *_, count in found)

    def order(
        candidate: tuple[tuple[str, ...], dict[Any, Any], int],
    ) -> tuple[int, int]:
        where, _, count = candidate
        if not where:
            return -1, -count
        known = where[-1] in _KNOWN
        return (_KNOWN.index(where[-1]) if known else len(_KNOWN)), -count

    # A few tensors under a good name (a loss's weights) are not the net.
    where, mapping, _ = min((c for c in found if 2 * c[2] > most), key=order)
    return where, mapping


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor | Odd)


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


def _dropped(
    tree: dict[Any, Any], where: tuple[str, ...], before: str = ""
) -> Iterator[str]:
    """The names of what is beside the state dict, and in it and no tensor."""
    if not where:
        for key, value in tree.items():
            if not _is_weight(key, value):
                yield before + shown(key)
        return
    first, *rest = where
    yield from (before + shown(key) for key in tree if key != first)
    yield from _dropped(tree[first], tuple(rest), f"{before}{shown(first)}.")


def _instead(top: Any) -> str:
    """What a file holds instead of a state dict, in words."""
    if isinstance(top, Object):
        return (
            f"a whole pickled object of the class {shown(top.name)}, which only that"
            " class's own code could load, and no state dict"
        )
    if isinstance(top, Tensor | Odd):
        return "a single tensor and no state dict"
    if not isinstance(top, dict) or not top:
        return "no state dict"
    for key, value in top.items():
        if isinstance(value, Object) and key in _KNOWN:
            return (
                f"a whole pickled object of the class {shown(value.name)} as"
                f" {shown(key)}, which only that class's own code could load, and no"
                " state dict"
            )
    names = [shown(key) for key in list(top)[:8]]
    return f"no state dict (but {', '.join(names)}{', ...' if len(top) > 8 else ''})"
