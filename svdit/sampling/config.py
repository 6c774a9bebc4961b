"""How images are sampled: the settings, each family's defaults, and the schedule they mean for a model.

`SCRIPTS` has what the families' published scripts do otherwise (SiT, REPA, LightningDiT, JiT).
"""

import json
import math
import re
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch

from svdit.diffusion.flow import SDE, FlowSchedule, flow_times
from svdit.diffusion.flow_samplers import FLOW_SAMPLERS, SDE_SAMPLERS
from svdit.diffusion.guidance import Interval
from svdit.diffusion.paths import Path
from svdit.diffusion.samplers import SAMPLERS
from svdit.diffusion.schedule import Schedule, make_schedule
from svdit.diffusion.sde import FORMS, LAST_STEPS, diffusion
from svdit.errors import UserError, unknown
from svdit.model.config import DiTConfig


@dataclass(frozen=True)
class Script:
    """A family's sampling script: its defaults, and what no option changes."""

    defaults: dict[str, Any]
    counts_times: bool = False  # the steps of an ODE are the number of its times, both ends included
    last_euler: bool = False  # Heun's last step is Euler's
    dtype: torch.dtype = torch.float32  # of the images between the steps, and of the times
    strict: bool = False  # see Interval
    by_step: bool = False
    least_scale: float = 0.0  # a smaller guidance scale has the effect of this one


SCRIPTS: dict[str, Script] = {
    "dit": Script({}),
    "sit": Script({"sampler": "sde", "cfg_scale": 1.0}, counts_times=True),
    "repa": Script(
        {"sampler": "euler", "steps": "50", "cfg_scale": 1.5, "cfg_channels": None, "sde_form": "linear"},
        last_euler=True,
        dtype=torch.float64,
        by_step=True,
        least_scale=1.0,
    ),
    "lightningdit": Script(
        {"sampler": "euler", "cfg_scale": 6.7, "cfg_interval": (0.125, 1.0), "time_shift": 0.3}, counts_times=True
    ),
    "jit": Script(
        {"sampler": "heun", "steps": "50", "cfg_scale": 1.0, "cfg_channels": None}, last_euler=True, strict=True
    ),
}


