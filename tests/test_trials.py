"""What is tried before a run: a learning rate, and one batch by heart."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

import train
from configs import default
from unet_jax import advice, trials

TINY = {
    "data.cells.size": (32, 32),
    "data.cells.examples": 6,
    "model.features": (8, 16),
    "train.crop": (32, 32),
    "train.batch_size": 2,
    "train.eval_batch_size": 2,
}


def _config(**changes):
    config = default.get_config()
    for key, value in {**TINY, **changes}.items():
        config.update_from_flattened_dict({key: value})
    return train.chosen(config)


def test_the_rate_is_found_on_a_curve_whose_answer_is_known():
    # Flat, half way down at 1e-3, lowest at 1e-1, then rising: of log10(rate).
    rates = np.geomspace(1e-6, 10, 200)
    x = np.log10(rates)
    losses = 1 - 0.8 / (1 + np.exp(-3 * (x + 3))) + np.exp(4 * (x - 0.2))
    found = trials.suggested(rates, losses.tolist())
    # The running mean lags by four rates or so.
    assert 1e-3 <= found <= 2.5e-3
    assert trials.suggested(rates, [1.0] * 200) is None
    rising = (1 + x - x[0]).tolist()
    assert trials.suggested(rates, rising) is None
    broken = [*losses[:120].tolist(), np.nan]
    assert trials.suggested(rates[:121], broken) == pytest.approx(found, rel=0.5)


def test_find_lr_writes_what_it_has_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trials, "RATES", 40)
    assert train.trial("find_lr", _config(), tmp_path) == 0
    text = capsys.readouterr().out
    rate = float(text.rpartition("--config.optim.learning_rate=")[2])
    assert 1e-5 < rate < 1
    with (tmp_path / "learning_rate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert 20 < len(rows) <= 40
    assert (tmp_path / "learning_rate.png").stat().st_size > 1000


def test_a_batch_is_learned_by_heart(tmp_path, capsys):
    config = _config(**{"augment.noise": 0.5, "optim.schedule": "cosine"})
    assert train.trial("overfit_one_batch", config, tmp_path) == 0
    assert "passed: the net knows the batch by heart" in capsys.readouterr().out
    assert (tmp_path / "overfit.png").stat().st_size > 1000


def test_a_net_that_cannot_learn_fails(capsys, monkeypatch):
    monkeypatch.setattr(trials, "STEPS", 50)
    config = _config(**{"optim.learning_rate": 1e-9})
    assert train.trial("overfit_one_batch", config, None) == 1
    assert "FAILED: after 50 steps" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_trials_are_asked_for_on_the_command_line():
    command = train.parse(["train.py", "--find_lr"])
    assert command.trial == "find_lr" and command.workdir is None
    command = train.parse(["train.py", "--overfit_one_batch", "--workdir=x"])
    assert command.trial == "overfit_one_batch" and command.workdir == "x"
    with pytest.raises(train.InputError, match="exclude each other"):
        train.parse(["train.py", "--find_lr", "--overfit_one_batch"])
    folds = _config(**{"members.folds": 2})
    with pytest.raises(train.InputError, match="is for one net"):
        train.trial("find_lr", folds, None)


def test_what_the_first_examples_give_reason_to_say():
    class Few:
        def __init__(self, label):
            self.label = label

        def __len__(self):
            return 3

        def __getitem__(self, i):
            image = np.zeros((*self.label.shape, 1), np.uint8)
            weight = np.ones(self.label.shape, np.float32)
            return {"image": image, "label": self.label, "weight": weight}

    def run(label, **data):
        config = {"train": {"crop": (4, 4)}, "data": {"source": "folder", **data}}
        source = Few(label)
        meta = SimpleNamespace(task="classes", label_names=("background", "cell"))
        dataset = SimpleNamespace(train=source, evaluation=source)
        return SimpleNamespace(config=config, meta=meta, dataset=dataset)

    label = np.zeros((20, 20), np.uint8)
    examples = advice.first(Few(label))
    assert len(examples) == 3
    assert "anything but background" in advice.rare(run(label), examples)
    label[0, 0] = 1
    assert "cell has 0.25% of the pixels" in advice.rare(run(label), examples)
    label[:10] = 1
    assert advice.rare(run(label), examples) == ""
    # Twice three examples of 400 bytes of image and of label.
    assert advice.many(run(label, cache_mb=1), examples) == ""
    assert "data.cache_mb = 0.001" in advice.many(run(label, cache_mb=0.001), examples)
