"""Training losses of flow models, and the times of their examples.

A point x_t = α x + σ ε of a path is drawn, and the model's output there is compared with the prediction's target. The
squared error is weighted per image as in SiT (arXiv 2401.08740): not at all for a velocity; for noise and score by 1,
by "velocity" or by "likelihood". A clean image counts as the velocity that it implies, as in JiT (arXiv 2511.13720).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svdit.diffusion.paths import FLOW_PREDICTIONS, LEAST_SIGMA, Path, Point, score_weight
from svdit.errors import UserError

EPS, EPS_VP = 1e-3, 1e-5  # distance of the times from those at which the loss is infinite


def uniform_times(u: Tensor, path: Path, prediction: str = "velocity") -> Tensor:
    """Uniform numbers (N,) in [0, 1) to times where the loss is finite; all of them for a velocity, except on VP."""
    if path.name == "vp":
        return path.forward(u * (1 - EPS_VP))
    eps = 0.0 if prediction in ("velocity", "x0") else EPS
    return path.forward(u * (1 - 2 * eps) + eps)


def lognormal_times(log_ratio: Tensor, path: Path) -> Tensor:
    """Normal numbers (N,) to the times at which they are log α/σ, or log σ/α where time runs from data to noise.

    Raises UserError on VP, where no published model has such times.
    """
    if path.name == "vp":
        raise UserError("lognormal times on path 'vp' are not supported; choose 'linear' or 'gvp'")
    return torch.sigmoid(log_ratio) if path.name == "linear" else 2 / math.pi * log_ratio.exp().atan()


WEIGHTS: dict[str, Callable[[Point], Tensor]] = {  # of the error of the noise
    "none": lambda p: torch.ones_like(p.sigma),
    "velocity": lambda p: score_weight(p) / p.sigma,
    "likelihood": lambda p: score_weight(p).abs().sqrt() / p.sigma,
}


def flow_error(output: Tensor, x0: Tensor, eps: Tensor, p: Point, prediction: str, weight: str = "none") -> Tensor:
    """The weighted error of a model's output at α x + σ ε, (N, C, H, W); its square is the loss."""
    error = output - FLOW_PREDICTIONS[prediction].target(x0, eps, p)
    if prediction == "velocity":
        return error
    if prediction == "x0":
        return (p.d_alpha * p.sigma - p.alpha * p.d_sigma) * error / p.sigma.clamp(min=LEAST_SIGMA)
    return WEIGHTS[weight](p) * (p.sigma * error if prediction == "score" else error)


def mean_square(error: Tensor) -> Tensor:
    """The mean square (N,) of every image's error (N, C, H, W)."""
    return error.square().flatten(1).mean(1)


def cosine_error(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos of the channels of (N, C, H, W), averaged over positions, (N,); LightningDiT, arXiv 2501.01423."""
    return 1 - F.cosine_similarity(a, b, dim=1).flatten(1).mean(1)


def projection_error(projections: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
    """−cos of projected tokens and an encoder's features, (N, T, F) for each encoder, averaged over all of them.

    The second loss of REPA (arXiv 2410.06940); `svdit train` has no encoders and does not use it.
    """
    cosines = [F.cosine_similarity(z, target, dim=-1).mean() for z, target in zip(projections, features, strict=True)]
    return -torch.stack(cosines).mean()
