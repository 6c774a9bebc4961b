"""Bits and rank of every layer by --target-size, --target-sqnr or --target-psnr."""

import copy
from typing import TYPE_CHECKING, Any

from svdit.cli.quantize_settings import QuantizeSettings
from svdit.printing import note

if TYPE_CHECKING:
    from svdit.model.dit import DiT
    from svdit.quant.budget import Plan, Planner
    from svdit.quant.observe import ForwardLoop
    from svdit.quant.trials import Trial

STEPS = 50  # sampling steps of the images that choices are compared by


def planned(settings: QuantizeSettings, model: "DiT", loop: "ForwardLoop", record: dict[str, Any]) -> "Plan | None":
    """The plan for a target, recorded in `record`; None without a target."""
    from svdit.distributed import rank
    from svdit.progress import progress
    from svdit.quant.budget import observed

    size, sqnr, psnr = settings.target_size, settings.target_sqnr, settings.target_psnr
    if size is sqnr is psnr is None:
        return None
    memory = settings.max_memory * 1e9
    with progress("choosing formats", rank() == 0, "layers") as tick:
        planner = observed(model, settings.config, loop, max_memory=memory, progress=tick)
    record["plan"] = {"target_mb": size, "target_sqnr": sqnr}
    if settings.measured:
        tried = trials(settings, planner, model, loop)
        plan = tried[0].plan
        if rank() == 0 and len(tried) > 1:
            note(f"kept {plan.nbytes / 1e6:.2f} MB: PSNR {tried[0].psnr:.1f} dB")
        tries = [{"bytes": trial.plan.nbytes, "sqnr": trial.plan.sqnr, "psnr": trial.psnr} for trial in tried]
        record["plan"] |= {"target_psnr": psnr, "psnr": tried[0].psnr, "tries": tries}
    else:
        plan = planner.reaching(sqnr) if sqnr is not None else planner.within(round((size or 0) * 1e6))
    record["plan"]["sqnr"] = plan.sqnr
    return plan


def trials(settings: QuantizeSettings, planner: "Planner", model: "DiT", loop: "ForwardLoop") -> "list[Trial]":
    """The tried plans, the one to use first."""
    from svdit.distributed import on_first, rank
    from svdit.progress import progress
    from svdit.quant.quantize import quantize_
    from svdit.quant.trials import best_within, smallest_reaching
    from svdit.runtime.accelerate import accelerate
    from svdit.sampling.calibration import calibration_sampling
    from svdit.sampling.fidelity import Fidelity
    from svdit.sampling.numbers import COMPARED

    sampling = calibration_sampling(model.config, STEPS, settings.cfg_scale)
    memory = settings.max_memory * 1e9
    with progress("sampling in full precision", rank() == 0, "steps") as tick:
        fidelity = Fidelity(model, sampling, COMPARED, seed=settings.seed, progress=tick) if rank() == 0 else None

    def measure(plan: "Plan") -> float:
        statistics = dict(plan.statistics) if plan.statistics else None
        quantized = copy.deepcopy(model)
        with progress(f"trying {plan.nbytes / 1e6:.2f} MB", rank() == 0, "layers") as tick:
            quantize_(quantized, plan.config, loop, max_memory=memory, statistics=statistics, progress=tick)
        psnr = on_first(lambda: fidelity(accelerate(quantized)).pooled if fidelity else 0.0)
        if rank() == 0:
            note(f"tried {plan.nbytes / 1e6:.2f} MB: PSNR {psnr:.1f} dB")
        return psnr

    if settings.target_psnr is not None:
        return smallest_reaching(planner, settings.target_psnr, measure)
    return best_within(planner, round((settings.target_size or 0) * 1e6), measure)
