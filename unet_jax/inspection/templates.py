"""One pattern for the folders of two splits: images/train, images/val are {split}'s.

The masks of all splits may lie in one place; then the images alone have the pattern.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from unet_jax.data.places import SPLIT
from unet_jax.inspection.globs import Globs
from unet_jax.inspection.words import split_of


def joined(train: Globs, others: Mapping[str, Globs | None]) -> Globs:
    """Globs with ``{split}`` for the training part and the first other that fits it.

    Args:
        train: of the training part alone.
        others: of ``val``, ``test``; None where images and masks do not pair.

    Returns:
        The globs with `Globs.splits`. Where no other has patterns that differ from the
        training part's in the name of the split and in nothing else, they are those of
        the training part, with a note if there are others.
    """
    for other in ("val", "test"):
        found = others.get(other)
        if found is None:
            continue
        mine, theirs = _word(train, "train"), _word(found, other)
        whole = _renamed(train, lambda text, word=mine: _filled(text, word))
        ours = _renamed(whole, lambda text, word=theirs: text.replace(SPLIT, word))
        if SPLIT in whole.images and _told(ours) == _told(found):
            return dataclasses.replace(whole, splits=(mine, theirs))
    if not others:
        return train
    note = (
        f"The folders of the split {' and '.join(sorted(others))} cannot be evaluated"
        " on, having no masks or other names than those of the training part but for"
        " the split's: part of that is taken."
    )
    return dataclasses.replace(train, notes=(*train.notes, note))


def _word(globs: Globs, split: str) -> str:
    """The one word that names the split in all patterns, as it is written; or ""."""
    found: set[str] = set()

    def look(text: str) -> str:
        found.update(p for p in _pieces(text) if split_of(p) == split)
        return text

    _renamed(globs, look)
    return found.pop() if len(found) == 1 else ""


def _filled(text: str, word: str) -> str:
    """A pattern with ``{split}`` for each occurrence of the word."""
    return "".join(SPLIT if piece == word else piece for piece in _pieces(text))


def _pieces(text: str) -> list[str]:
    """The words as `words.words` has them, and what is between them."""
    found = re.split(r"([^A-Za-z0-9]+)|(?<=[a-z])(?=[A-Z])", text)
    return [piece for piece in found if piece]


def _renamed(globs: Globs, change: Callable[[str], str]) -> Globs:
    """The globs with another text of each pattern."""
    more = tuple(
        (key, tuple((label, change(text)) for label, text in value))
        if key == "label_masks"
        else (key, value)
        for key, value in globs.more
    )
    return dataclasses.replace(
        globs, images=change(globs.images), masks=change(globs.masks), more=more
    )


def _told(globs: Globs) -> tuple[object, ...]:
    """What a config says of the globs."""
    return globs.images, globs.masks, globs.more
