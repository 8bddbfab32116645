"""One run at a time in a workdir.

The lock is the operating system's, on the open file ``workdir/lock``: it is gone when
the process is, however it ended, and no file has to be removed after a kill. What
stands in the file is only for the sentence that another run is given.
"""

import contextlib
import datetime
import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from unet_jax import distributed
from unet_jax.types import InputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = "lock"
_LOG = logging.getLogger(__name__)
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_held: set[int] = set()


def _leave() -> None:
    """In a forked child: a lock is held as long as any copy of its file is open."""
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave)


def _owner(path: Path) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        found = json.loads(path.read_text())
        pid, host, since = (found[key] for key in ("pid", "host", "since"))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return "another process"  # it has not written yet, or something else has
    return f"process {pid} on host {host} since {since}"


@contextlib.contextmanager
def hold(
    workdir: str | os.PathLike[str], *, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Keeps other runs out of a workdir, until the context or the process ends.

    Of several processes of one run, process 0 does so for all. Where the platform or
    the file system has no locks it says so and goes on.

    Args:
        workdir: The run's folder; there is one.
        say: Is told that there are no locks; the log, if None.

    Raises:
        InputError: Another process is in it, or nothing can be written there.
    """
    if fcntl is None or not distributed.is_main():
        yield
        return
    path = Path(workdir) / LOCK
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): use another --workdir, or"
            " mend that one."
        ) from error
    _held.add(file)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise InputError(
                    f"the workdir {os.fspath(workdir)} is in use by {_owner(path)}:"
                    " wait for it, stop it, or use another --workdir."
                ) from error
            (say or _LOG.warning)(
                f"note: the file system of {os.fspath(workdir)} has no locks"
                f" ({error.strerror}): nothing keeps a second run out of it"
            )
        else:
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            own = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
            # Only for the sentence: a full disk is met where it matters.
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(own).encode(), 0)
        yield
    finally:
        if file in _held:  # a forked child has closed it already
            _held.discard(file)
            os.close(file)
