"""What is odd about a data set: each finding a sentence, with names and a remedy."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from unet_jax.data import FILES
from unet_jax.inspection.examples import Look
from unet_jax.inspection.layout import Layout
from unet_jax.inspection.listing import Listing
from unet_jax.inspection.masks import MaskLook
from unet_jax.inspection.settings import shares
from unet_jax.inspection.values import Kind
from unet_jax.types import size_text

Level = Literal["error", "warning", "note"]
FEW = 3  # names in a sentence


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence about some examples.

    ``level``: ``error`` stops a training or spoils it, ``warning`` may, ``note`` is to
        be known.
    ``names``: of the examples, as their source calls them; all of them.
    """

    level: Level
    text: str
    names: tuple[str, ...] = ()


def of_files(listing: Listing) -> list[Finding]:
    """Files without a partner."""
    found = []
    if listing.bare:
        found.append(
            Finding(
                "warning",
                f"{_count(listing.bare, 'image has', 'images have')} no mask"
                f" ({_some(listing.bare)}): add the masks, or take the images away;"
                " with data.on_error=skip they are left out.",
                listing.bare,
            )
        )
    if listing.spare:
        found.append(
            Finding(
                "note",
                f"{_count(listing.spare, 'mask has', 'masks have')} no image"
                f" ({_some(listing.spare)}): add the images if they were to be used.",
            )
        )
    if listing.twice:
        found.append(
            Finding(
                "error",
                f"{_count(listing.twice, 'name is', 'names are')} there twice but for"
                f" endings or folders ({_some(listing.twice)}): keep one file of each,"
                " for nothing says which is meant.",
            )
        )
    return found


def of_masks(looks: Sequence[MaskLook], kind: Kind) -> list[Finding]:
    """What the mask files, as they are stored, say."""
    found = []
    broken = [look for look in looks if look.error]
    found += [Finding("error", look.error, (look.name,)) for look in broken[:8]]
    if len(broken) > 8:
        names = [look.name for look in broken[8:]]
        found.append(_named("error", names, "More unreadable files", "mend them"))
    alpha = [look.name for look in looks if look.alpha]
    if kind.problem and len(alpha) < len(looks):
        found.append(Finding("error", kind.problem))
    if kind.guess:
        found.append(Finding("note", kind.guess))
    read = [look for look in looks if not look.error]
    sizes = [look for look in read if look.size != look.image_size]
    turned = [k for k in sizes if sorted(k.size) == sorted(k.image_size)]
    for group, what, remedy in (
        (turned, "turned on its side", "transpose it"),
        (
            [k for k in sizes if k not in turned],
            "of another size",
            "give both one size",
        ),
    ):
        if group:
            one = group[0]
            found.append(
                Finding(
                    "error",
                    f"The mask of {_some([k.name for k in group])} is {what}:"
                    f" {size_text(one.size)} for an image of"
                    f" {size_text(one.image_size)} ({len(group)} in all): {remedy}, or"
                    " leave the pair out.",
                    tuple(k.name for k in group),
                )
            )
    copies = [look.name for look in read if look.copy]
    if copies:
        what = "A mask that is the image itself"
        found.append(_named("error", copies, what, "find the real masks"))
    if alpha:
        what = "A mask of one colour, drawn in its transparency, which is not read,"
        found.append(_named("error", alpha, what, "save that channel as grey"))
    lossy = [look.name for look in read if look.lossy]
    if lossy and not kind.problem:
        what = "A JPEG mask, whose borders are uncertain by some pixels,"
        found.append(_named("warning", lossy, what, "save masks as PNG"))
    mixed = {look.coloured for look in read}
    if len(mixed) > 1:
        grey = [look.name for look in read if not look.coloured]
        what = "A grey mask, where others are coloured,"
        found.append(_named("note", grey, what, "check that grey means the same there"))
    return found


def of_examples(
    looks: Sequence[Look],
    label_names: Sequence[str],
    *,
    planes: bool,
    known: Iterable[str] = (),
) -> list[Finding]:
    """What the examples, as a run gets them, say.

    Args:
        looks: at all of them.
        label_names: of their classes or labels.
        planes: whether the labels overlap.
        known: names of examples whose fault is told already.
    """
    known = set(known)
    broken = [k for k in looks if k.error and k.name not in known]
    found = [Finding("error", k.error, (k.name,)) for k in broken[:8]]
    if len(broken) > 8:
        names = [k.name for k in broken[8:]]
        found.append(_named("error", names, "More unreadable files", "mend them"))
    read = [k for k in looks if not k.error]
    found += _twins(read)
    found += _pixels(read)
    found += _labels(read, label_names, planes)
    return found


def _twins(looks: Sequence[Look]) -> list[Finding]:
    groups: dict[bytes, list[Look]] = defaultdict(list)
    for look in looks:
        # Empty pages of a volume are alike, and told of as such.
        if look.low != look.high:
            groups[look.digest].append(look)
    twins = [g for g in groups.values() if len(g) > 1]
    across = [g for g in twins if len({k.part for k in g}) > 1]
    # The same file is in both parts where a split is given twice, and means that.
    across = [g for g in across if len({k.name for k in g}) > 1]
    within = [g for g in twins if len({k.part for k in g}) == 1]
    found = []
    for some, what in (
        (
            across,
            "in the training and in the evaluation part, whose figures will flatter:"
            " keep each on one side",
        ),
        (within, "more than once: keep one of each"),
    ):
        if some:
            pairs = "; ".join(f"{g[0].name} = {g[1].name}" for g in some[:FEW])
            names = tuple(k.name for g in some for k in g)
            number = "1 image is" if len(some) == 1 else f"{len(some)} images are"
            level: Level = "error" if some is across else "warning"
            found.append(Finding(level, f"{number} there {what} ({pairs}).", names))
    return found


