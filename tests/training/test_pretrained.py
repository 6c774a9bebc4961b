"""The digits model inside the package is the one that its card and `docs/training.md` describe."""

import pytest
import torch
from sklearn.svm import SVC

from svdit.checkpoints.store import load_model
from svdit.sampling.batch import SamplingConfig, generate
from svdit.training.data import digits
from svdit.training.loop import held_out_error


def test_error_on_held_out_digits_is_that_of_the_learning_curve() -> None:
    model = load_model("digits", name="DiT-digits")
    assert held_out_error(model, digits()[1]) == pytest.approx(0.070453, rel=1e-3)


def test_its_digits_are_recognized() -> None:
    training, _ = digits()
    real = torch.stack([training.read(i) for i in range(len(training))]).flatten(1)
    classifier = SVC(gamma=0.001 * 8**2).fit(real, training.labels)
    labels = torch.arange(60) % 10
    x = generate(load_model("digits"), labels, SamplingConfig("ddim", "ddim20", 1.5))
    assert classifier.score(x.clamp(-1, 1).flatten(1), labels) >= 0.95
