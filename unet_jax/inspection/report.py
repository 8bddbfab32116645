"""An inspection as text, and as JSON."""

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unet_jax.inspection import Inspection, settings, values
from unet_jax.inspection.examples import PARTS, Look
from unet_jax.types import size_text

TOP = 12  # values of a table
MARKS = {"error": "!!", "warning": " !", "note": "  "}


def text_of(found: Inspection) -> str:
    """The tables and the findings, for people."""
    parts = [*_head(found), *_images(found), *_masks(found), *_balance(found)]
    if found.findings:
        counts = Counter(f.level for f in found.findings)
        said = ", ".join(
            f"{counts[level]} {level}{'s' * (counts[level] > 1)}"
            for level in MARKS
            if counts[level]
        )
        parts += ["", f"findings: {said}"]
        for finding in found.findings:
            parts += textwrap.wrap(
                finding.text,
                84,
                initial_indent=f"{MARKS[finding.level]} ",
                subsequent_indent="   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    else:
        parts += ["", "findings: nothing is odd"]
    # File names may be no text at all.
    return "\n".join(parts).encode("utf-8", "backslashreplace").decode()


def json_of(found: Inspection) -> dict[str, Any]:
    """The same as plain data."""
    read = [look for look in found.examples if not look.error]
    layout = found.layout
    return {
        "layout": {
            "source": layout.source,
            "root": None if layout.root is None else str(layout.root),
            "options": dict(layout.options),
            "train": layout.train,
            "evaluation": layout.evaluation,
            "why": layout.why,
        },
        "usable": found.usable,
        "examples": {p: len(s) for p, s in found.opened.sources.items()},
        "looked_at": len(found.examples),
        "sizes": {size_text(s): n for s, n in _sizes(read).most_common()},
        "dtypes": dict(Counter(look.dtype for look in read)),
        "channels": _channels(read),
        "mask": None
        if found.kind is None
        else {
            "kind": found.kind.name,
            "why": found.kind.why,
            "values": {_value(v, found): share for v, share in _common(found)},
        },
        "label_names": list(found.label_names),
        "overlapping": found.planes,
        "shares": settings.shares(read),
        "empty": _empty(found, read),
        "findings": [dataclasses.asdict(finding) for finding in found.findings],
        "config": found.lines,
    }


def _head(found: Inspection) -> list[str]:
    layout = found.layout
    where = "" if layout.root is None else f"{layout.root}: "
    why = f" ({layout.why})" if layout.why else ""
    head = [f"{where}source {layout.source}{why}"]
    head += [f"  {key}: {value}" for key, value in _paths(layout.options)]
    counts = {part: len(source) for part, source in found.opened.sources.items()}
    told = ", ".join(
        f"{counts[part]} for {what} ({getattr(layout, part)})"
        for part, what in zip(PARTS, ("training", "evaluation"), strict=True)
        if part in counts
    )
    if told:
        head.append(f"examples: {told}")
    elif found.listing is not None:
        head.append(f"pairs of files: {len(found.listing.pairs)}")
    looked = max(len(found.examples), len(found.masks))
    if looked < found.total:
        head.append(
            f"looked at {looked} of {found.total}, evenly spread (--limit for more)"
        )
    return head


def _paths(options: Any) -> list[tuple[str, str]]:
    paths = [(key, options[key]) for key in ("images", "masks") if key in options]
    labelled = options.get("label_masks") or ()
    return [*paths, *((f"mask of {name}", p) for name, p in dict(labelled).items())]


def _images(found: Inspection) -> list[str]:
    read = [look for look in found.examples if not look.error]
    if not read:
        return []
    sizes = _sizes(read)
    if len(sizes) == 1:
        size = f"all {size_text(next(iter(sizes)))}"
    else:
        by_axis = np.array([s for s in sizes.elements() if len(s) == len(read[0].size)])
        middle = tuple(int(n) for n in np.median(by_axis, 0))
        ordered = sorted(sizes, key=lambda s: int(np.prod(s)))
        few = ", ".join(f"{size_text(s)} ({n})" for s, n in sizes.most_common(4))
        few += ", ..." if len(sizes) > 4 else ""
        size = (
            f"{size_text(ordered[0])} to {size_text(ordered[-1])}, median"
            f" {size_text(middle)}; {few}"
        )
    types = ", ".join(
        f"{name}" if n == len(read) else f"{name} ({n})"
        for name, n in Counter(look.dtype for look in read).most_common()
    )
    rows = [
        ("size", size),
        ("type", types),
    ]
    if spacings := Counter(m.spacing for m in found.masks if m.spacing):
        few = ", ".join(
            f"{' x '.join(f'{s:g}' for s in spacing)} ({n})"
            for spacing, n in spacings.most_common(4)
        )
        rows.append(("voxels", few))
    lines = ["", "images", *(f"  {name:<8}{value}" for name, value in rows)]
    lines.append(f"  {'channel':<8}{'min':>12}{'max':>12}{'mean':>12}{'std':>12}")
    for number, row in enumerate(_channels(read)):
        cells = "".join(f"{row[key]:>12.5g}" for key in ("min", "max", "mean", "std"))
        lines.append(f"  {number:<8}{cells}")
    return lines


def _masks(found: Inspection) -> list[str]:
    kind = found.kind
    if kind is None:
        return []
    lines = ["", f"masks: {kind.name}"]
    lines += textwrap.wrap(kind.why, 84, initial_indent="  ", subsequent_indent="  ")
    # Of one object a file, the share of a file's pixels says nothing.
    if found.layout.options.get("mask") == "objects":
        return lines
    common = _common(found)
    if common:
        head = "colour" if found.histogram and found.histogram.coloured else "value"
        lines.append(f"  {head:<18}{'pixels':>9}{'masks':>8}")
    for value, share in common:
        assert found.histogram is not None
        files = found.histogram.files.get(value, 0)
        lines.append(f"  {_value(value, found):<18}{_percent(share):>9}{files:>8}")
    assert found.histogram is not None
    more = len(found.histogram.pixels) - len(common)
    if more > 0:
        lines.append(f"  and {more} more values")
    return lines


def _balance(found: Inspection) -> list[str]:
    read = [look for look in found.examples if not look.error]
    shares = settings.shares(read)
    if not shares:
        return []
    width = max(len(name) for name in (*found.label_names, "not counted"))
    title = "labels, which may overlap" if found.planes else "classes"
    lines = ["", f"{title}{' ' * max(width + 2 - len(title), 1)}{'pixels':>9}{'in':>8}"]
    for k, (name, share) in enumerate(zip(found.label_names, shares, strict=False)):
        having = sum(k < len(look.counts) and look.counts[k] > 0 for look in read)
        lines.append(
            f"  {name:<{max(width, len(title))}}{_percent(share):>9}{having:>8}"
        )
    void = sum(look.void for look in read)
    if void:
        share = void / sum(look.pixels for look in read)
        having = sum(look.void > 0 for look in read)
        name = f"{'not counted':<{max(width, len(title))}}"
        lines.append(f"  {name}{_percent(share):>9}{having:>8}")
    empty = _empty(found, read)
    if empty:
        lines.append(f"  empty masks: {empty} of {len(read)}")
    return lines


def _empty(found: Inspection, read: Sequence[Look]) -> int:
    first = 0 if found.planes else 1
    return sum(not any(look.counts[first:]) for look in read)


def _sizes(read: Sequence[Look]) -> Counter[tuple[int, ...]]:
    return Counter(look.size for look in read)


def _channels(read: Sequence[Look]) -> list[dict[str, float]]:
    """min, max, mean and std of each channel, over all pixels of those that have it."""
    rows = []
    for c in range(max((len(look.low) for look in read), default=0)):
        have = [look for look in read if len(look.low) > c]
        weight = np.array([look.pixels for look in have], np.float64)
        weight /= weight.sum()
        mean = float(weight @ [look.mean[c] for look in have])
        square = float(weight @ [look.square[c] for look in have])
        rows.append(
            {
                "min": min(look.low[c] for look in have),
                "max": max(look.high[c] for look in have),
                "mean": mean,
                "std": float(np.sqrt(max(square - mean**2, 0.0))),
            }
        )
    return rows


def _common(found: Inspection) -> list[tuple[int, float]]:
    if found.histogram is None or not found.histogram.pixels:
        return []
    return list(values.shares(found.histogram).items())[:TOP]


def _value(value: int, found: Inspection) -> str:
    if found.histogram is not None and found.histogram.coloured:
        return f"({value >> 16 & 255}, {value >> 8 & 255}, {value & 255})"
    return str(value)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{share:.2g}"
