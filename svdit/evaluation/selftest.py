"""Checks the metric implementations of this installation on data with known answers.

With the Inception weights, ADM's published samples and its reference batch it also checks the numbers that ADM's
evaluator reports for them (openai/guided-diffusion, evaluations/README.md), within the tolerances between tools.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from svdit.errors import UserError
from svdit.evaluation import metrics, paired
from svdit.evaluation.evaluate import evaluate
from svdit.evaluation.frechet import frechet_distance
from svdit.evaluation.inception import load_extractor, random_extractor
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.neighbours import neighbour_metrics
from svdit.evaluation.options import Options
from svdit.evaluation.statistics import Gaussian
from svdit.evaluation.weights import find_weights, load_weights


@dataclass(frozen=True)
class Check:
    """A computed value, the expected one, and the tolerance."""

    name: str
    value: float
    expected: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the value is within the tolerance; NaN is not."""
        return bool(abs(self.value - self.expected) <= self.tolerance)


def formulas() -> Iterator[Check]:
    """Every metric on data with a closed-form answer; takes seconds, needs no files."""
    yield _frechet_of_diagonals()
    yield _frechet_of_few()
    yield from _inception_scores()
    yield _kernel_by_hand()
    yield from _neighbours_on_a_line()
    yield _monge_of_a_shift()
    yield from _pairs()
    yield _jackknife_of_the_mean()
    yield from _network()


def _frechet_of_diagonals() -> Check:
    m1, m2, s1, s2 = np.random.RandomState(0).rand(4, 50)
    a, b = Gaussian(m1, np.diag(s1**2)), Gaussian(m2, np.diag(s2**2))
    return Check("fid, diagonal", frechet_distance(a, b), float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()), 1e-9)


def _frechet_of_few() -> Check:
    x, y = np.random.RandomState(0).randn(2, 8, 64)
    a, b = (Gaussian(z.mean(0), np.cov(z, rowvar=False), 8) for z in (x, y))
    cross = np.linalg.svd((x - a.mean) @ (y - b.mean).T / 7, compute_uv=False).sum()
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    return Check("fid, 8 images of 64 features", frechet_distance(a, b), float(expected), 1e-7)


def _inception_scores() -> Iterator[Check]:
    blocks, classes = np.arange(60) % 4, np.eye(10, dtype=np.float32)[np.arange(60) % 10]
    for name, sharpness, expected in (("certain and balanced", 1000.0, 10.0), ("uniform", 0.0, 1.0)):
        score = metrics.inception_score(sharpness * classes, blocks)["is"]
        yield Check(f"is, {name}", score.value or 0.0, expected, 1e-9)


def _kernel_by_hand() -> Check:
    real, fake = (torch.tensor(x, device="cpu")[:, None] for x in ([0.0, 1.0, 2.0], [1.0, 1.0, 3.0]))
    within = (8 + 64 + 64) / 3  # (1·1+1)³, (1·3+1)³, (1·3+1)³
    among = (1 + 1 + 27) / 3  # (0·1+1)³, (0·2+1)³, (1·2+1)³
    across = (3 + 2 * (8 + 27) + 64 + 343) / 9
    full = metrics.kernel_distance(real, fake, np.zeros(3, np.int64))["kid_full"]
    return Check("kid_full, three points", full.value or 0.0, within + among - 2 * across, 1e-9)


def _neighbours_on_a_line() -> Iterator[Check]:
    """Real 0 … 9; generated far away except for one at -2.5: in the 3-ball of 0 and in the 5-balls of 0 and 1."""
    real = torch.arange(10.0, device="cpu")[:, None]
    fake = 100 + real.clone()
    fake[0] = -2.5
    estimates = neighbour_metrics(real, fake)
    for name, expected in {"precision": 0.1, "recall": 1.0, "density": 2 / 50, "coverage": 0.2}.items():
        yield Check(f"{name}, on a line", estimates[name].value or 0.0, expected, 1e-9)


def _monge_of_a_shift() -> Check:
    x = torch.arange(6.0, device="cpu")[:, None]
    return Check("mind, a shift by 2", metrics.monge_distance(x, x + 2).value or 0.0, 3 * 4.0, 1e-5)


def _pairs() -> Iterator[Check]:
    a, b = (np.full((16, 16, 3), level, np.uint8) for level in (100, 110))
    yield Check("psnr, 10 levels apart", paired.psnr(a, b), 20 * np.log10(25.5), 1e-9)
    c = (0.01 * 255) ** 2
    yield Check("ssim, flat", paired.ssim(a, b), (2 * 100 * 110 + c) / (100**2 + 110**2 + c), 1e-9)


def _jackknife_of_the_mean() -> Check:
    x = np.random.RandomState(0).randn(30)
    estimate = Estimate(x.mean(), tuple(float(np.delete(x, i).mean()) for i in range(30)))
    return Check("jackknife, the mean", estimate.se or 0.0, float(x.std(ddof=1) / np.sqrt(30)), 1e-9)


@torch.inference_mode()
def _network() -> Iterator[Check]:
    """The random network on a fixed image: depends on the resize rule, every layer, and the machine's arithmetic."""
    ramp = torch.arange(64 * 64 * 3, device="cpu").reshape(1, 3, 64, 64).mul(7).remainder(256).to(torch.uint8)
    features = random_extractor()(ramp)
    for layer, expected in NETWORK.items():
        yield Check(f"network, {layer}", features[layer].double().norm().item(), expected, 1e-4 * expected)


NETWORK = {"pool": 49.450890, "spatial": 38.492298, "logits": 48.561313}


ADM = {  # as reported by ADM's evaluator for its published sample files
    "admnet_guided_upsampled_imagenet256": (215.8370, 3.94256, 6.14043, 0.8265, 0.5309),
    "admnet_guided_imagenet128": (141.4767, 2.973289, 5.094564, 0.78138, 0.5929),
}


def regression(samples: Path, reference: Path, weights: str | None) -> Iterator[Check]:
    """ADM's published samples against its reference batch. Raises UserError for other files."""
    if samples.stem not in ADM:
        raise UserError(f"{samples.name} has no published numbers; pass one of {', '.join(ADM)}")
    network = load_extractor(*load_weights(find_weights(weights)))
    estimates = evaluate(reference, samples, network, Options(("fid", "sfid", "is", "prc"))).metrics
    inception_score, fid, sfid, precision, recall = ADM[samples.stem]
    for name, expected, tolerance in (
        ("is", inception_score, 1e-3 * inception_score),
        ("fid", fid, 0.002),
        ("sfid", sfid, 0.002),
        ("precision", precision, 0.003),
        ("recall", recall, 0.003),
    ):
        yield Check(f"{name}, {samples.stem}", estimates[name].value or 0.0, expected, tolerance)
