"""Real folders, without a line of code: inspect, train, predict, evaluate."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
DATA = os.environ.get("UNET_JAX_DATA")

# The folder, what inspect should take it for, some of its files, and the least Dice
# after so many steps of the written config. No two have the same layout.
FOLDERS = {
    "dsb2018": ("one mask file an object", "stage1_train/*/images/0[0-4]*.png", 40),
    "isbi2012": ("a stack of images and one of labels", "test-volume.tif", 10),
    "msd_hippocampus": ("a folder of images", "imagesTr/hippocampus_00*.nii.gz", 20),
}


def _run(*command, cwd):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def _same_size(image, label):
    if image.name.endswith(".nii.gz"):
        import nibabel

        volumes = [nibabel.loadsave.load(path) for path in (image, label)]
        assert volumes[0].shape == volumes[1].shape
        assert np.array_equal(volumes[0].affine, volumes[1].affine)
        return
    with Image.open(image) as one, Image.open(label) as other:
        assert one.size == other.size
        assert getattr(one, "n_frames", 1) == getattr(other, "n_frames", 1)


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="UNET_JAX_DATA does not name the real data")
@pytest.mark.parametrize("name", FOLDERS)
def test_a_real_folder_from_inspect_to_evaluate(name, tmp_path):
    layout, pattern, steps = FOLDERS[name]
    root, config = Path(str(DATA)) / name, tmp_path / "my.py"
    text = _run(
        "-m", "unet_jax", "inspect", str(root), f"--write-config={config}", cwd=tmp_path
    )
    assert layout in text and f"{config} is written" in text
    with Image.open(tmp_path / "inspect.png") as sheet:
        assert sheet.width > 500 and len(sheet.getcolors(2**24) or ()) > 100

    workdir = tmp_path / "run"
    text = _run(
        "train.py",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.train.steps={steps}",
        "--config.train.eval_every=0",
        cwd=ROOT,
    )
    assert f"finished at step {steps}" in text and "bottleneck: " in text
    dice = float(re.findall(r"best dice ([\d.]+)", text)[0])

    images = sorted(root.glob(pattern))[:3]
    out = tmp_path / "out"
    _run(
        "-m",
        "unet_jax",
        "predict",
        f"--workdir={workdir}",
        *map(str, images),
        f"--out={out}",
        "--overlay",
        cwd=tmp_path,
    )
    for image in images:
        _same_size(image, out / image.name)
        stem = image.name.partition(".")[0]
        assert any(path.stat().st_size > 1000 for path in out.glob(f"{stem}_overlay*"))

    text = _run("-m", "unet_jax", "evaluate", f"--workdir={workdir}", cwd=tmp_path)
    assert "dice" in text
    # The mean of all classes but the background, in the table's last row.
    figures = [float(x) for x in re.findall(r"\d\.\d{4}", text)]
    assert any(abs(figure - dice) < 2e-4 for figure in figures), (dice, text)
