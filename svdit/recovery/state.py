"""The state of a recovery, and the file it resumes from.

It needs no random state: every image is a function of the seed and its number. Its checksums are compared before it is
used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.fields import from_json
from svdit.recovery.layers import TrainableLinear
from svdit.sampling.fidelity import Psnr
from svdit.storage.states import cloned, read_state, write_state

Tensors = dict[str, Tensor]
DECAY = 0.99  # of the average
CONTENT = {
    "parameters": dict, "average": dict, "best": dict, "optimizer": dict, "step": int, "seconds": float, "curve": list,
    "binding": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A measurement on held-out images; `loss` is the mean squared error while training since the one before."""

    step: int
    loss: float | None
    psnr: float
    pooled: float


@dataclass
class State:
    """`step` counts training steps, `seconds` their time.

    What is measured is a moving average of the parameters; `best` is that of the best measurement.
    """

    parameters: dict[str, nn.Parameter]
    average: Tensors
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    best: Tensors = field(default_factory=dict)

    def add(self, loss: float | None, measured: Psnr) -> None:
        """Add a measurement, and keep the average if it is the best."""
        self.curve.append(Point(self.step, loss, *measured))
        if self.best_point is self.curve[-1]:
            self.best = {name: average.clone() for name, average in self.average.items()}

    @property
    def best_point(self) -> Point:
        """The first measurement with the highest PSNR."""
        return max(self.curve, key=lambda point: point.psnr)

    @property
    def idle(self) -> int:
        """Measurements since the best one."""
        return len(self.curve) - 1 - self.curve.index(self.best_point)

    @torch.no_grad()
    def advance(self) -> None:
        """Count a training step, and move the average; its decay rises from 0.1, which discounts the start."""
        decay = min(DECAY, (1 + self.step) / (10 + self.step))
        self.step += 1
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def load(self, values: Tensors) -> None:
        """Give the parameters these values (…)."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the parameters are their averages."""
        values = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.load(self.average)
        yield
        self.load(values)


def fresh(layers: dict[str, TrainableLinear], lr: float) -> State:
    """The state of a new run with Adam."""
    parameters = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.changes.items()}
    average = {name: value.detach().clone() for name, value in parameters.items()}
    return State(parameters, average, torch.optim.Adam(parameters.values(), lr=lr, betas=(0.9, 0.99), eps=1e-20))


def save(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Write the file whole or not at all; `binding`: what a resumed run must share."""
    content = {
        "parameters": {name: parameter.detach() for name, parameter in state.parameters.items()},
        "average": state.average,
        "best": state.best,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "curve": [asdict(point) for point in state.curve],
        "binding": binding,
    }
    write_state(path, content)


def restore_(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Load the file into `state`, in place. Raises UserError for a damaged or foreign file, or of another run."""
    content = read_state(path, CONTENT, "recover", "choose another --output")
    for key, value in binding.items():
        if (before := content["binding"].get(key)) != value:
            raise UserError(
                f"{path} is of a run with {key} {before}, not {value}; use the same, or choose another --output"
            )
    try:
        state.load(content["parameters"])
        for key in ("average", "best"):
            setattr(state, key, {name: content[key][name].to(p.device).clone() for name, p in state.parameters.items()})
        state.optimizer.load_state_dict(cloned(content["optimizer"]))
        state.curve = [from_json(Point, point) for point in content["curve"]]
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the model ({str(error).splitlines()[0]}); choose another --output"
        ) from None
    state.step, state.seconds = content["step"], content["seconds"]
