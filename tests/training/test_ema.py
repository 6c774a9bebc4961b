"""The moving average against torch's own."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from svdit.training.ema import update_


def test_equals_torchs_average_once_the_decay_is_reached() -> None:
    torch.manual_seed(0)
    model, ema = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # the first call copies
    ema.load_state_dict(model.state_dict())
    for step in range(100, 105):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        theirs.update_parameters(model)
        update_(ema, model, 0.9, step)
    assert torch.equal(ema.weight, theirs.module.weight)
    assert not torch.equal(ema.weight, model.weight)


def test_the_decay_starts_low_and_fixed_parameters_stay() -> None:
    model, ema = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(ema.weight)
    model.bias.requires_grad_(False)
    bias = ema.bias.clone()
    update_(ema, model, 0.9999, 1)
    torch.testing.assert_close(ema.weight, torch.tensor([[1 - 2 / 11]]))
    assert torch.equal(ema.bias, bias)
