"""What names of folders and files say: images or masks, and of which split.

Names are read word by word, so that ``train_images``, ``imagesTr``, ``JPEGImages`` and
``Ground-Truth`` are all understood. Pairs of lists of names are matched here too.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


def words(name: str) -> list[str]:
    """The words of a name in lower case: ``imagesTr`` -> ``images``, ``tr``."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word for word in re.split(r"[^a-z0-9]+", parted.lower()) if word]


IMAGE = frozenset(
    words(
        "images image imgs img jpegimages input inputs x scans scan raw photo photos"
        " picture pictures frames volume volumes slices stack sat"
    )
)
MASK = frozenset(
    words(
        "masks mask labels label annotations annotation annot annots segmentationclass"
        " segmentation segmentations seg segs gt groundtruth truth y target targets"
        " manual labelled lbl"
    )
)
SPLITS = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
# Of other numbers there is one for each fold or example: train1, train2.
YEAR = re.compile(r"(19|20)\d\d$")


class Role(NamedTuple):
    """What a name says.

    ``what``: ``image``, ``mask`` or "".
    ``split``: ``train``, ``val``, ``test`` or "".
    ``exact``: whether it says nothing else.
    """

    what: str
    split: str
    exact: bool


def split_of(word: str) -> str:
    """The split that a word names, also with a year: ``val2017`` -> ``val``; or ""."""
    return SPLITS.get(YEAR.sub("", word.lower()), "")


def role(name: str) -> Role:
    """What the name of a folder, or a file's stem, says of what is in it."""
    found = words(name)
    split = next((split_of(word) for word in found if split_of(word)), "")
    rest = [word for word in found if not split_of(word)]
    joined = "".join(rest)
    for what, known in (("mask", MASK), ("image", IMAGE)):
        if joined in known:
            return Role(what, split, True)
    for what, known in (("mask", MASK), ("image", IMAGE)):
        # Of one letter it must be all: "image_x" says nothing of x.
        if any(word in known and len(word) > 1 for word in rest):
            return Role(what, split, False)
    return Role("", split, not rest)


class Match(NamedTuple):
    """Two lists of stems whose names belong together.

    ``image``, ``mask``: globs of which the wildcard stands for the same text.
    ``pairs``: how many names have a partner.
    """

    image: str
    mask: str
    pairs: int


def match(images: Sequence[str], masks: Sequence[str]) -> Match | None:
    """The globs by which stems of images and of masks pair up.

    Args:
        images, masks: file names without their endings.

    Returns:
        The match with most pairs, of equally many the plainest; None if there is none.
    """
    found = [_match(images, masks, "", "", "", "")]
    asked, votes = sorted(set(images)), Counter[tuple[str, str]]()
    for stem in asked[:: max(len(asked) // 20, 1)]:
        for other in masks:
            before, here, after = other.partition(stem)
            if here and not re.search(r"\d$", before) and not re.match(r"\d", after):
                votes[before, after] += 1
    for (before, after), _ in votes.most_common(3):
        found.append(_match(images, masks, "", "", before, after))
    if images and masks:
        found.append(_match(images, masks, *_affixes(images), *_affixes(masks)))
    # max keeps the first of equals, which are in the order of plainness.
    best = max(found, key=lambda m: m.pairs)
    return best if best.pairs else None


def _match(
    images: Sequence[str], masks: Sequence[str], a: str, b: str, c: str, d: str
) -> Match:
    """The match of ``a*b`` with ``c*d``."""
    mine, theirs = _inner(images, a, b), _inner(masks, c, d)
    return Match(
        f"{_plain(a)}*{_plain(b)}", f"{_plain(c)}*{_plain(d)}", len(mine & theirs)
    )


def _inner(stems: Sequence[str], before: str, after: str) -> set[str]:
    cut = len(before) + len(after)
    return {
        stem[len(before) : len(stem) - len(after)]
        for stem in stems
        if stem.startswith(before) and stem.endswith(after) and len(stem) > cut
    }


def _affixes(stems: Sequence[str]) -> tuple[str, str]:
    """What all begin and end with; digits are numbers, and stay whole."""
    first = _beginning(stems)
    last = _beginning([stem[::-1] for stem in stems])[::-1]
    first = re.sub(r"\d+$", "", first)
    last = re.sub(r"^\d+", "", last)
    if len(first) + len(last) >= min(map(len, stems)):
        last = ""
    return first, last


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with: what the first and the last in order do."""
    low, high = min(texts), max(texts)
    same = 0
    while same < min(len(low), len(high)) and low[same] == high[same]:
        same += 1
    return low[:same]


def _plain(text: str) -> str:
    """A text as a glob means it."""
    return re.sub(r"([*?\[])", r"[\1]", text)
