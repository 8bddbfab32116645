"""Bad inputs of every format and command, none of which may end in a traceback.

    python -m benchmarks.reliability.bad_inputs [--only=TEXT] [--out=FILE.json]

Prints for each kind how many were tried, how many ended in one sentence that says what
is wrong and where, and how many did not; then every one of these with its output.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.reliability import bad_commands, bad_configs, bad_images, bad_sets
from benchmarks.reliability.case import Case, Outcome, run_case

__all__ = ["CASES", "Case", "Outcome", "run_case"]

CASES: list[Case] = [
    *bad_images.CASES,
    *bad_sets.CASES,
    *bad_configs.CASES,
    *bad_commands.CASES,
]
ENDINGS = ("clear", "unclear", "traceback", "accepted", "hang")


def main() -> int:
    """Runs it from the command line; the status is 1 where anything is not clear."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases with this in kind: name")
    parser.add_argument("--out", type=Path, help="write what came of each as JSON")
    asked = parser.parse_args()
    found: dict[str, Outcome] = {}
    kinds: dict[str, Counter[str]] = {}
    for case in CASES:
        title = f"{case.kind}: {case.name}"
        if asked.only not in title:
            continue
        with tempfile.TemporaryDirectory(prefix="unet-jax-case-") as folder:
            found[title] = run_case(case, Path(folder))
        kinds.setdefault(case.kind, Counter())[found[title].ending] += 1
    print(f"{'':24}{'tried':>10}" + "".join(f"{ending:>11}" for ending in ENDINGS))
    kinds["all"] = sum(kinds.values(), Counter())
    for kind, counts in kinds.items():
        row = "".join(f"{counts[ending]:11}" for ending in ENDINGS)
        print(f"{kind:24}{counts.total():10}{row}")
    bad = {k: outcome for k, outcome in found.items() if outcome.ending != "clear"}
    for title, outcome in bad.items():
        print(f"\n--- {title}: {outcome.ending}\n{outcome.text.strip()}")
    if asked.out is not None:
        rows = {title: outcome._asdict() for title, outcome in found.items()}
        asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    if any(outcome.ending == "hang" for outcome in bad.values()):
        sys.stdout.flush()
        os._exit(1)  # a thread that hangs is waited for
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