@dataclass(frozen=True)
class SamplingConfig:
    """Sampler, its steps ("250", "ddim50", …), guidance, and options of flows; the defaults are DiT's.

    `steps` of a flow is the number that its family's script calls so: of steps, or of times (SiT and LightningDiT).
    `cfg_channels` None guides every channel. `cfg_interval` has the first and last guided time, in the model's own
    time: timesteps, 0 … 999, or 0 to 1; None: all.
    """

    sampler: str = "ddpm"
    steps: str = "250"
    cfg_scale: float = 4.0
    cfg_channels: int | None = 3
    cfg_interval: tuple[float, float] | None = None
    time_shift: float = 1.0
    sde_form: str = "sigma"
    sde_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04

    def __post_init__(self) -> None:
        """Raises UserError for values that cannot be sampled with."""
        object.__setattr__(self, "steps", str(self.steps))  # from Python a number will do
        self._check_types()
        for value, what, choices in (
            (self.sampler, "sampler", SAMPLERS | FLOW_SAMPLERS),
            (self.sde_form, "SDE form", FORMS),
            (self.last_step, "last step", LAST_STEPS),
        ):
            if value not in choices:
                raise unknown(what, value, choices)
        if not (math.isfinite(self.cfg_scale) and self.cfg_scale >= 0):
            raise UserError(
                f"the guidance scale is {self.cfg_scale}; choose 1 for no guidance, or 1.5 or 4, for example"
            )
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise UserError(f"cfg_channels is {self.cfg_channels}; choose at least 1, or None for all channels")
        for name in ("time_shift", "sde_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; choose a number above 0, 1 for example")
        if not 0 < self.last_step_size < 1:
            raise UserError(f"last_step_size is {self.last_step_size}; choose a number between 0 and 1, as 0.04")
        (self._check_flow if self.sampler in FLOW_SAMPLERS else self._check_timesteps)()

    def _check_types(self) -> None:
        for name in ("cfg_scale", "time_shift", "sde_norm", "last_step_size"):
            if not isinstance(value := getattr(self, name), Real):
                raise UserError(f"{name} is {value!r}; choose a number")
        if not isinstance(self.cfg_channels, int | None):
            raise UserError(f"cfg_channels is {self.cfg_channels!r}; choose a number, or None for all channels")
        pair = self.cfg_interval
        numbers = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, Real) for x in pair)
        if pair is not None and not numbers:
            raise UserError(f"cfg_interval is {pair!r}; choose two numbers, or None to guide everywhere")

    def _check_timesteps(self) -> None:
        first, last = self.cfg_interval or (0, 999)
        if not 0 <= first <= last < 1000:
            raise UserError(f"cfg_interval is {first} to {last}; choose two ascending timesteps from 0 to 999")
        timesteps = make_schedule(self.steps).timesteps.tolist()
        if self.cfg_interval is not None and not any(first <= t <= last for t in timesteps):
            raise UserError(
                f"cfg_interval is {first} to {last}, without a timestep of the {self.steps} sampling steps; "
                "choose a wider one, or a guidance scale of 1"
            )

    def _check_flow(self) -> None:
        first, last = self.cfg_interval or (0.0, 1.0)
        if not 0 <= first <= last <= 1:
            raise UserError(f"cfg_interval is {first} to {last}; choose two ascending times from 0 to 1")
        if not re.fullmatch(r"[1-9]\d{0,5}", self.steps, re.ASCII):
            raise UserError(f"{self.steps!r} is not a number of sampling steps of a flow; use 50 or 250, for example")
        if self.time_shift != 1 and self.sampler in SDE_SAMPLERS:
            raise UserError(
                f"time_shift is {self.time_shift} and the sampler {self.sampler}; choose an ODE sampler, euler for "
                "example, or a time_shift of 1"
            )

    def schedule(self, model: DiTConfig) -> Schedule | FlowSchedule:
        """The sampling steps for a model; its length is their number.

        Raises UserError for settings that do not fit the model.
        """
        _check_sampler(self.sampler, model)
        return self._flow_schedule(model) if model.is_flow else make_schedule(self.steps)

    def _flow_schedule(self, model: DiTConfig) -> FlowSchedule:
        script, path = SCRIPTS[model.family], Path(model.path, model.time)
        sde = None
        if self.sampler in SDE_SAMPLERS:
            sde = SDE(self.sde_form, self.sde_norm, self.last_step, self.last_step_size)
        points = int(self.steps) + (0 if sde or script.counts_times else 1)
        if points < 2:
            raise UserError(f"{self.sampler} needs more than {self.steps} sampling step; choose at least 2")
        times = flow_times(points, path, model.prediction, sde=sde, shift=self.time_shift, dtype=script.dtype)
        schedule = FlowSchedule(times, path, sde, script.last_euler)
        if sde:
            _check_sde(schedule, model, self.sampler)
        interval = self.interval(model)
        if interval and self.sampler != "dopri5" and not any(interval.contains(t) for t in times[:-1]):
            raise UserError(
                f"cfg_interval is {interval.low} to {interval.high}, without a time of the {self.steps} sampling "
                "steps; choose a wider one, or a guidance scale of 1"
            )
        return schedule

    def interval(self, model: DiTConfig) -> Interval | None:
        """Where a model is guided; None: everywhere."""
        script = SCRIPTS[model.family]
        return Interval(*self.cfg_interval, script.strict, script.by_step) if self.cfg_interval else None

    def scale(self, model: DiTConfig) -> float:
        """The guidance scale that a model is guided with; 1: not at all."""
        return max(self.cfg_scale, SCRIPTS[model.family].least_scale)


def recorded(config: SamplingConfig) -> dict[str, Any]:
    """The fields as JSON has them."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return fields


def _check_sampler(sampler: str, model: DiTConfig) -> None:
    """Raises UserError for a sampler of other models."""
    samplers = FLOW_SAMPLERS if model.is_flow else SAMPLERS
    if sampler in SAMPLERS | FLOW_SAMPLERS and sampler not in samplers:
        raise UserError(
            f"the sampler {sampler} is not for models of the family {model.family}; choose one of {', '.join(samplers)}"
        )


def _check_sde(schedule: FlowSchedule, model: DiTConfig, sampler: str) -> None:
    """Raises UserError for an SDE that would give NaN, or that is another than the model's."""
    assert schedule.sde
    if sampler == "sde-heun" and schedule.sde.last_step == "none" and schedule.path.forward(schedule.times[-1]) == 1:
        raise UserError(
            "sde-heun without a last step calls the model at the data, where the score of this model is infinite; "
            "choose the sampler sde, or a last step, mean for example"
        )
    if not diffusion(schedule, schedule.times[:-1]).isfinite().all():
        others = ", ".join(form for form in FORMS if form != schedule.sde.form)
        raise UserError(
            f"the SDE form {schedule.sde.form} is infinite at the first time of this model; choose one of {others}"
        )
    if model.noise_scale != 1:
        raise UserError(
            f"an SDE needs noise of standard deviation 1, but this model's is {model.noise_scale:g}; choose an ODE "
            "sampler, heun for example"
        )


def default_sampling(model: DiTConfig, **overrides: Any) -> SamplingConfig:
    """The defaults of the sampling script of a model's family. Raises UserError for values that do not fit."""
    options = {**SCRIPTS[model.family].defaults, **overrides}
    if "sampler" in options:  # before other options are compared with it
        _check_sampler(options["sampler"], model)
    return SamplingConfig(**options)
