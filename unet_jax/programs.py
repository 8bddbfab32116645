"""Compiled programs: kept from run to run, and compiled while something else is done.

`keep` has JAX take its programs from a folder of the user's cache, and `Early` compiles
one in a thread. Both are for programs of a command line: whoever imports the package
decides for themselves.
"""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MOST = 2**30  # bytes that kept programs may take, of all machines that share the folder

_THREAD = "unet_jax compiles"
_LOADED = threading.local()  # what became of the last program that a thread asked for
_ONE = threading.Lock()  # at a time may stand in for the process's stderr


# --- Kept from run to run ------------------------------------------------------------


def keep() -> Path | None:
    """Has JAX keep what it compiles in ``${XDG_CACHE_HOME:-~/.cache}/unet_jax``.

    The user's own settings go first: where ``JAX_COMPILATION_CACHE_DIR`` is set, or
    ``JAX_ENABLE_COMPILATION_CACHE=false``, nothing is changed. Several processes may
    share the folder, and an entry that is damaged is compiled anew.

    Returns:
        The folder; None where nothing is changed, or where it cannot be written to.
    """
    import jax

    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    place = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = Path(os.path.expanduser(place)) / "unet_jax" / "programs"
    try:
        trim(folder, MOST)
        folder = folder / machine()
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # The many small ones take as long together as the large one.
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Each time on a disk that is full: the run only compiles again next time.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    _mend()
    return folder


def machine() -> str:
    """A digest of what programs for the CPU are compiled for.

    JAX's own key does not tell one CPU from another, so that of a home folder that
    machines share it would load programs with instructions that this one lacks.
    """
    cores = getattr(os, "sched_getaffinity", None)
    known = [platform.system(), platform.machine()]
    known.append(str(len(cores(0)) if cores else os.cpu_count()))
    telling = ("vendor", "model", "cpu family", "stepping", "flags", "features", "cpu ")
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
        lines = [line for line in first.splitlines() if "mhz" not in line.lower()]
        known += [line for line in lines if line.lower().startswith(telling)]
    except OSError:  # elsewhere: this machine alone
        known += [platform.processor(), platform.node()]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def trim(folder: Path, most: int) -> None:
    """Deletes the files that were not used for the longest time.

    Args:
        folder: Of kept programs, those of other machines too; it need not be there.
        most: Bytes that may stay.
    """
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process deletes, too
            if path.is_file() and not path.is_symlink():
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        total -= size
        with contextlib.suppress(OSError):
            path.unlink()


def _mend() -> None:
    """Has JAX delete an entry that it cannot read, and say nothing about gathers.

    JAX writes an entry in place and never replaces one, so that one half written by a
    process that was killed would be complained of in every run from then on.
    """
    from jax._src import compilation_cache

    load = getattr(compilation_cache, "get_executable_and_time", None)
    if load is None or hasattr(load, "mended"):
        return

    def mended(key: str, *args: Any, **more: Any) -> Any:
        import jax

        folder = Path(getattr(jax.config, "jax_compilation_cache_dir", None) or "")
        entry = folder / f"{key}-cache"
        on_cpu = any(getattr(x, "platform", "") == "cpu" for x in args)
        quiet = _without_machine_lines() if on_cpu else contextlib.nullcontext()
        try:
            with quiet:
                found = load(key, *args, **more)
        except Exception:
            found = None, None
            with contextlib.suppress(OSError):
                entry.unlink()
        _LOADED.found, _LOADED.entry = found[0] is not None, entry
        if _LOADED.found:
            with contextlib.suppress(OSError):
                os.utime(entry)  # for `trim`
        return found

    mended.mended = True  # pyright: ignore[reportFunctionMemberAccess]
    compilation_cache.get_executable_and_time = mended


@contextlib.contextmanager
def _without_machine_lines() -> Iterator[None]:
    """Leaves out what XLA writes to stderr about every program loaded for a CPU.

    It misses ``prefer-no-gather`` and ``prefer-no-scatter`` in what the CPU can do,
    which are no instructions but LLVM's own preferences (jax-ml/jax issue 38445). All
    else that is written meanwhile comes out behind.
    """
    with _ONE, tempfile.TemporaryFile() as held:
        try:
            stderr = os.dup(2)
        except OSError:  # a process without one
            yield
            return
        try:
            os.dup2(held.fileno(), 2)
            yield
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            lines = held.readlines()
            idle = b"machine feature +prefer-no-"
            with contextlib.suppress(OSError), open(stderr, "wb") as out:
                out.writelines(line for line in lines if idle not in line)


# --- Compiled while something else is done -------------------------------------------


