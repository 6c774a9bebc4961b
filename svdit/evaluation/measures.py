"""The closed set of metrics that need the network: which rows each wants, and how it is computed from features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdit.evaluation import metrics
from svdit.evaluation.features import Features
from svdit.evaluation.frechet import Blocks
from svdit.evaluation.jackknife import Estimate
from svdit.evaluation.neighbours import neighbour_metrics

Found = dict[str, Estimate]
Function = Callable[[Features, Features, Blocks, torch.device], Found]


@dataclass(frozen=True)
class Measure:
    """`compute(real, fake, blocks, device)`, and the layers whose sums and rows it needs of the real set."""

    compute: Function
    sums: str = ""
    rows: str = ""


def _fid(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    return {"fid": metrics.frechet(real.gaussians["pool"], fake.gaussians["pool"], fake.rows["pool"], blocks)}


def _sfid(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    layer = "spatial"
    return {"sfid": metrics.frechet(real.gaussians[layer], fake.gaussians[layer], fake.rows[layer], blocks)}


def _kid(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    return metrics.kernel_distance(*_pools(real, fake, device), blocks)


def _is(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    return metrics.inception_score(fake.rows["logits"], blocks)


def _prc(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    return neighbour_metrics(*_pools(real, fake, device), blocks)


def _mind(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    return {"mind": metrics.monge_distance(*_pools(real, fake, device))}


def _fid_infinity(real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    return {"fid_inf": metrics.fid_infinity(real.gaussians["pool"], fake.rows["pool"])}


MEASURES = {
    "fid": Measure(_fid, sums="pool"),
    "sfid": Measure(_sfid, sums="spatial"),
    "kid": Measure(_kid, rows="pool"),
    "is": Measure(_is),
    "prc": Measure(_prc, rows="pool"),
    "mind": Measure(_mind, rows="pool"),
    "fid_inf": Measure(_fid_infinity, sums="pool"),
}


def measure(names: Iterable[str], real: Features, fake: Features, blocks: Blocks, device: torch.device) -> Found:
    """Every estimate of the named metrics; one that cannot be had is empty under its own name, with the reason."""
    found: Found = {}
    for name in names:
        this = MEASURES[name]
        if this.sums and this.sums not in real.gaussians:
            found[name] = Estimate(None, reason=f"the reference holds no statistics of the {this.sums} features")
        elif this.rows and this.rows not in real.rows:
            found[name] = Estimate(None, reason="the reference holds statistics only, no images")
        else:
            try:
                found |= this.compute(real, fake, blocks, device)
            except ValueError as error:
                found[name] = Estimate(None, reason=str(error))
    return found


def _pools(real: Features, fake: Features, device: torch.device) -> tuple[Tensor, Tensor]:
    real_rows, fake_rows = (torch.from_numpy(np.asarray(each.rows["pool"])).to(device) for each in (real, fake))
    return real_rows, fake_rows
