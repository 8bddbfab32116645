"""What a compiled step costs: memory a device, operations, what devices say.

Everything is read off the compiled program; nothing runs. The figures are those of the
program that each device runs, so on a mesh they are a device's part and not the whole.
A loop's body is in that program once, however often it runs: the operations and the
communication of a step that accumulates are those of one microbatch.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

__all__ = ["Collective", "Costs", "bytes_text", "collectives", "costs", "text"]

_SILENT = "this backend does not tell"


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of one kind by which devices talk.

    Attributes:
        count: How many there are in the program.
        bytes: Of their results on one device, added up.
        largest: The largest array of them, such as ``f32[8,1,32,8]``.
    """

    count: int
    bytes: int
    largest: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a compiled program takes of each device. None is what a backend hides.

    Attributes:
        arguments: Bytes of what it is given.
        outputs: Bytes of what it gives.
        aliased: Bytes of the outputs that lie where a donated argument was.
        temporary: Bytes of what lives in between.
        code: Bytes of the program itself.
        flops: Operations as XLA counts them, a multiply-add as 2; also those between
            the convolutions, but not taps on zero padding
            (`unet_jax.report.count_flops` counts what was written).
        collectives: Kind (``all-reduce``, ``collective-permute`` ...) to what there is
            of it; empty where devices do not talk.
    """

    arguments: int | None
    outputs: int | None
    aliased: int | None
    temporary: int | None
    code: int | None
    flops: float | None
    collectives: Mapping[str, Collective] | None

    @property
    def peak(self) -> int | None:
        """Bytes a device needs while the program runs, the program itself left out."""
        parts = (self.arguments, self.outputs, self.temporary, self.aliased)
        if any(part is None for part in parts):
            return None
        given, out, temporary, aliased = (part or 0 for part in parts)
        return given + out - aliased + temporary


# --- Reading the program -------------------------------------------------------------

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "all-to-all",
    "ragged-all-to-all",
)
# `%name = TYPE kind(operands)`. A tuple's type has spaces in it, but neither the names
# nor the attributes (`%`, `=`) that follow an operation, so that it cannot run on into
# the rest of the line. `-done` has no operation of its own and does not match.
_INSTRUCTION = re.compile(
    r"^ *(?:ROOT )?%?[\w.\-]+ = (?P<type>\((?:[^=%\"\n]|<=)*\)|\S+)"
    rf" (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\(",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[^\]]*)\]")
_COMMENT = re.compile(r"/\*.*?\*/")  # `/*index=5*/`, in front of every fifth of a tuple


def _elements(type_text: str) -> list[str]:
    """The types in a tuple's type, which may be tuples themselves."""
    elements, depth, begin = [], 0, 1
    for i, letter in enumerate(type_text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            elements.append(type_text[begin:i].strip())
            begin = i + 1
    return elements


def _result(kind: str, type_text: str, *, start: bool) -> str:
    """The type of what an operation gives, without what a ``-start`` carries along.

    The ``-start`` of an all-reduce has the result's own type. Those of others have
    tuples: the operands, the result, and what the backend needs besides.
    """
    if not start or not type_text.startswith("("):
        return type_text
    elements = _elements(type_text)
    plain = kind == "all-reduce" and not elements[0].startswith("(")
    return type_text if plain or len(elements) < 2 else elements[1]


def _arrays(type_text: str) -> list[tuple[int, str]]:
    """(bytes, ``f32[8,16]``) of each array in a type, layouts left out."""
    arrays = []
    for found in _ARRAY.finditer(type_text):
        shape = found["shape"].replace("<=", "").replace(" ", "")
        count = math.prod(int(n) for n in shape.split(",") if n)
        bits = int(found["bits"] or 8)  # of pred: a byte
        arrays.append((-(-count * bits // 8), f"{found['dtype']}[{shape}]"))
    return arrays


def collectives(hlo: str) -> dict[str, Collective]:
    """The operations in a compiled program by which devices talk.

    Args:
        hlo: Its text, as ``compiled.as_text()`` gives it.

    Returns:
        Kind to what there is of it, kinds that are not there left out. An operation in
        two halves (``all-gather-start``, ``-done``) counts once, and so does one that
        combines many arrays, with the bytes of all.
    """
    counts: dict[str, int] = dict.fromkeys(_KINDS, 0)
    found: dict[str, list[tuple[int, str]]] = {kind: [] for kind in _KINDS}
    for match in _INSTRUCTION.finditer(_COMMENT.sub("", hlo)):
        kind, start = match["kind"], bool(match["start"])
        counts[kind] += 1
        found[kind] += _arrays(_result(kind, match["type"], start=start))
    return {
        kind: Collective(
            count=count,
            bytes=sum(size for size, _ in found[kind]),
            # Of equal ones the first.
            largest=max(found[kind], key=lambda a: a[0], default=(0, ""))[1],
        )
        for kind, count in counts.items()
        if count
    }


def _asked(question: Callable[[], Any]) -> Any:
    """What a backend answers, None where it cannot."""
    try:
        return question()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None


def costs(compiled: Any) -> Costs:
    """What a compiled program takes of each device.

    Args:
        compiled: What ``jax.jit(step).lower(...).compile()`` gives.
    """
    memory = _asked(compiled.memory_analysis)
    sizes = {
        field: getattr(memory, f"{name}_size_in_bytes", None)
        for field, name in (
            ("arguments", "argument"),
            ("outputs", "output"),
            ("aliased", "alias"),
            ("temporary", "temp"),
            ("code", "generated_code"),
        )
    }
    flops = (_asked(compiled.cost_analysis) or {}).get("flops", math.nan)
    hlo = _asked(compiled.as_text)
    return Costs(
        **sizes,
        flops=float(flops) if flops >= 0 else None,  # NaN and -1: not known
        collectives=None if hlo is None else collectives(hlo),
    )


# --- For people ----------------------------------------------------------------------


def _scaled(value: float, units: str, base: int) -> tuple[float, str]:
    """A value in the largest unit of which there is at least one."""
    power = 0
    while power + 1 < len(units) and value >= base ** (power + 1):
        power += 1
    return value / base**power, units[power].strip()


def bytes_text(count: float) -> str:
    """``5.3 GB``, ``12.0 MB`` (2^30 and 2^20 bytes), ``96 bytes``."""
    value, unit = _scaled(count, " KMGT", 1024)
    return f"{value:.1f} {unit}B" if unit else f"{count:.0f} bytes"


def _flops_text(count: float) -> str:
    value, unit = _scaled(count, " KMGT", 1000)
    return f"{value:.2f} {unit}FLOP" if unit else f"{count:.0f} FLOP"


def _memory_text(costs: Costs) -> str:
    if costs.peak is None:
        return f"memory of the compiled step: {_SILENT}"
    given, out, temporary, aliased = (
        bytes_text(size or 0)
        for size in (costs.arguments, costs.outputs, costs.temporary, costs.aliased)
    )
    shared = f" ({aliased} in the arguments' place)" if costs.aliased else ""
    return (
        f"memory of the compiled step, a device: {bytes_text(costs.peak)}"
        f" = arguments {given} + outputs {out}{shared} + temporaries {temporary}"
    )


def _operations_text(costs: Costs, devices: int) -> str:
    if costs.flops is None:
        return f"operations of the compiled step: {_SILENT}"
    line = f"operations of the compiled step, a device: {_flops_text(costs.flops)}"
    if devices > 1:
        line += f", on all {devices} {_flops_text(costs.flops * devices)}"
    return f"{line} (a loop's body counted once)"


def _collectives_text(found: Mapping[str, Collective] | None) -> list[str]:
    if found is None:
        return [f"communication between devices: {_SILENT}"]
    if not found:
        return ["no communication between devices"]
    return [
        f"{kind}: {c.count}, {bytes_text(c.bytes)} in all, largest {c.largest}"
        for kind, c in found.items()
    ]


def text(costs: Costs, *, devices: int) -> str:
    """A compiled step's costs for a person.

    Args:
        costs: Of the step.
        devices: How many run it together.

    Returns:
        A line of memory, a line of operations, and a line for each kind of operation
        by which devices talk.
    """
    lines = [_memory_text(costs), _operations_text(costs, devices)]
    return "\n".join([*lines, *_collectives_text(costs.collectives)])
