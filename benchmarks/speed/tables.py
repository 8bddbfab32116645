"""Figures on disk, and the tables of ``docs/performance.md`` made of them.

``results-<kind of device>.json`` holds, by table and row, what was measured and where;
a run of some rows replaces these and leaves the others. No hand types a figure.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.family import markdown, wrapped
from benchmarks.speed.cases import CASES, GROWING, ROOFLINE
from benchmarks.speed.rounds import best, ratio
from unet_jax.log import replace_file
from unet_jax.types import InputError

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "performance.md"
TITLES = {
    "ours": "ours",
    "eager": "PyTorch",
    "channels_last": "channels last",
    "compiled": "`torch.compile`",
}
TABLES = ("forward", "train", "predict", "end_to_end", "memory", "compile", "growth")

Record = Mapping[str, Any]


# --- Figures on disk -----------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Records by table and row; none where there is no file.

    Raises:
        InputError: It is a file of another kind.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(rows, dict) for rows in found.values()):
            raise ValueError
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{path} does not hold figures of this benchmark: take it from the"
            " repository again, or remove it."
        ) from error
    return found


def keep(path: Path, table: str, rows: Mapping[str, Record]) -> None:
    """Puts rows of a table to those that are there, or in their place; a line each."""
    found = read(path)
    found.setdefault(table, {}).update(rows)
    parts = []
    for name in (name for name in TABLES if name in found):
        lines = [
            f"{json.dumps(k)}: {json.dumps(row)}" for k, row in found[name].items()
        ]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    replace_file(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def files(folder: Path = HERE) -> list[Path]:
    """What there is, the CPU's first."""
    found = sorted(folder.glob("results-*.json"))
    return sorted(found, key=lambda path: path.stem != "results-cpu")


# --- Tables --------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def quotient(first: Sequence[float], second: Sequence[float]) -> str:
    """Ratio of medians, and the quartiles of the rounds' own."""
    found = ratio(first, second)
    return f"{found.middle:.2f} ({found.low:.2f}-{found.high:.2f})"


def candidates(rows: Mapping[str, Record], key: str) -> list[str]:
    """Who was measured in some row, ours first."""
    names = [name for row in rows.values() for name in row[key]]
    known = list(TITLES)

    def place(name: str) -> tuple[bool, int]:
        return not name.startswith("ours"), known.index(name) if name in known else 0

    return sorted(dict.fromkeys(names), key=place)


def _ratios(figures: Mapping[str, Sequence[float]], *, more: bool = False) -> list[str]:
    """Ours over eager and over PyTorch's best; of rates ``more`` is better."""
    if more:
        figures = {n: [1 / v for v in some] for n, some in figures.items()}
    others = [name for name in figures if not name.startswith("ours")]
    mine = best(figures, [name for name in figures if name.startswith("ours")])
    some = "eager" if "eager" in figures else best(figures, others)
    return [
        quotient(figures[mine], figures[name]) for name in (some, best(figures, others))
    ]


def times(table: str, rows: Mapping[str, Record]) -> str:
    """Of ``forward``, ``train`` and ``predict``: a row a case, milliseconds."""
    names = candidates(rows, "seconds")
    bound = {key: _bound(table, key, row) for key, row in rows.items()}
    head = ["net", "batch"]
    head += ["type"] if len({row["dtype"] for row in rows.values()}) > 1 else []
    plain = len(head)
    head += [f"{TITLES.get(name, name)}, ms" for name in names]
    head += ["ours / PyTorch", "ours / best of PyTorch"]
    rated = any(row["hardware"].startswith("one ") for row in rows.values())
    head += ["images/s"] * rated + ["of the roofline"] * any(bound.values())
    lines = [head]
    for key, row in rows.items():
        seconds = row["seconds"]
        line = [row["case"], str(row["batch"]), row["dtype"]][:plain]
        line += [
            number(1e3 * float(np.median(seconds[name]))) if name in seconds else ""
            for name in names
        ]
        line += _ratios(seconds)
        if rated:
            images = 1 if table == "predict" else row["batch"]
            rate = images / float(np.median(seconds["ours"]))
            line.append(number(rate))
            if any(bound.values()):
                line.append(f"{rate / bound[key]:.0%}" if bound[key] else "")
        lines.append(line)
    return markdown(lines)


def _bound(table: str, key: str, row: Record) -> float:
    """Images a second by the roofline, or 0 where none is known."""
    if "H200" not in row["hardware"] or row["dtype"] != "bfloat16":
        return 0.0
    return ROOFLINE.get((table, key.split(",")[0]), 0.0)


def end_to_end(rows: Mapping[str, Record]) -> str:
    """Images a second of whole trainings."""
    names = candidates(rows, "rates")
    head = ["training", *(f"{TITLES.get(n, n)}, images/s" for n in names)]
    head += ["PyTorch / best of ours", "best of PyTorch / best of ours"]
    lines = [head]
    for row in rows.values():
        rates = row["rates"]
        line = [row["case"]]
        line += [
            number(float(np.median(rates[n]))) if n in rates else "" for n in names
        ]
        lines.append(line + _ratios(rates, more=True))
    return markdown(lines)


