"""The digits models inside the package are those that their cards and `docs/training.md` describe."""

import pytest
import torch
from sklearn.svm import SVC

from svdit.checkpoints.store import embedded_models, load_model
from svdit.model.zoo import config_for
from svdit.sampling.batch import default_sampling, generate
from svdit.training.data import digits
from svdit.training.loop import held_out_error

# By name: the configuration, the last held-out error of the learning curve, a sampler of few steps.
MODELS = {
    "digits": ("DiT-digits", 0.070453, {"sampler": "ddim", "steps": "ddim20"}),
    "digits-sit": ("SiT-digits", 0.355233, {"sampler": "heun", "steps": "6"}),
    "digits-jit": ("JiT-digits", 0.302049, {"sampler": "heun", "steps": "5"}),
}


def test_every_embedded_model_is_described() -> None:
    assert set(embedded_models()) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_error_on_held_out_digits_is_that_of_the_learning_curve(name: str) -> None:
    config, error, _ = MODELS[name]
    model = load_model(name, name=config)
    assert model.config == config_for(config)
    assert held_out_error(model, digits()[1]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_their_digits_are_recognized(name: str) -> None:
    training, _ = digits()
    real = torch.stack([training.read(i) for i in range(len(training))]).flatten(1)
    classifier = SVC(gamma=0.001 * 8**2).fit(real, training.labels)
    model, labels = load_model(name), torch.arange(60) % 10
    x = generate(model, labels, default_sampling(model.config, cfg_scale=1.5, **MODELS[name][2]))
    assert classifier.score(x.clamp(-1, 1).flatten(1), labels) >= 0.95
