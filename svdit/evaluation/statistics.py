"""Means and covariances of features, as float64 sums that add up over batches and processes.

    mean = s / n          covariance = (O - n mean meanᵀ) / (n - 1),     s = Σ x,  O = Σ x xᵀ

Files use ADM's names (`mu`, `sigma` for pooled features, `mu_s`, `sigma_s` for spatial ones): ADM's evaluator reads
statistics saved here, and its reference batches can be read here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svdit.distributed import all_sum
from svdit.errors import UserError
from svdit.extras import require
from svdit.files import atomic_path
from svdit.storage.npz import map_npz, npz_keys

T = TypeVar("T", int, str)
Array = npt.NDArray[np.float64]
ADM_SUFFIX = {"pool": "", "spatial": "_s"}


@dataclass(frozen=True)
class Root:
    """A triangular factor in permuted order: covariance[order][:, order] = lower lowerᵀ, `lower` (D, R)."""

    lower: Array
    order: npt.NDArray[np.int64]

    @property
    def rank(self) -> int:
        """R, the numerical rank."""
        return self.lower.shape[1]

    @property
    def factor(self) -> Array:
        """F (D, R) with covariance = F Fᵀ, in the covariance's own order."""
        unpermuted = np.empty_like(self.lower)
        unpermuted[self.order] = self.lower
        return unpermuted

    def congruence(self, covariance: Array) -> Array:
        """Fᵀ Σ F (R, R); only the lower triangle is valid."""
        if self.rank < len(self.lower):
            F = self.factor
            return F.T @ (covariance @ F)
        permuted = covariance[np.ix_(self.order, self.order)]
        lapack = require("scipy.linalg").lapack
        product: Array = lapack.dsygst(permuted.T, self.lower, itype=2, lower=1, overwrite_a=1)[0]
        return product


@dataclass(frozen=True)
class Gaussian:
    """A summary of features: `mean` (D,), `covariance` (D, D), and the number of images (None: unknown)."""

    mean: Array
    covariance: Array
    count: int | None = None
    saved_root: Root | None = field(default=None, repr=False)

    @cached_property
    def root(self) -> Root:
        """The factor of the covariance, computed once."""
        return pivoted_cholesky(self.covariance) if self.saved_root is None else self.saved_root


def pivoted_cholesky(covariance: Array) -> Root:
    """The factor of a covariance (D, D), which may be singular: LAPACK's dpstrf stops where the rest is round-off.

    It takes a tenth of the time of an eigendecomposition. Raises ValueError for NaN and Inf.
    """
    packed, pivots, rank, info = require("scipy.linalg").lapack.dpstrf(covariance, lower=1)
    if info < 0 or not np.isfinite(covariance).all():
        raise ValueError("the covariance matrix is not finite")
    return Root(np.asfortranarray(np.tril(packed[:, :rank])), pivots.astype(np.int64) - 1)


class Moments:
    """Running n, Σx and Σxxᵀ in float64, on the features' device."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, sign: int = 1) -> Moments:
        """Add (N, D) features; sign -1 removes them."""
        x = x.double()
        self.count += sign * len(x)
        self.total += sign * x.sum(0)
        self.outer.addmm_(x.T, x, alpha=sign)
        return self

    def merge(self) -> Moments:
        """Sum over all processes, in place on each of them."""
        self.count = int(all_sum(torch.tensor(self.count, device=self.total.device)))
        all_sum(self.total)
        all_sum(self.outer)
        return self

    def without(self, x: Tensor) -> Moments:
        """A copy without the (N, D) features `x`."""
        rest = Moments(0)
        rest.count, rest.total, rest.outer = self.count, self.total.clone(), self.outer.clone()
        return rest.add(x, sign=-1)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance. Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, found {self.count}; pass more images")
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
    """The Gaussians in an .npz by layer (maybe none), and the digest of the network that computed them.

    Raises UserError for damaged files, shapes that do not fit together and values that are not finite.
    """
    keys, gaussians = npz_keys(path), {}
    count = _scalar(path, "count", int) if "count" in keys else None
    for layer, suffix in ADM_SUFFIX.items():
        if {"mu" + suffix, "sigma" + suffix} <= keys:
            mean, covariance = (_floats(path, key + suffix) for key in ("mu", "sigma"))
            # Files without a root (ADM's), or with half of one, get theirs computed on first use.
            complete = {"root" + suffix, "order" + suffix} <= keys
            root = Root(_floats(path, "root" + suffix), np.array(map_npz(path, "order" + suffix))) if complete else None
            gaussians[layer] = Gaussian(mean, covariance, count, root)
            _check(path, suffix, gaussians[layer])
    extractor = _scalar(path, "extractor", str) if "extractor" in keys else "inception"
    return gaussians, extractor


def _floats(path: str | Path, key: str) -> Array:
    array = map_npz(path, key)
    if array.dtype.kind not in "fiu":
        raise UserError(f"{key} in {path} is {array.dtype}; expected floats, so create the file again")
    return np.array(array, np.float64, order="K")


def _scalar(path: str | Path, key: str, kind: type[T]) -> T:
    try:
        return kind(map_npz(path, key).item())
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} in {path} is not one {kind.__name__}; create the file again") from None


def _check(path: str | Path, suffix: str, gaussian: Gaussian) -> None:
    mu, sigma, root_name, order = (key + suffix for key in ("mu", "sigma", "root", "order"))
    D, root = gaussian.mean.size, gaussian.saved_root
    if gaussian.mean.shape != (D,) or gaussian.covariance.shape != (D, D):
        shapes = f"{gaussian.mean.shape} and {gaussian.covariance.shape}"
        raise UserError(f"{mu} and {sigma} in {path} are {shapes}; expected (D,) and (D, D)")
    if not (np.isfinite(gaussian.mean).all() and np.isfinite(gaussian.covariance).all()):
        raise UserError(f"{mu} or {sigma} in {path} contains NaN or Inf; create the file again")
    if root is None:
        return
    fits = root.lower.shape[:1] == (D,) and root.lower.ndim == 2 and root.order.dtype.kind == "i"
    fits = fits and bool(np.isfinite(root.lower).all())
    if not fits or not np.array_equal(np.sort(root.order, axis=None), np.arange(D)):
        raise UserError(f"{root_name} and {order} in {path} do not factor {sigma}; create the file again")
