"""The samplers of flow models, of the signature in `svdit.diffusion.samplers` with a `FlowSchedule`."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from svdit.diffusion.dopri5 import dopri5
from svdit.diffusion.ode import METHODS, ode
from svdit.diffusion.sde import euler_maruyama, heun, sde

FLOW_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": partial(ode, METHODS["euler"]),
    "heun": partial(ode, METHODS["heun"]),
    "heun3": partial(ode, METHODS["heun3"]),
    "midpoint": partial(ode, METHODS["midpoint"]),
    "rk4": partial(ode, METHODS["rk4"]),
    "dopri5": dopri5,
    "sde": partial(sde, euler_maruyama),
    "sde-heun": partial(sde, heun),
}
SDE_SAMPLERS = ("sde", "sde-heun")
