"""Writing tensors as a file that PyTorch reads."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unet_jax.types import InputError, NumpyArray

SUFFIXES = (".safetensors", ".pth", ".pt")


def write(path: str | os.PathLike[str], tensors: Mapping[str, NumpyArray]) -> None:
    """Writes a state dict; a file of that name is replaced once the new one is whole.

    Args:
        path: ``.safetensors``; or ``.pth`` and ``.pt``, which needs PyTorch.
        tensors: By their names; bfloat16 as that of ``ml_dtypes``.

    Raises:
        InputError: Another ending, no folder or no room there, or no PyTorch.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{path} must end in one of {', '.join(SUFFIXES)} to be a file for PyTorch."
        )
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent}: make it first.")
    data = _safetensors(tensors) if path.suffix == ".safetensors" else _torch(tensors)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise InputError(f"{path} could not be written: {error.strerror}.") from error


def _safetensors(tensors: Mapping[str, NumpyArray]) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    # It writes memory as it lies: transposed arrays must be copied first.
    whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    shaped = {key: v.reshape(tensors[key].shape) for key, v in whole.items()}
    return save(shaped, metadata={"format": "pt"})


def _torch(tensors: Mapping[str, NumpyArray]) -> bytes:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            "writing a .pth file needs PyTorch: install it (pip install torch), or"
            " write .safetensors, which PyTorch reads as well."
        ) from error
    import io

    def tensor(value: NumpyArray) -> Any:
        if value.dtype.name == "bfloat16":  # PyTorch does not take NumPy's
            bits = torch.from_numpy(value.view("int16").copy())
            return bits.view(torch.bfloat16)
        return torch.from_numpy(value.copy())

    file = io.BytesIO()
    torch.save({key: tensor(value) for key, value in tensors.items()}, file)
    return file.getvalue()
