"""What a run's first examples give reason to say before it begins."""

import math
from typing import Any

from unet_jax.run import Run

RARE = 0.02  # of the pixels: a class that crops are likely to miss


def first(source: Any) -> list[Any]:
    """A few examples to judge by; of large volumes one or two.

    Args:
        source: Of examples as the task wants them.
    """
    found, size = [], 0
    for i in range(min(len(source), 16)):
        found.append(source[i])
        size += sum(array.nbytes for array in found[-1].values())
        if size > 2**28:
            break
    return found


def rare(run: Run, examples: list[Any]) -> str:
    """A sentence where a class is rare and crops may well miss it, else "".

    Args:
        run: Whose classes and crop.
        examples: Some of its training data.
    """
    train, names = run.config["train"], run.meta.label_names
    crop = math.prod(train["crop"])
    small = any(2 * crop < math.prod(e["image"].shape[:-1]) for e in examples)
    pixels = sum(float((e["weight"] > 0).sum()) for e in examples)
    shares = {}
    for i, name in enumerate(names):
        if run.meta.task == "classes" and i:
            counts = [((e["label"] == i) & (e["weight"] > 0)).sum() for e in examples]
            shares[name] = float(sum(counts)) / max(pixels, 1.0)
        elif run.meta.task == "labels":
            some = [e["label"][..., i] * (e["weight"][..., i] > 0) for e in examples]
            found = float(sum(x.sum() for x in some))
            shares[name] = found * len(names) / max(pixels, 1.0)
    if shares and not any(shares.values()):
        return (
            f"none of the first {len(examples)} examples has anything but"
            f" {names[0] if run.meta.task == 'classes' else 'background'}: look at how"
            " the masks are read with unet-jax inspect"
        )
    shares = {name: share for name, share in shares.items() if 0 < share < RARE}
    if train.get("foreground") or not small or not shares:
        return ""
    name = min(shares, key=lambda name: shares[name])
    return (
        f"{name} has {shares[name]:.2%} of the pixels, and most crops will have little"
        " of it: --config.train.foreground=0.33 lays a third of them around foreground"
    )


def many(run: Run, examples: list[Any]) -> str:
    """A sentence where decoded examples exceed the memory they may have, else "".

    Args:
        run: Whose data.
        examples: Some of its training data.
    """
    config, dataset = run.config["data"], run.dataset
    mean = sum(e["image"].nbytes + e["label"].nbytes for e in examples) / len(examples)
    total = mean * (len(dataset.train) + len(dataset.evaluation))
    budget = config.get("cache_mb", 0)
    if config["source"] == "cells" or config.get("cache_dir") or total < budget * 2**20:
        return ""
    return (
        f"decoded, the examples take about {total / 2**30:.1f} GB, more than"
        f" data.cache_mb = {budget:g}: most are decoded anew each time; data.cache_dir,"
        " a folder, would keep them on disk"
    )
