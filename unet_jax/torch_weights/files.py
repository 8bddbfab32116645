"""An open file of weights, for the checks, and the sentences about a bad one."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from unet_jax.types import InputError

REMEDY = (
    "save model.state_dict() with torch.save where the net was trained, and convert"
    " that file"
)


@dataclass(frozen=True)
class File:
    """An open file, its path for the sentences and its size for the checks."""

    path: str
    stream: BinaryIO
    size: int

    def damaged(self, how: str) -> InputError:
        """The sentence for bytes that no whole file has."""
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