def _pixels(looks: Sequence[Look]) -> list[Finding]:
    found = []
    flat = [k.name for k in looks if k.low == k.high]
    if flat:
        what = "An image of one colour"
        found.append(_named("warning", flat, what, "check the files"))
    types = Counter(k.dtype for k in looks)
    if len(types) > 1:
        few = [k.name for k in looks if k.dtype != types.most_common(1)[0][0]]
        text = ", ".join(f"{n} {name}" for name, n in types.most_common())
        what = f"Another type than most ({text}), which a run refuses,"
        found.append(_named("error", few, what, "convert them to one type"))
    channels = Counter(len(k.low) for k in looks)
    if len(channels) > 1:
        few = [k.name for k in looks if len(k.low) != channels.most_common(1)[0][0]]
        text = ", ".join(f"{n} with {c}" for c, n in channels.most_common())
        what = f"Another number of channels than most ({text})"
        remedy = "the option channels, 1 or 3, makes them one"
        found.append(_named("warning", few, what, remedy))
    deep = [k for k in looks if k.dtype == "uint16"]
    top = max((max(k.high) for k in deep), default=0)
    if deep and 0 < top < 2**15:
        bits = int(top).bit_length()
        found.append(
            Finding(
                "note",
                f"The 16-bit images use {bits} bits (values up to {int(top)}):"
                " normalisation=standard is set, for with range they would be nearly"
                " black.",
            )
        )
    if looks and all(k.grey for k in looks):
        found.append(
            Finding(
                "note",
                "All images are grey, kept as three equal channels: channels=1 saves"
                " time and memory.",
            )
        )
    return found


def _labels(
    looks: Sequence[Look], label_names: Sequence[str], planes: bool
) -> list[Finding]:
    found: list[Finding] = []
    if not looks:
        return found
    share = np.array([_share(k, planes) for k in looks])
    empty = [k.name for k, s in zip(looks, share, strict=True) if s == 0]
    if empty and len(empty) < len(looks):
        what = "A mask with nothing but background"
        remedy = "keep it if there is nothing to be found"
        found.append(_named("note", empty, what, remedy))
    if empty and len(empty) == len(looks):
        found.append(
            Finding(
                "error",
                "No mask has any foreground: check that these are the masks and that"
                " the option mask fits them.",
            )
        )
    if len(looks) >= 3 and not planes and len(label_names) == 2:
        found += _inverted(looks, share)
    white = shares(looks)[1:]
    if tuple(label_names) == ("background", "foreground") and white[0] > 0.5:
        found.append(
            Finding(
                "note",
                f"White is the larger part of the masks ({white[0]:.0%}) and is called"
                " foreground: name both classes in label_names as they are, black"
                " first.",
            )
        )
    if len(looks) >= 2:
        found_of = zip(label_names, shares(looks), strict=False)
        absent = [name for name, share in found_of if not share]
        if absent and len(absent) < len(label_names) and len(empty) < len(looks):
            found.append(
                Finding(
                    "warning",
                    f"No mask has a pixel of {', '.join(absent)}: leave that out of the"
                    " classes, or look for the masks that have it.",
                )
            )
    return found


def _inverted(looks: Sequence[Look], share: np.ndarray) -> list[Finding]:
    """Masks of which black and white seem to be exchanged."""
    middle = float(np.median(share))
    edges = np.array([k.border for k in looks])
    edge = float(np.median(edges))
    names = [
        k.name
        for k, s, e in zip(looks, share, edges, strict=True)
        if abs(s - (1 - middle)) < abs(s - middle)
        and abs(middle - 0.5) > 0.1
        and abs(e - (1 - edge)) < abs(e - edge)
        and abs(e - edge) > 0.5
    ]
    if not names or len(names) * 3 > len(looks):
        return []
    what = (
        "Black and white exchanged, as it seems (foreground like the others'"
        f" background, {1 - middle:.0%} in the middle),"
    )
    return [_named("warning", names, what, "invert the mask if the picture shows it")]


def of_layout(
    layout: Layout, said: Sequence[str], errors: Sequence[str]
) -> list[Finding]:
    """What was to be said of the folder, and what its source said at opening."""
    return [
        *(Finding("note", text) for text in layout.notes),
        *(Finding("error", text) for text in errors),
        *(Finding("note", _sentence(text)) for text in said),
    ]


def of_limit(layout: Layout, looked: int, total: int) -> list[Finding]:
    """What is not known where there was a limit on what is looked at."""
    if looked >= total or layout.source not in FILES:
        return []
    left = total - looked
    some = "1 example was" if left == 1 else f"{left} examples were"
    return [
        Finding(
            "note",
            f"{some} not looked at: a file at fault among them will still stop a run,"
            " unless data.on_error=skip counts it out.",
        )
    ]


def _share(look: Look, planes: bool) -> float:
    counted = look.pixels - look.void
    if planes:
        return max(look.counts, default=0) / max(look.pixels, 1)
    return 1 - look.counts[0] / max(counted, 1) if counted else 0.0


def _named(level: Level, names: Sequence[str], what: str, remedy: str) -> Finding:
    """``What in 4 examples (a.png, b.png, c.png and 1 more): remedy.``"""
    count = f"{len(names)} example{'s' * (len(names) > 1)}"
    text = f"{what} in {count} ({_some(names)}): {remedy}."
    return Finding(level, text, tuple(names))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def _count(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith(".") else text + "."
