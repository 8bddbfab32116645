"""What a config may hold: keys and kinds, by the annotations of those who read them."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.default import get_config
from train import chosen
from unet_jax import options
from unet_jax.types import InputError


def changed(**changes):
    """The default config with other values, of any kind."""
    config = chosen(get_config())
    for key, value in changes.items():
        place = config
        *sections, last = key.split("__")
        for section in sections:
            place = place[section]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return config


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -3, np.int64(2)], [1.0, True, "1", None]),
        (float, [0, 0.5, math.inf, np.float32(1)], [math.nan, True, "1", (1.0,)]),
        (bool, [True, False], [0, 1, "True"]),
        (str, ["", "a"], [1, b"a", None]),
        (float | None, [None, 1.0], ["a"]),
        (Literal["a", "b"], ["a", "c"], [1]),
        (Sequence[str], [(), ("a",), ["a"]], ["a", (1,), {"a": "b"}]),
        (tuple[int, ...], [(), (1, 2), [1]], [(1.5,), 1]),
        (tuple[str, float], [("a", 1)], [("a",), (1, "a"), "ab"]),
        (Sequence[Sequence[int]], [((1, 2), (3,))], [(1, 2), ("ab",)]),
        (Mapping[str, float], [{"a": 1}], [{"a": "b"}, ("a", 1)]),
        (float | Sequence[float], [1.0, (1.0, 2.0)], ["a", (None,)]),
    ],
)
def test_fits(kind, good, bad):
    assert all(options.fits(value, kind) for value in good)
    assert not any(options.fits(value, kind) for value in bad)
    assert options.words(kind)


def test_words():
    said = options.words(Mapping[str, float] | Sequence[tuple[str, float]])
    assert said == "a mapping or a tuple of tuples of a text and a number"
    assert options.words(tuple[int, ...]) == "a tuple of whole numbers"
    assert options.words(Literal["a"]) == "a text"
    assert options.words(float | None) == "a number or None"


def test_the_default_config_fits_and_names_every_key():
    options.check(chosen(get_config()))
    config: ConfigDict = get_config()
    for name, section in (
        ("train", options.Train),
        ("plateau", options.Plateau),
        ("mesh", options.Mesh),
        ("members", options.Members),
    ):
        assert set(config[name]) == set(section.__annotations__)
    assert set(config) == set(options.Config.__annotations__)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trian": {}}, "trian, which is no key: use one of augment, data"),
        ({"train__stpes": 3}, r"train\.stpes, which is no key: use one of accumulate"),
        ({"loss": ...}, "loss is missing, or None: give a mapping, or begin from"),
        ({"loss": 3}, "loss = 3 must be a mapping"),
        ({"train__crop": ...}, r"train\.crop is missing, or None: give a tuple of who"),
        ({"train__crop": (1.5, 2)}, r"train\.crop = \(1\.5, 2\) must be a tuple of wh"),
        ({"train__ema": math.nan}, r"train\.ema = nan must be a number"),
        ({"loss__dice": "much"}, r"loss\.dice = 'much' must be a number"),
        ({"loss__lovasz": 1.0}, r"loss\.lovasz, which is no key"),
        ({"optim__betas": 0.9}, r"optim\.betas = 0\.9 must be a tuple of numbers"),
        ({"augment__flip": "yes"}, r"augment\.flip = 'yes' must be True or False"),
        ({"data__source": ...}, r"data\.source is missing"),
        ({"data__source": "foldr"}, "'foldr' is not known"),
        ({"data__share": (0, 1)}, r"data\.share, which is no key"),
        ({"data__cells__size": "big"}, r"data\.cells\.size = 'big' must be a tuple"),
        ({"data__cells__root": "a"}, r"data\.cells\.root, which is no key"),
        ({"data__cells": 3}, r"data\.cells = 3 must be a mapping"),
        ({"data__border": {"w1": 3.0}}, r"data\.border\.w1, which is no key"),
        ({"data__source": "tfds", "data__tfds": {}}, r"data\.tfds\.name is missing"),
        ({"model__name": ...}, r"model\.name is missing"),
    ],
)
def test_what_a_config_cannot_hold(changes, says):
    with pytest.raises(InputError, match=says):
        options.check(changed(**changes))


def test_of_a_part_only_what_is_there_is_looked_at():
    options.check(changed(mesh=..., train__log_every=...), whole=False)
    with pytest.raises(InputError, match=r"train\.steps = 0\.5"):
        options.check(changed(mesh=..., train__steps=0.5), whole=False)


def test_options_of_other_sources_are_not_looked_at():
    options.check(changed(data__folder={"colour": 3}))
