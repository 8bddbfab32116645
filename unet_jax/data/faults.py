"""What is wrong with parts of a data set when it is opened: a stop, or left out."""

import logging
from typing import Literal, get_args

from unet_jax.types import InputError, choose

_LOG = logging.getLogger("unet_jax")

OnError = Literal["stop", "skip"]


class Faults:
    """Takes errors as they are found.

    Args:
        on_error: ``stop`` raises each error at once; ``skip`` keeps count, and the
            caller goes on without the part that it was about.
        what: what the parts are, in the plural: ``images of DIR``.

    Raises:
        InputError: another ``on_error``.
    """

    def __init__(self, on_error: str, what: str) -> None:
        choose(get_args(OnError), on_error, "data.on_error =")
        self.on_error, self.what = on_error, what
        self.count, self.first = 0, ""

    def add(self, error: InputError) -> None:
        """Raises the error, or counts it."""
        if self.on_error == "stop":
            raise error
        self.count += 1
        self.first = self.first or str(error)

    def report(self, left: int) -> None:
        """One warning of what was left out.

        Args:
            left: how many parts there still are.

        Raises:
            InputError: none.
        """
        if self.count and not left:
            many = f", {self.count} in number" if self.count > 1 else ""
            raise InputError(f"All {self.what} are faulty{many}. {self.first}")
        if self.count == 1:
            kinds, _, place = self.what.partition(" of ")
            kind = " ".join(word.removesuffix("s") for word in kinds.split())
            _LOG.warning("1 faulty %s of %s is left out: %s", kind, place, self.first)
        elif self.count:
            _LOG.warning(
                "%d faulty %s are left out. The first: %s",
                self.count,
                self.what,
                self.first,
            )
