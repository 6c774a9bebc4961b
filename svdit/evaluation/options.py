"""The options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from svdit.distributed import default_device
from svdit.errors import UserError, check_names
from svdit.evaluation.metrics import METRICS


@dataclass(frozen=True)
class Options:
    """`metrics` None: all that the inputs allow. Of named metrics, `Report.failed` lists the unavailable ones."""

    metrics: tuple[str, ...] | None = None
    num_images: int | None = None  # of both sides: a seeded choice with the classes in proportion
    paired: str | Path | None = None  # full-precision counterparts of the generated images
    compare: str | Path | None = None  # a second generated set, of the same seeds
    seed: int = 0
    resize_to: int | None = None
    allow_fewer: bool = False
    batch_size: int = 32
    device: torch.device = field(default_factory=default_device)
    cache: Path | None = None
    save_stats: Path | None = None
    progress: bool = False  # show progress bars on stderr

    def __post_init__(self) -> None:
        if self.metrics is not None and not self.metrics:
            raise UserError(f"metrics is {self.metrics!r}; choose from {', '.join(METRICS)}, or pass None for all")
        check_names("metric", self.metrics or (), METRICS)
        for name in ("num_images", "batch_size", "resize_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be from 0 to 2^32 - 1")
        asked = ",".join(self.metrics or ())
        if self.paired is not None and self.metrics is not None and not self.wants_pairs:
            raise UserError(f"--paired_dir has no effect on --metrics {asked}; add paired, or omit --paired_dir")
        if self.save_stats is not None and not self.network_metrics:
            raise UserError(f"--save-stats has no effect on --metrics {asked}; add fid, or omit --save-stats")

    @property
    def wants_pairs(self) -> bool:
        """Whether a metric of pairs is named; without `metrics`, pairs are measured if there are counterparts."""
        return any(METRICS[name].distances for name in self.metrics or ())

    @property
    def network_metrics(self) -> tuple[str, ...]:
        """The requested metrics that are computed from features, in the order of METRICS."""
        return tuple(name for name, metric in METRICS.items() if metric.compute and name in (self.metrics or METRICS))
