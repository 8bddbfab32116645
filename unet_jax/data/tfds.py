"""TensorFlow Datasets with an image and a mask feature, without TensorFlow.

Two things make that work: the data is prepared as array_record, which TFDS reads by
itself, and pictures are handed over undecoded, because the decoder that TFDS happens to
find decides whether a palette mask comes back as ids or as colours.
"""

import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from unet_jax.data import formats, images
from unet_jax.data import split as splits
from unet_jax.data.folder import objects
from unet_jax.data.masks import Coding, Kind
from unet_jax.types import Example, InputError, NumpyArray, Shape

# Builders of our own, by name, and the module that registers each with TFDS.
OWN = {"isbi2012": "unet_jax.data.isbi2012_tfds"}


class Tfds:
    """A source that reads a prepared TFDS data set; see `open`.

    Args:
        examples: TFDS's random-access list, pictures undecoded (bytes).
        part: which of them.
        title: what examples are called, with their number.
        image, mask: feature names.
        coding: of the masks.
        channels: as for `open`.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        part: splits.Part,
        *,
        title: str,
        image: str,
        mask: str,
        coding: Coding,
        channels: int,
    ) -> None:
        self.examples = examples
        self.numbers = splits.take(range(len(examples)), part)
        self.title, self.image, self.mask = title, image, mask
        self.coding, self.channels = coding, channels
        self._sizes: dict[int, Shape] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.coding.label_names

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int, /) -> Example:
        name, stored = self.name(i), self._stored(i)
        image = _picture(stored[self.image], name, self.channels)
        rank = self.coding.rank
        mask = _numbers(stored[self.mask], rank, f"{name}[{self.mask!r}]")
        if mask.shape[:rank] != image.shape[:rank]:
            raise InputError(
                f"{name} has an image of the size {image.shape[:rank]} and a mask of "
                f"{mask.shape[:rank]}: choose features of one size."
            )
        label, weight = self.coding.decode(mask, name)
        if weight is None:
            return {"image": image, "label": label}
        return {"image": image, "label": label, "weight": weight}

    def name(self, i: int, /) -> str:
        """``data set/split[number]``."""
        return f"{self.title}[{self.numbers[i]}]"

    def size(self, i: int, /) -> Shape:
        """The spatial shape, from the picture's header."""
        if i not in self._sizes:
            image = self._stored(i)[self.image]
            if isinstance(image, bytes):
                with formats.readable(self.name(i)):
                    self._sizes[i] = formats.pillow_size(io.BytesIO(image))
            else:
                self._sizes[i] = _picture(image, self.name(i), 0).shape[:-1]
        return self._sizes[i]

    def instances(self, i: int, /) -> NumpyArray:
        """The `objects` of a mask, ``i32[*S]``; there are with values="instances"."""
        name = f"{self.name(i)}[{self.mask!r}]"
        mask = _numbers(self._stored(i)[self.mask], self.coding.rank, name)
        return objects(mask, self.coding, name)

    def _stored(self, i: int) -> dict[str, Any]:
        return self.examples[self.numbers[i]]


def open(
    *,
    name: str,
    split: str,
    image: str = "image",
    mask: str = "segmentation_mask",
    values: Kind = "index",
    label_names: Sequence[str] = (),
    shift: int = 0,
    ignore: int = -1,
    channels: int = 0,
    data_dir: str = "",
    manual_dir: str = "",
) -> Tfds:
    """Opens a TFDS data set by name; prepares it (and so downloads it) if need be.

    Args:
        name: as `tensorflow_datasets.builder` takes it, also with a configuration and
            a version; ``isbi2012`` is a builder of our own.
        split: one of the data set's, and if wanted a part of it (`split.parse`) in the
            order it was prepared in.
        image, mask: names of the two features: pictures, or tensors with the channels
            last ([H, W, C] or [D, H, W, C]).
        values: what the mask holds (see `masks`): index, binary or instances.
        label_names: the name of each class id; empty: those of a LabeledImage feature.
        shift: subtracted from the mask to get class ids (1 where they begin at 1).
        ignore: the stored mask value that gets weight 0; -1: none.
        channels: 1 or 3 converts every image, 0 keeps the channels as stored.
        data_dir: where prepared data sets are; empty: TFDS's own choice.
        manual_dir: the files that a builder wants but cannot download.

    Raises:
        InputError: no such data set, split or feature; it could not be prepared; or
            the classes have no names.
    """
    part, select = splits.parse(split)
    builder = _builder(name, data_dir)
    _prepare(builder, name, manual_dir)
    if part not in builder.info.splits:
        raise InputError(
            f"The data set {name!r} has no split {part!r}: choose one of "
            f"{', '.join(builder.info.splits)}."
        )
    features = builder.info.features
    for feature in (image, mask):
        if feature not in features:
            raise InputError(
                f"The data set {name!r} has no feature {feature!r}: choose the options "
                f"`image` and `mask` from {', '.join(features)}."
            )
    names = tuple(label_names) or tuple(getattr(features[mask], "names", None) or ())
    if not names and values != "index":
        names = ("background", "foreground")
    if not names:
        raise InputError(
            f"The data set {name!r} does not name the classes of {mask!r}: list them "
            "in `label_names`, that of the lowest mask value first."
        )
    rank = max(2, len(features[image].shape) - 1)
    coding = Coding(values, names, shift=shift, ignore=ignore, rank=rank)
    examples = _examples(builder, part)
    return Tfds(
        examples,
        select(len(examples)),
        title=f"{builder.info.full_name}/{part}",
        image=image,
        mask=mask,
        coding=coding,
        channels=channels,
    )