def memory(rows: Mapping[str, Record]) -> str:
    """The peak of a training step."""
    names = candidates(rows, "bytes")
    planned = any(row.get("planned") for row in rows.values())
    head = ["net", "batch", *(f"{TITLES.get(n, n)}, MB" for n in names)]
    head += ["ours / PyTorch", "ours / best of PyTorch"]
    head += ["planned by XLA, MB"] * planned
    lines = [head]
    for row in rows.values():
        found = row["bytes"]
        line = [row["case"], str(row["batch"])]
        line += [
            number(float(np.median(found[n])) / 1e6) if n in found else ""
            for n in names
        ]
        line += [text.split(" ")[0] for text in _ratios(found)]
        if planned:
            line.append(number(row["planned"] / 1e6) if row.get("planned") else "")
        lines.append(line)
    return markdown(lines)


def compiling(rows: Mapping[str, Record]) -> str:
    """Seconds until a program is there."""
    some = any("compiled" in row["seconds"] for row in rows.values())
    head = ["net", "what", "ours: trace, s", "compile, s", "in all, s"]
    head += ["`torch.compile`, s", "ours / `torch.compile`"] * some
    lines = [head]
    for row in rows.values():
        seconds = row["seconds"]
        parts = [float(np.median(seconds[k])) for k in ("trace", "xla", "ours")]
        line = [row["case"], row["what"], *map(number, parts)]
        if some and "compiled" in seconds:
            line.append(number(float(np.median(seconds["compiled"]))))
            line.append(quotient(seconds["ours"], seconds["compiled"]))
        elif some:
            line += ["", ""]
        lines.append(line)
    return markdown(lines)


def growth(rows: Mapping[str, Record]) -> str:
    """A training step against what grows, point by point."""
    names = candidates(rows, "seconds")
    head = ["against", "", *(f"{TITLES.get(n, n)}, ms" for n in names)]
    lines = [[*head, "ours / best of PyTorch"]]
    for row in rows.values():
        seconds = row["seconds"]
        line = [row["axis"], f"{row['at']:,}"]
        line += [
            number(1e3 * float(np.median(seconds[n]))) if n in seconds else ""
            for n in names
        ]
        several = set(seconds) == {"ours"}
        lines.append([*line, "" if several else _ratios(seconds)[1]])
    return markdown(lines)


def table(name: str, rows: Mapping[str, Record]) -> str:
    """The table of a name of `TABLES`, with what it was measured on."""
    rows = dict(sorted(rows.items(), key=_place))
    makers = {
        "end_to_end": end_to_end,
        "memory": memory,
        "compile": compiling,
        "growth": growth,
    }
    text = makers[name](rows) if name in makers else times(name, rows)
    where = sorted({f"{r['hardware']}; {r['versions']}" for r in rows.values()})
    others = max(row["others"] for row in rows.values())
    said = f"{'. '.join(where)}. Other work took {others:.0%} of the CPU at most."
    differences = [row["difference"] for row in rows.values() if "difference" in row]
    if differences and name in _COMPARED:
        said += f" {_COMPARED[name]}: {max(differences):.1g} at most."
    return f"{wrapped(said)}\n\n{text}"


def _place(item: tuple[str, Record]) -> tuple[int, int]:
    """Where a row stands, whenever it was measured; others keep their order."""
    key, row = item
    starts = [*CASES, *GROWING]
    name = key.split(",")[0].split("/")[0]
    place = starts.index(name) if name in starts else len(starts)
    return place, row.get("at", 0)


_PICTURE = "a training step against pixels, width, batch and devices"
_COMPARED = {
    "forward": "Difference between ours and PyTorch's logits",
    "train": "Difference between the losses of the first step",
    "predict": "Part of the pixels with another label than PyTorch's",
}


# --- The page ------------------------------------------------------------------------


def write(page: Path = PAGE, folder: Path = HERE) -> None:
    """Puts all tables into the page, each between its two marks.

    Raises:
        InputError: A mark is not there.
    """
    text = page.read_text(encoding="utf-8")
    results = [read(path) for path in files(folder)]
    for name in TABLES:
        found = [table(name, rows[name]) for rows in results if rows.get(name)]
        if not found:
            continue
        if name == "growth":
            found.insert(0, f"![{_PICTURE}](performance.png)")
        begin, end = f"<!-- table of {name} -->\n", f"<!-- end of {name} -->\n"
        before, first, rest = text.partition(begin)
        _, last, after = rest.partition(end)
        if not first or not last:
            raise InputError(
                f"{page} lacks the marks of the table of {name}: take it from the"
                " repository again."
            )
        text = f"{before}{begin}\n" + "\n\n".join(found) + f"\n\n{end}{after}"
    replace_file(page, text.encode())
