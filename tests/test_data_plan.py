"""The order of the data is a pure function of (seed, step), and splits are exact."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_jax.data.plan import plan
from unet_jax.data.split import parse, take
from unet_jax.types import InputError


def _stream(steps, *, seed=3, examples=7, batch_size=4, rank=2):
    options = {"examples": examples, "batch_size": batch_size, "rank": rank}
    index, offset = zip(*(plan(seed, s, **options) for s in steps), strict=True)
    return np.concatenate(index), np.concatenate(offset)


@settings(max_examples=30, deadline=None)
@given(st.integers(-3, 2**70), st.integers(1, 40), st.integers(1, 30))
def test_every_epoch_is_a_permutation(seed, examples, batch_size):
    steps = range(-(-3 * examples // batch_size))
    index, _ = _stream(steps, seed=seed, examples=examples, batch_size=batch_size)
    for epoch in range(3):
        part = index[epoch * examples : (epoch + 1) * examples]
        np.testing.assert_array_equal(np.sort(part), np.arange(examples))


def test_epochs_and_seeds_differ():
    index, offset = _stream(range(20), examples=20)
    assert not np.array_equal(index[:20], index[20:40])
    other, other_offset = _stream(range(20), examples=20, seed=4)
    assert not np.array_equal(index, other)
    assert not np.intersect1d(offset, other_offset).size


def test_any_order_of_calls_gives_the_same():
    whole = _stream(range(12))
    for some, all_of_it in zip(_stream(range(5, 12)), whole, strict=True):
        np.testing.assert_array_equal(some, all_of_it[20:])
    for some, all_of_it in zip(_stream([11, 0]), whole, strict=True):
        np.testing.assert_array_equal(
            some, np.concatenate([all_of_it[44:], all_of_it[:4]])
        )


def test_the_batch_size_cuts_one_endless_list():
    for small, large in zip(
        _stream(range(12), batch_size=2), _stream(range(4), batch_size=6), strict=True
    ):
        np.testing.assert_array_equal(small, large)


def test_values_never_change():
    # Pinned: another order would break the resuming of every run there is.
    index, offset = plan(0, 5, examples=10, batch_size=4, rank=2)
    assert index.tolist() == [6, 7, 2, 9]
    assert offset[0].tolist() == [0.9946838201645206, 0.779244256593799]


def test_offsets_are_uniform():
    _, offset = _stream(range(100), examples=1000, batch_size=100, rank=3)
    assert offset.shape == (10000, 3)
    assert offset.dtype == np.float64
    assert offset.min() >= 0
    assert offset.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in offset.T])
    assert np.abs(counts - 500).max() < 120
    assert np.abs(np.corrcoef(offset.T) - np.eye(3)).max() < 0.05


@pytest.mark.parametrize(
    "wrong", [{"examples": 0}, {"batch_size": 0}, {"rank": 5}, {"rank": 0}]
)
def test_plan_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        plan(0, 0, **{"examples": 1, "batch_size": 1, "rank": 2, **wrong})


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("train", 10, (0, 10)),
        ("val-2", 1, (0, 1)),
        ("train[:80%]", 10, (0, 8)),
        ("train[80%:]", 10, (8, 10)),
        ("train[-20%:]", 10, (8, 10)),
        ("train[20:30]", 30, (20, 30)),
        ("train[:-3]", 30, (0, 27)),
        ("train[-3:]", 30, (27, 30)),
        ("train[:]", 30, (0, 30)),
        ("train[50%:20]", 30, (15, 20)),
        (" train[100%:100%]", 0, None),
    ],
)
def test_split(split, count, expected):
    name, select = parse(split)
    assert name == split.strip().partition("[")[0]
    if expected:
        assert select(count) == slice(*expected)
    else:
        with pytest.raises(InputError, match="is empty"):
            select(count)


def test_neighbouring_parts_meet():
    for count, percent in itertools.product(range(1, 60), range(101)):
        below, above, negative = (
            parse(f"a[{part}]")[1]
            for part in (f":{percent}%", f"{percent}%:", f"-{100 - percent}%:")
        )
        cut = (percent * count + 50) // 100
        if cut > 0:
            assert below(count) == slice(0, cut)
        if cut < count:
            assert above(count) == slice(cut, count)
            assert negative(count) == above(count)


@pytest.mark.parametrize(
    ("split", "count", "expected"),
    [
        ("all[fold 1/5]", 10, [0, 1]),
        ("all[fold 2/5]", 10, [2, 3]),
        ("all[ fold  5 / 5 ]", 10, [8, 9]),
        ("all[fold 2/3]", 8, [3, 4]),  # cuts at 2.67 and 5.33
        ("all[fold 1/2]", 5, [0, 1, 2]),  # 2.5 is rounded up, as 50% is
        ("all[not fold 1/5]", 5, [1, 2, 3, 4]),
        ("01[not fold 2/3]", 6, [0, 1, 4, 5]),
        ("all[fold 2/5]", 1, None),
        ("all[not fold 1/2]", 1, None),
    ],
)
def test_fold(split, count, expected):
    name, select = parse(split)
    assert name == split.partition("[")[0]
    if expected is None:
        with pytest.raises(InputError, match="is empty"):
            select(count)
        return
    assert list(take(range(count), select(count))) == expected
    letters = [chr(97 + i) for i in range(count)]
    assert take(letters, select(count)) == [letters[i] for i in expected]


def test_folds_are_the_whole_list():
    for count, folds in itertools.product(range(1, 40), range(2, 9)):
        items, seen = range(count), []
        for k in range(1, folds + 1):
            begin, end = (
                (2 * edge * count + folds) // (2 * folds) for edge in (k - 1, k)
            )
            if begin == end:
                continue
            fold = list(take(items, parse(f"a[fold {k}/{folds}]")[1](count)))
            assert fold == list(range(begin, end))
            seen += fold
            if len(fold) < count:
                rest = take(items, parse(f"a[not fold {k}/{folds}]")[1](count))
                assert sorted([*fold, *rest]) == list(items)
        assert seen == list(items)
        # A half is half, and a tenth a tenth, however it is written.
        assert parse("a[fold 1/2]")[1](count) == parse("a[:50%]")[1](count)


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "1/0"])
def test_fold_that_there_is_not(fold):
    with pytest.raises(InputError, match=rf"'all\[not fold {fold}\]' names fold"):
        parse(f"all[not fold {fold}]")


@pytest.mark.parametrize(
    "split",
    [
        "",
        "train[",
        "train[3]",
        "train[::2]",
        "train[a:b]",
        "a+b",
        "a[:1.5%]",
        "a[fold 2]",
        "a[notfold 1/2]",
    ],
)
def test_unreadable_split(split):
    with pytest.raises(InputError, match=r"cannot be read: .*train\[:80%\]"):
        parse(split)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:20]", "outside the 10 examples of 'train'"),
        ("train[-11:]", "outside"),
        ("train[5:5]", "empty"),
        ("train[7:3]", "empty"),
        ("train[:1%]", "empty"),
    ],
)
def test_split_that_does_not_fit(split, message):
    with pytest.raises(InputError, match=message):
        parse(split)[1](10)


@pytest.mark.parametrize("split", ["train[:2]", "train[:1%]"])
def test_of_one_example_it_says_so(split):
    with pytest.raises(InputError, match="the 1 example of 'train'"):
        parse(split)[1](1)


def test_percentage_over_100():
    with pytest.raises(InputError, match="120%"):
        parse("train[:120%]")
