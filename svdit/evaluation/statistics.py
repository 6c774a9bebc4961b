"""Means and covariances of features, as float64 sums that add up over batches and processes.

    mean = s / n          covariance = (O - n mean meanᵀ) / (n - 1),     s = Σ x,  O = Σ x xᵀ

Files use ADM's names (`mu`, `sigma` for the pooled features, `mu_s`, `sigma_s` for the spatial ones), so statistics
saved here can be read by ADM's evaluator and its reference batches can be read here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import lapack
from torch import Tensor

from svdit.distributed import all_sum
from svdit.errors import UserError
from svdit.files import atomic_path

Array = npt.NDArray[np.float64]
ADM_SUFFIX = {"pool": "", "spatial": "_s"}


@dataclass(frozen=True)
class Root:
    """A triangular factor in a permuted order: covariance[order][:, order] = lower lowerᵀ, `lower` (D, R)."""

    lower: Array
    order: npt.NDArray[np.int64]

    @property
    def rank(self) -> int:
        return self.lower.shape[1]

    @property
    def factor(self) -> Array:
        """F (D, R) of the matrix in its own order."""
        unpermuted = np.empty_like(self.lower)
        unpermuted[self.order] = self.lower
        return unpermuted

    def congruence(self, covariance: Array) -> Array:
        """Fᵀ Σ F (R, R); only its lower triangle is right."""
        if self.rank < len(self.lower):
            F = self.factor
            return F.T @ (covariance @ F)
        permuted = covariance[np.ix_(self.order, self.order)]
        return lapack.dsygst(permuted.T, self.lower, itype=2, lower=1, overwrite_a=1)[0]


@dataclass(frozen=True)
class Gaussian:
    """A feature set summed up: `mean` (D,), `covariance` (D, D), and from how many images (None: not told)."""

    mean: Array
    covariance: Array
    count: int | None = None
    saved_root: Root | None = field(default=None, repr=False)

    @cached_property
    def root(self) -> Root:
        return pivoted_cholesky(self.covariance) if self.saved_root is None else self.saved_root


def pivoted_cholesky(covariance: Array) -> Root:
    """The root whose rank is where the remaining diagonal is round-off (LAPACK's dpstrf).

    An exact factor for singular matrices too, at a tenth of the cost of an eigendecomposition.
    """
    packed, pivots, rank, info = lapack.dpstrf(covariance, lower=1)
    if info < 0 or not np.isfinite(covariance).all():
        raise ValueError("the covariance matrix is not finite")
    return Root(np.asfortranarray(np.tril(packed[:, :rank])), pivots.astype(np.int64) - 1)


class Moments:
    """Running n, Σx and Σxxᵀ in float64, where the features are."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, sign: int = 1) -> Moments:
        """Take in (N, D) features, or with sign -1 take them out again."""
        x = x.double()
        self.count += sign * len(x)
        self.total += sign * x.sum(0)
        self.outer.addmm_(x.T, x, alpha=sign)
        return self

    def merge(self) -> Moments:
        """Add up the sums of all processes, on all of them."""
        self.count = int(all_sum(torch.tensor(self.count, device=self.total.device)))
        all_sum(self.total)
        all_sum(self.outer)
        return self

    def without(self, x: Tensor) -> Moments:
        """The sums of all but the (N, D) features `x`."""
        rest = Moments(0)
        rest.count, rest.total, rest.outer = self.count, self.total.clone(), self.outer.clone()
        return rest.add(x, sign=-1)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; at least two images are needed."""
        if self.count < 2:
            raise UserError(f"need at least 2 images for a covariance, found {self.count}")
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean.cpu().numpy(), covariance.cpu().numpy(), self.count)


def save_statistics(path: str | Path, gaussians: dict[str, Gaussian], extractor: str, **more: Any) -> None:
    """Write an .npz with ADM's keys, the roots, the image count, the extractor's digest and `more` arrays."""
    arrays = {"extractor": np.array(extractor), **more}
    for layer, gaussian in gaussians.items():
        suffix = ADM_SUFFIX[layer]
        arrays |= {"mu" + suffix: gaussian.mean, "sigma" + suffix: gaussian.covariance}
        arrays |= {"root" + suffix: gaussian.root.lower, "order" + suffix: gaussian.root.order}
        if gaussian.count is not None:
            arrays["count"] = np.array(gaussian.count)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_statistics(path: str | Path) -> tuple[dict[str, Gaussian], str]:
    """The Gaussians of an .npz by layer (empty: it holds none) and the digest of the extractor that made them."""
    gaussians = {}
    with np.load(path, allow_pickle=False) as archive:
        count = int(archive["count"]) if "count" in archive else None
        for layer, suffix in ADM_SUFFIX.items():
            if "mu" + suffix in archive and "sigma" + suffix in archive:
                mean, covariance = (archive[key + suffix].astype(np.float64) for key in ("mu", "sigma"))
                rooted = "order" + suffix in archive
                root = Root(archive["root" + suffix], archive["order" + suffix]) if rooted else None
                gaussians[layer] = Gaussian(mean, covariance, count, root)
        extractor = str(archive["extractor"]) if "extractor" in archive else "inception"
    for layer, gaussian in gaussians.items():
        _check(path, layer, gaussian)
    return gaussians, extractor


def _check(path: str | Path, layer: str, gaussian: Gaussian) -> None:
    names = [key + ADM_SUFFIX[layer] for key in ("mu", "sigma")]
    D = gaussian.mean.size
    if gaussian.mean.shape != (D,) or gaussian.covariance.shape != (D, D):
        shapes = f"{gaussian.mean.shape} and {gaussian.covariance.shape}"
        raise UserError(f"{names[0]} and {names[1]} in {path} are {shapes}; (D,) and (D, D) are expected")
    if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
        raise UserError(f"{names[0]} or {names[1]} in {path} holds values that are not finite; make the file again")