class Program(NamedTuple):
    """A compiled function.

    Attributes:
        call: The program; takes arrays of the shapes that it is compiled for.
        seconds: That it took to compile or to load.
        kept: ``loaded`` from the folder of `keep`, ``stored`` there for the next run,
            or "".
    """

    call: Any
    seconds: float
    kept: str

    def text(self) -> str:
        """What a person is told when it is there."""
        import jax

        folder = _short(getattr(jax.config, "jax_compilation_cache_dir", None) or "")
        if self.kept == "loaded":
            return f"taken from {folder} in {self.seconds:.1f} s"
        said = f"compiled in {self.seconds:.1f} s"
        return f"{said}; the next run takes it from {folder}" if self.kept else said


def compiled(fn: Any, *args: Any) -> Program:
    """The program of a jitted function, at once or when `Early` has it.

    Args:
        fn: Jitted, or `Early`.
        args: Arrays, or their shapes and where they lie.
    """
    if isinstance(fn, Early):
        return fn.program(*args)
    begin = time.perf_counter()
    return _compiled(fn.lower(*args), begin)


def _compiled(lowered: Any, begin: float) -> Program:
    _LOADED.found, _LOADED.entry = False, None
    call = lowered.compile()
    kept = "loaded" if _LOADED.found else ""
    if not kept and _LOADED.entry is not None and _LOADED.entry.exists():
        kept = "stored"
    return Program(call, time.perf_counter() - begin, kept)


class Early:
    """A jitted function that can be compiled before its arrays are there.

    It is called as the function is; the program that was compiled early runs where the
    arrays are as they were expected, else the function is compiled as ever.

    Args:
        fn: Jitted.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._expected: Any = None
        self._program: Future[Program] | None = None
        self._called = False  # before there was anything to take

    def begin(self, *shapes: Any) -> None:
        """Traces it for these shapes and has a thread compile it; see `leave`.

        Args:
            shapes: What the function takes, `jax.ShapeDtypeStruct` with where they lie.
        """
        begin = time.perf_counter()
        lowered, answer = self.fn.lower(*shapes), Future()
        # In this order: who finds a program also finds what it is for.
        self._expected = _described(shapes)
        self._program = answer

        def work() -> None:
            try:
                answer.set_result(_compiled(lowered, begin))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=work, name=_THREAD).start()

    def begin_after(self, before: Any, shapes: Callable[[], Sequence[Any]]) -> None:
        """Does so later, and all of it in a thread.

        Args:
            before: Arrays that are being computed, which it would hold up.
            shapes: Is then asked for the shapes.
        """
        import jax

        def work() -> None:
            # What goes wrong here will go wrong again for who comes with arrays.
            with contextlib.suppress(Exception):
                jax.block_until_ready(before)
                expected = shapes()
                if not self._called:
                    self.begin(*expected)

        threading.Thread(target=work, name=_THREAD).start()

    def expects(self, *args: Any) -> bool:
        """Whether the program that was begun is one for these arrays."""
        return self._program is not None and self._expected == _described(args)

    def ready(self, *args: Any) -> bool:
        """Whether nothing has to be waited for before it runs with these arrays."""
        return (
            self.expects(*args) and self._program is not None and self._program.done()
        )

    def program(self, *args: Any) -> Program:
        """The program for these arrays or shapes; waits for what was begun.

        Raises:
            Exception: What compiling raised, here or in the thread.
        """
        if self._program is not None and self.expects(*args):
            return self._program.result()
        return compiled(self.fn, *args)

    def lower(self, *args: Any) -> Any:
        """As the function's own."""
        return self.fn.lower(*args)

    def __call__(self, *args: Any) -> Any:
        if self.expects(*args):
            return self.program(*args).call(*args)
        self._called = True
        return self.fn(*args)


def _described(args: Any) -> Any:
    """What a program is compiled for: structure, shapes, types, and where they lie."""
    import jax

    leaves, structure = jax.tree.flatten(args)
    return structure, [(x.shape, x.dtype, getattr(x, "sharding", 0)) for x in leaves]


def leave(status: int) -> NoReturn:
    """Ends the process, and does not wait for a program that nobody needs any more.

    Args:
        status: Of the process.
    """
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        # XLA cannot be stopped, nor may Python take itself apart under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


# --- Said to a person ----------------------------------------------------------------


@contextlib.contextmanager
def waited(
    what: str, say: Callable[[str], None], *, after: float = 2.0
) -> Iterator[None]:
    """Says what is being waited for, where it takes long, and then how long.

    Args:
        what: Such as ``reading the first batch``.
        say: Is told.
        after: Seconds from which it is long.
    """
    begin = time.perf_counter()
    timer = threading.Timer(after, say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    seconds = time.perf_counter() - begin
    if seconds > after:
        say(f"{what} took {seconds:.1f} s")


def _short(folder: str) -> str:
    """A folder as a person writes it, without the machine's digest."""
    path = str(Path(folder).parent.parent)
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path
