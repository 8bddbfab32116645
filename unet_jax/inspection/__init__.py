"""What a data set is, before anything is trained on it: ``unet-jax inspect``.

`inspect` finds the layout of a folder, looks at every file, says what is odd, and which
lines of a config the data asks for. In this order::

    layouts (words, globs, templates, folders) -> listing -> masks, values -> examples
    -> findings -> settings, sheet, report
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unet_jax.data.source import overlapping
from unet_jax.inspection import examples, findings, listing, masks, settings, values
from unet_jax.inspection.examples import Look, Opened
from unet_jax.inspection.findings import Finding
from unet_jax.inspection.layout import Layout
from unet_jax.inspection.listing import Listing
from unet_jax.inspection.masks import MaskLook
from unet_jax.inspection.values import Histogram, Kind

LIMIT = 2000

Progress = Callable[[str, int], Callable[[], None]]
"""(what is looked at, how many) -> what is called after each"""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that was found.

    ``layout``: with the options that the masks ask for.
    ``listing``: the files; None of sources whose files do not stand for themselves.
    ``masks``, ``histogram``, ``kind``: of the mask files as stored; empty or None
        without a listing.
    ``opened``: the sources; ``examples``: a look at each of their examples.
    ``label_names``: of the classes or labels.
    ``planes``: whether labels overlap.
    ``findings``: the worst first.
    ``lines``: dotted keys of a config, and their values.
    ``total``: pairs that there are; of more than the limit a spread was looked at.
    """

    layout: Layout
    listing: Listing | None
    masks: tuple[MaskLook, ...]
    histogram: Histogram | None
    kind: Kind | None
    opened: Opened
    examples: tuple[Look, ...]
    label_names: tuple[str, ...]
    planes: bool
    findings: tuple[Finding, ...]
    lines: dict[str, Any]
    total: int

    @property
    def usable(self) -> bool:
        """Whether a training can begin, and learn: with the lines, as they are."""
        read = [look for look in self.examples if not look.error]
        alike = len({(look.dtype, len(look.size)) for look in read}) == 1
        whole = {look.part for look in read} == set(examples.PARTS)
        clear = self.kind is None or not self.kind.problem
        first = 0 if self.planes else 1  # label, or class that is no background
        shown = any(any(look.counts[first:]) for look in read)
        return alike and whole and clear and shown and not self.opened.errors


def inspect(
    layout: Layout,
    *,
    limit: int = LIMIT,
    links: bool = False,
    progress: Progress = lambda what, count: lambda: None,
) -> Inspection:
    """Looks at a data set.

    Args:
        layout: of `layouts.find`, or made of a config.
        limit: of more pairs or examples than this an even spread is looked at, 1 or
            more.
        links: whether files may be links that lead out of the root.
        progress: is told what is looked at, and how many there are.

    Raises:
        InputError: a link that leads out of the root.
    """
    files = listing.files_of(layout, links=links)
    found: list[Finding] = []
    seen: list[MaskLook] = []
    histogram = kind = None
    if files is not None:
        found += findings.of_files(files)
        some = _spread(files.pairs, limit)
        done = progress("masks", len(some))
        seen = masks.look(
            some,
            volumes=layout.source == "volumes",
            objects=layout.options.get("mask") == "objects",
            done=done,
        )
        histogram = masks.pooled(seen)
        kind = _kind(layout, histogram, seen)
        found += findings.of_masks(seen, kind)
    # Which options the masks ask for is known now, of the images only afterwards.
    layout = settings.chosen(layout, kind, ())
    opened = examples.open_parts(layout, links=links)
    count = sum(map(len, opened.sources.values()))
    done = progress("examples", min(count, limit))
    looks = examples.look(opened, limit=limit, done=done)
    layout = settings.chosen(layout, kind, looks)
    names, planes = _names(opened)
    # Of files, what the source left out at opening has been told one by one.
    said = [t for t in opened.said if files is None or "left out" not in t]
    errors = () if kind is not None and kind.problem else opened.errors
    found += findings.of_layout(layout, said, errors)
    faulty = {look.name for look in seen if look.error or look.size != look.image_size}
    told = faulty | {look.name for look in seen if look.alpha}
    found += findings.of_examples(looks, names, planes=planes, known=told)
    total = max(count, len(files.pairs) if files else 0)
    found += findings.of_limit(layout, max(len(looks), len(seen)), total)
    lone = files is not None and (files.bare or files.twice)
    bad = bool(faulty or lone or any(look.error for look in looks))
    trained = len(opened.sources.get("train", ()))
    lines = settings.lines(layout, looks, trained=trained, planes=planes, faulty=bad)
    order = {"error": 0, "warning": 1, "note": 2}
    return Inspection(
        layout,
        files,
        tuple(seen),
        histogram,
        kind,
        opened,
        tuple(looks),
        names,
        planes,
        tuple(sorted(found, key=lambda f: order[f.level])),
        lines,
        total,
    )


def _spread(pairs: Sequence[listing.Pair], limit: int) -> list[listing.Pair]:
    if len(pairs) <= limit:
        return list(pairs)
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, max(limit, 1)).astype(int)]


def _kind(layout: Layout, histogram: Histogram, seen: Sequence[MaskLook]) -> Kind:
    """What the masks are; of some the layout says it, or their number of channels."""
    mask = layout.options.get("mask")
    if mask == "objects":
        count = sum(look.masks for look in seen)
        return Kind(
            "one file an object",
            f"{count} mask files for {len(seen)} images",
            label_names=("background", "foreground"),
        )
    if "label_masks" in layout.options:
        names = ", ".join(dict(layout.options["label_masks"]))
        return Kind("one file a label", f"the folders are {names}; they may overlap")
    channels = max((look.planes for look in seen), default=0)
    if channels and mask in (None, "planes"):
        return Kind(
            "planes",
            f"the masks have {channels} channels, a label each; they may overlap",
            {"mask": "planes"},
            tuple(f"label_{i + 1}" for i in range(channels)),
        )
    kind = values.kind_of(histogram)
    if mask not in (None, "auto"):
        told = f"mask={mask} is set; by their values they are {kind.name}: {kind.why}"
        return Kind(mask, told)
    return kind


def _names(opened: Opened) -> tuple[tuple[str, ...], bool]:
    """The longer list of names of both parts, and whether labels overlap."""
    sources = opened.sources.values()
    names = max((tuple(s.label_names) for s in sources), key=len, default=())
    return names, any(overlapping(source) for source in sources)
