"""What can be asked of an evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from svdit.distributed import default_device
from svdit.errors import UserError

NETWORK_METRICS = ("fid", "sfid", "kid", "is", "prc", "mind", "fid_inf")
METRICS = (*NETWORK_METRICS, "paired", "lpips")


@dataclass(frozen=True)
class Options:
    """`metrics` None takes what the inputs allow; of those named, `Report.failed` lists what could not be had."""

    metrics: tuple[str, ...] | None = None
    num_images: int | None = None  # of both sides; a seeded choice with the classes in proportion
    paired: str | Path | None = None  # full-precision counterparts of the generated images
    compare: str | Path | None = None  # a second generated set, of the same seeds
    seed: int = 0
    resize_to: int | None = None
    allow_fewer: bool = False
    batch_size: int = 32
    device: torch.device = field(default_factory=default_device)
    cache: Path | None = None
    save_stats: Path | None = None

    def __post_init__(self) -> None:
        for name in self.metrics or ():
            if name not in METRICS:
                raise UserError(f"there is no metric {name!r}; choose from {', '.join(METRICS)}")
        for name in ("num_images", "batch_size", "resize_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")

    @property
    def wants_pairs(self) -> bool:
        """Counterparts are asked for by name; without `metrics` they are welcome where they can be found."""
        return bool({"paired", "lpips"} & set(self.metrics or ()))

    @property
    def network_metrics(self) -> tuple[str, ...]:
        """Those asked for that need the network."""
        return tuple(name for name in NETWORK_METRICS if self.metrics is None or name in self.metrics)