def _builder(name: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    own = OWN.get(name.split("/")[0].split(":")[0])
    if own is not None:
        importlib.import_module(own)
    try:
        return tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except DatasetNotFoundError as error:
        raise InputError(
            f"TFDS knows no data set {name!r}, nor is it prepared in "
            f"{data_dir or 'its own folder'}: check the name and `data_dir`."
        ) from error
    except (ValueError, RuntimeError, AssertionError) as error:
        raise InputError(
            f"TFDS cannot open {name!r} ({formats.reason(error)}): check the name, its "
            "configuration and its version."
        ) from error


def _prepare(builder: Any, name: str, manual_dir: str) -> None:
    if builder.is_prepared():
        return
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=manual_dir or None)
    try:
        with _few_retries(), _pillow_for_tensorflow(builder):
            builder.download_and_prepare(
                download_config=config, file_format="array_record"
            )
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"Preparing {name!r} needs the package {error.name}: install it (pip "
            f"install {error.name}) for this one time, reading does without."
        ) from error
    except AssertionError as error:
        # What TFDS raises where the manual folder is missing.
        wanted = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        raise InputError(
            f"{name!r} needs files that no program may download, and there are none in "
            f"the folder {manual_dir or 'that `manual_dir` should name'}: give their "
            f"folder as `manual_dir` ({wanted.rstrip('.')})."
        ) from error
    except Exception as error:
        offline = type(error).__name__ == "ConnectionError"
        why = "no connection to its server" if offline else formats.reason(error)
        raise InputError(
            f"{name!r} is not prepared in {builder.data_path} and preparing it failed "
            f"({why}): check the network and the disk, or prepare it "
            "elsewhere as array_record and give `data_dir`."
        ) from error


def _examples(builder: Any, part: str) -> Sequence[Any]:
    import tensorflow_datasets as tfds

    # Also pictures that are not asked for stay undecoded, which saves their time.
    undecoded = {
        name: tfds.decode.SkipDecoding()
        for name, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        return builder.as_data_source(split=part, decoders=undecoded)
    except Exception as error:
        raise InputError(
            f"{builder.data_path} cannot be read ({formats.reason(error)}): if it was "
            "prepared as tfrecord, give another `data_dir` and it will be prepared "
            "anew as array_record."
        ) from error


def _picture(stored: Any, name: str, channels: int) -> NumpyArray:
    if isinstance(stored, bytes):
        return images.decode_image(stored, name, channels=channels)
    array = images.stored(np.asarray(stored), name)
    if array.ndim == 2:  # a grey tensor may lack the axis of channels
        array = array[..., None]
    return images.to_channels(array, channels, name=name)


def _numbers(stored: Any, rank: int, name: str) -> NumpyArray:
    if isinstance(stored, bytes):
        return images.decode_mask(stored, name)
    array = np.asarray(stored)
    return images.as_mask(array[..., None] if array.ndim == rank else array, name)


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Without a network TFDS tries for minutes before it says so."""
    from tensorflow_datasets.core.download import downloader

    # A private name: where it is gone, the message only comes later.
    before = getattr(downloader, "MAX_RETRIES", None)
    if before is None:
        yield
        return
    downloader.MAX_RETRIES = min(before, 2)
    try:
        yield
    finally:
        downloader.MAX_RETRIES = before


@contextlib.contextmanager
def _pillow_for_tensorflow(builder: Any) -> Iterator[None]:
    """Lends oxford_iiit_pet the three functions it wants of TensorFlow.

    Its builder encodes twelve damaged pictures anew; nothing else in it needs
    TensorFlow, which is not among our dependencies.
    """
    module: Any = sys.modules.get(type(builder).__module__)
    installed = importlib.util.find_spec("tensorflow") is not None
    if builder.name != "oxford_iiit_pet" or installed or not hasattr(module, "tf"):
        yield
        return
    from PIL import Image

    def decode_image(data: bytes) -> NumpyArray:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))

    def encode_jpeg(array: NumpyArray) -> Any:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=95)
        return types.SimpleNamespace(numpy=file.getvalue)

    before = module.tf
    module.tf = types.SimpleNamespace(
        image=types.SimpleNamespace(decode_image=decode_image),
        io=types.SimpleNamespace(encode_jpeg=encode_jpeg),
        shape=np.shape,
    )
    try:
        yield
    finally:
        module.tf = before
