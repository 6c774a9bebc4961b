"""All that a run is at one step, and the file it goes on from: `last.pt`.

The file holds no random state: every draw of the run is a function of the seed and the number of the example.
"""

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdit.errors import UserError
from svdit.files import atomic_path
from svdit.model.dit import DiT


@dataclass
class State:
    """`step` counts finished steps, `seconds` the time they took."""

    model: DiT
    ema: DiT
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0


def fresh(model: DiT, lr: float) -> State:
    """Step 0 of a run that starts from `model`."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    return State(model, copy.deepcopy(model).requires_grad_(False).eval(), optimizer)


def save(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Write the file whole or not at all; `binding` is what a run that goes on must agree with."""
    content = {
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "opt": state.optimizer.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "binding": binding,
    }
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def restore(state: State, path: Path, binding: dict[str, Any]) -> None:
    """Bring `state` to where the file stands; a run with other options is refused."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); remove it to start from the beginning") from None
    for key, value in binding.items():
        if (before := content["binding"].get(key)) != value:
            raise UserError(f"{path} was trained with {key} {before}, not {value}; give the same or another folder")
    state.model.load_state_dict(content["model"])
    state.ema.load_state_dict(content["ema"])
    state.optimizer.load_state_dict(content["opt"])
    state.step, state.seconds = content["step"], content["seconds"]
