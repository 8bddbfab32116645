"""Everything of this folder, and the page that tells of it.

    python -m benchmarks.reliability [--kills=50] [--every=2] [--lanes=2]

Writes the tables of ``docs/reliability.md``, into which no hand has typed a figure. The
inputs take some minutes, kills and faults a quarter of an hour each on two
cores; ``--only=inputs`` (or kills, faults) runs one part.
"""

import argparse
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.reliability import damage, kills
from benchmarks.reliability.bad_inputs import CASES
from benchmarks.reliability.case import run_case
from benchmarks.reliability.faults import FAULTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def inputs(folder: Path) -> dict[str, dict[str, int]]:
    """What came of the bad inputs: endings by kind."""
    found: dict[str, Counter[str]] = {}
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir(parents=True)
        outcome = run_case(case, place)
        found.setdefault(case.kind, Counter())[outcome.ending] += 1
        if outcome.ending != "clear":
            print(f"--- {case.kind}: {case.name}: {outcome.ending}\n{outcome.text}")
    return {kind: dict(counts) for kind, counts in found.items()}


def killed(folder: Path, count: int, lanes: int) -> dict[str, Any]:
    """What came of the kills."""

    def lane(number: int) -> kills.Found:
        place = folder / f"lane{number}"
        place.mkdir(parents=True)
        return kills.soak(place, -(-count // lanes), seed=number)

    with ThreadPoolExecutor(lanes) as pool:
        found = list(pool.map(lane, range(lanes)))
    names = ("kills", "unfinished", "ends", "same")
    total: dict[str, Any] = {
        name: sum(getattr(f, name) for f in found) for name in names
    }
    return {**total, "trouble": [text for f in found for text in f.trouble]}


def damaged(folder: Path, every: int) -> dict[str, Any]:
    """What came of the faults."""
    folder.mkdir(parents=True)
    found = damage.survive(folder, FAULTS[::every])
    for name, survived, text in found:
        if not survived:
            print(f"--- {name}\n{text}")
    return {"tried": len(found), "survived": sum(o.survived for o in found)}


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, of the parts that there are figures of."""
    found = {}
    if "inputs" in figures:
        rows = ["| | tried | one clear sentence | traceback | anything else |"]
        rows.append("|---|---|---|---|---|")
        total: Counter[str] = sum(map(Counter, figures["inputs"].values()), Counter())
        for kind, counts in {**figures["inputs"], "**all**": dict(total)}.items():
            some = sum(counts.values())
            clear, broken = counts.get("clear", 0), counts.get("traceback", 0)
            others = some - clear - broken
            rows.append(f"| {kind} | {some} | {clear} | {broken} | {others} |")
        found["inputs"] = "\n".join(rows)
    if "kills" in figures:
        k = figures["kills"]
        found["kills"] = (
            "| kills | of which in a save | runs finished after one kill or more | of"
            " which with the same bits |\n|---|---|---|---|\n"
            f"| {k['kills']} | {k['unfinished']} | {k['ends']} | {k['same']} |"
        )
    if "faults" in figures:
        f = figures["faults"]
        found["faults"] = (
            "| faults injected | survived with the same bits at the end |\n|---|---|\n"
            f"| {f['tried']} | {f['survived']} |"
        )
    return found


def write(figures: dict[str, Any]) -> None:
    """Puts the tables into the page, each after the line that names it."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(figures).items():
        mark = f"<!-- table of {name} -->\n"
        before, after = text.split(mark)
        text = before + mark + table + "\n\n" + after.partition("\n\n")[2]
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Runs it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--every", type=int, default=2, help="every so many-th fault")
    parser.add_argument("--lanes", type=int, default=2, help="runs side by side")
    parser.add_argument("--only", choices=("inputs", "kills", "faults"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parts = {
            "inputs": lambda: inputs(folder / "inputs"),
            "kills": lambda: killed(folder / "kills", asked.kills, asked.lanes),
            "faults": lambda: damaged(folder / "faults", asked.every),
        }
        figures = {}
        for name, measure in parts.items():
            if asked.only in (None, name):
                figures[name] = measure()
                print(name, figures[name], flush=True)
        write(figures)


if __name__ == "__main__":
    main()
