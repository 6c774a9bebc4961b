"""Gaussian data, for which the best velocity, score, noise and clean image are known."""

from torch import Tensor

from svdit.diffusion.paths import Path, velocity


def exact(prediction: str, x: Tensor, path: Path, t: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor, Tensor]:
    """The best output of a model of data N(mean, std²), its velocity and its score."""
    p = path.at(t)
    score = -(x - p.alpha * mean) / (p.alpha**2 * std**2 + p.sigma**2)
    eps = -p.sigma * score
    x0 = mean + p.alpha * std**2 * (x - p.alpha * mean) / (p.alpha**2 * std**2 + p.sigma**2)
    v = velocity(x0, eps, p)
    return {"velocity": v, "epsilon": eps, "score": score, "x0": x0}[prediction], v, score
