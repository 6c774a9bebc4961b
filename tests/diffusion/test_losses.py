"""Training losses against the published ones."""

import pytest
import torch
from conftest import Golden
from scipy.stats import norm

from svdit.diffusion.losses import discretized_log_likelihood, gaussian_kl, training_loss
from svdit.diffusion.schedule import make_schedule


@torch.no_grad()
def test_losses_equal_published(golden: Golden) -> None:
    y = golden["y"]
    loss = training_loss(lambda x, t: golden.model(x, t, y), golden["x0"], golden["eps"], make_schedule(), golden["t"])
    torch.testing.assert_close(loss.total, golden["loss_loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.mse, golden["loss_mse"], rtol=1e-5, atol=0)
    if "loss_vb" in golden.arrays:
        torch.testing.assert_close(loss.vb, golden["loss_vb"], rtol=1e-3, atol=1e-6)


def test_the_bound_trains_the_variance_only() -> None:
    output = torch.randn(3, 2, 4, 4, requires_grad=True)
    x0, eps, i = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 400, 999])
    training_loss(lambda x, t: output, x0, eps, make_schedule(), i).vb.sum().backward()
    assert output.grad is not None
    assert output.grad[:, 0].abs().max() == 0
    assert (output.grad[:, 1].abs().amax((1, 2)) > 0).all()


def test_kl_equals_numerical_integration() -> None:
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p, q = norm(0.3, 0.7), norm(-0.2, 1.3)
    expected = float((torch.tensor(p.pdf(z) * (p.logpdf(z) - q.logpdf(z)))).sum() * (z[1] - z[0]))
    two = [torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.7, -0.2, 1.3)]
    kl = gaussian_kl(two[0], 2 * two[1].log(), two[2], 2 * two[3].log())
    assert float(kl) == pytest.approx(expected, rel=1e-6)


def test_bins_sum_to_one_and_follow_the_true_normal() -> None:
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.tensor(0.1), torch.tensor(0.2).log()
    mass = discretized_log_likelihood(levels, mean, log_std).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-6)
    truth = norm.cdf(levels + 1 / 255, 0.1, 0.2) - norm.cdf(levels - 1 / 255, 0.1, 0.2)
    assert 0 < float((mass - torch.from_numpy(truth)).abs().max()) < 2e-4
