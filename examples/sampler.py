"""Add a sampler: a function of the signature in svdit/diffusion/samplers.py, and an entry in the table of its kind.

    python examples/sampler.py

Adams–Bashforth of second order for flows: one evaluation a step as Euler's method, extrapolated from the step before.
"""

from itertools import pairwise

from torch import Tensor

import svdit
from svdit.diffusion.flow import FlowSchedule
from svdit.diffusion.flow_samplers import FLOW_SAMPLERS
from svdit.diffusion.ode import velocity
from svdit.diffusion.samplers import Callback, Denoise, Noise, silent


def adams_bashforth(
    denoise: Denoise,
    x: Tensor,
    schedule: FlowSchedule,
    *,
    noise: Noise,
    prediction: str = "velocity",
    callback: Callback = silent,
) -> Tensor:
    """x += h (3 v_n − v_{n−1}) / 2 of images (N, C, H, W); the first step is Euler's."""
    previous = None
    for done, (t, following) in enumerate(pairwise(schedule.times), 1):
        v = velocity(denoise, schedule, prediction, t)(x, t)
        x = x + (following - t) * (v if previous is None else (3 * v - previous) / 2)
        previous = v
        callback(done, x)
    return x


FLOW_SAMPLERS["ab2"] = adams_bashforth

model = svdit.load("digits-sit")
exact = svdit.sample(model, range(4), sampler="rk4", steps=41, cfg_scale=1.5)
psnr = {
    name: svdit.psnr(svdit.sample(model, range(4), sampler=name, steps=26, cfg_scale=1.5), exact)  # 25 steps
    for name in ("euler", "ab2")
}
print(*(f"{name}: PSNR {value:.1f} dB to 40 steps of rk4" for name, value in psnr.items()), sep="\n")
