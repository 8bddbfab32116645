"""Bad inputs of every format and command end in one sentence, and none in a traceback.

A few compile a step, most end before; the cases are those of
``python -m benchmarks.reliability.bad_inputs``.
"""

import os
from pathlib import Path

import pytest

from benchmarks.reliability.bad_inputs import CASES, run_case
from benchmarks.reliability.case import Case, run


def _title(case):
    return f"{case.kind}: {case.name}"


def test_there_are_enough_and_each_has_its_name():
    titles = [_title(case) for case in CASES]
    assert len(set(titles)) == len(titles) > 400


@pytest.mark.parametrize("case", CASES, ids=_title)
def test_one_sentence(case, tmp_path):
    outcome = run_case(case, tmp_path)
    assert outcome.ending == "clear", outcome.text


# --- Whether the cases would notice ---------------------------------------------------


def _ends(monkeypatch, tmp_path, ending, says="the culprit", **options):
    """What a command that ends so is counted as."""
    monkeypatch.setattr("unet_jax.cli.main", ending)
    case = Case("a kind", "a name", lambda folder: ["unet-jax"], says, **options)
    return run_case(case, tmp_path).ending


def _saying(text, status=2):
    def main(argv):
        import sys

        print(text, file=sys.stderr)
        return status

    return main


def test_outcomes(monkeypatch, tmp_path):
    def ending(*given, **options):
        return _ends(monkeypatch, tmp_path, *given, **options)

    def raises(argv):
        raise KeyError("steps")

    assert ending(_saying("unet-jax: error: it is the culprit.")) == "clear"
    assert ending(_saying("usage: x\nunet-jax a: error: the culprit")) == "clear"
    assert ending(_saying("unet-jax: error: something.")) == "unclear"
    assert ending(_saying("note\nunet-jax: error: it is the culprit.")) == "unclear"
    assert ending(_saying("unet-jax: error: it is the culprit.", 1)) == "unclear"
    assert ending(_saying("", 0)) == "accepted"
    assert ending(raises) == "traceback"
    assert ending(_saying("Traceback (most recent call last)")) == "traceback"
    good = _saying("unet-jax: error: it is the culprit.")
    assert ending(good, harm=lambda folder: True) == "accepted"
    assert ending(lambda argv: print("the culprit") or 0, works=True) == "clear"
    assert ending(lambda argv: 0, works=True) == "unclear"
    assert ending(_saying("the culprit", 0), works=True) == "unclear"


def test_a_hang_ends(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.reliability.case.SECONDS", 0.2)
    os.mkfifo(tmp_path / "pipe")

    def waits(argv):
        try:
            return len(Path("pipe").read_bytes())
        except Exception:
            return 2

    assert _ends(monkeypatch, tmp_path, waits) == "hang"


def test_a_run_leaves_the_process_as_it_was(monkeypatch, tmp_path):
    import signal
    import sys

    before = os.getcwd(), list(sys.argv), signal.getsignal(signal.SIGALRM)
    out, error, status, trace = run("train.py", ["--nonsense"], tmp_path)
    assert (status, out, trace) == (2, "", "") and "nonsense" in error
    assert (os.getcwd(), sys.argv, signal.getsignal(signal.SIGALRM)) == before
