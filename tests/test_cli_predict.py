"""`unet-jax predict`: its flags reach the predictor and the files."""

import numpy as np
import pytest
from PIL import Image
from test_predict import make, picture, save

from unet_jax import cli, postprocess
from unet_jax.predict import Predictor


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two nets of one question, and one of another."""
    path = tmp_path_factory.mktemp("runs")
    for name, fields in (
        ("a", {"norm": "none"}),
        ("b", {"norm": "none", "features": (3, 5)}),
        ("c", {"names": ("background", "wall")}),
        ("d", {"norm": "group", "norm_groups": 1}),
    ):
        _, variables, meta = make(**fields)
        save(path / name, variables, meta, step=3)
    return path


@pytest.fixture
def image(tmp_path):
    pixels = picture(30, 41)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return tmp_path / "x.png", pixels


def test_an_ensemble_in_tiles_from_all_sides(workdirs, image, tmp_path, capsys):
    path, pixels = image
    both = [str(workdirs / "a"), str(workdirs / "b")]
    options = {"tile": 16, "overlap": 0.5, "blend": "linear", "tta": "flips"}
    flags = [f"--{key}={value}" for key, value in options.items()]
    status = cli.main(
        ["predict", f"--workdir={','.join(both)}", str(path), f"--out={tmp_path}/out",
         "--batch_size=4", "--probabilities", *flags]
    )  # fmt: skip
    assert status == 0
    text = capsys.readouterr().out
    assert all(f"{workdir}: step 3, background, cell" in text for workdir in both)
    assert "tile 16: 0.0 MB of probabilities at a time" in text
    predictor = Predictor(both, batch_size=4, **options)
    found = np.load(tmp_path / "out" / "x_probability.npy")
    np.testing.assert_allclose(found, predictor(pixels).probability, atol=1e-6)


def test_objects_after_post_processing(workdirs, image, tmp_path):
    path, pixels = image
    arguments = ["predict", f"--workdir={workdirs}/a", f"--out={tmp_path}/out"]
    steps = "--postprocess=fill,small=3"
    assert cli.main([*arguments, str(path), steps, "--instances"]) == 0
    ids = np.asarray(Image.open(tmp_path / "out" / "x.png"))
    post = postprocess.build(
        task="classes",
        label_names=("background", "cell"),
        steps="fill,small=3",
        instances="components",
    )
    expected = post(Predictor(workdirs / "a")(pixels))
    assert ids.dtype == np.uint16 and ids.max() > 1
    np.testing.assert_array_equal(ids, expected)
    assert cli.main([*arguments, "--instances=watershed", str(path)]) == 0
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "out" / "x.png")), ids)


@pytest.mark.parametrize(
    ("workdir", "flag", "words"),
    [
        ("a,c", "--tta=none", "c has label_names = ('background', 'wall')"),
        ("d", "--blend=exact", "(GroupedNorm) takes its mean"),
        ("a", "--tta=all", "tta = 'all' is not known"),
        ("a", "--blend=mean", "blend = 'mean' is not known"),
        ("a", "--postprocess=open", "postprocess: 'open' is not known"),
        ("a,", "--postprocess=small", "small=30"),
        (",", "--tta=none", "at least one workdir"),
        ("a", "--mesh=8", "two numbers of devices, DATAxSPACE, such as 1x8"),
        ("a", "--mesh=1x3", "needs 3 devices, but there are 2: use --mesh=1x2"),
    ],
)
def test_mistakes_are_one_sentence(workdir, flag, words, workdirs, image, capsys):
    path, _ = image
    names = ",".join(str(workdirs / n) if n else n for n in workdir.split(","))
    arguments = [f"--workdir={names}", f"--out={path.parent}/out", "--tile=16", flag]
    assert cli.main(["predict", *arguments, str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (path.parent / "out").exists()


def test_the_help_says_what_may_be_written(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--workdir=a", "--out=b", "--instances", "x.png"])
    assert "'x.png' (choose from" in capsys.readouterr().err
