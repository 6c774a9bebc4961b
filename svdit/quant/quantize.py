"""quantize_(model, config, forward_loop): any nn.Module, in place, one call.

    model = MyTransformer()
    config = QuantConfig((Rule("head", None), Rule("*", recipe_for("w8a8"))))
    report = quantize_(model, config, lambda m: [m(x) for x in batches])

The forward loop runs the model on typical inputs, the same at every call. Layers are observed together as far as
memory allows, and solved one after the other; with a `work_dir` every solved layer is kept there, so that a run that
was killed goes on where it stopped and ends with the same bits.
"""

import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from svdit import distributed
from svdit.errors import UserError
from svdit.quant.config import QuantConfig, Recipe
from svdit.quant.linear import linears, quantized_layers, swap
from svdit.quant.observe import ForwardLoop, Statistics, observe
from svdit.quant.report import QuantReport
from svdit.quant.resume import Results
from svdit.quant.solve import quantize_linear

Progress = Callable[[int, int], None]


def quantize_(
    model: nn.Module,
    config: QuantConfig,
    forward_loop: ForwardLoop | None = None,
    *,
    max_memory: float = 8e9,
    work_dir: Path | None = None,
    run_id: str = "",
    statistics: dict[str, Statistics] | None = None,
    progress: Progress = lambda done, total: None,
) -> QuantReport:
    """Replace the linears that `config` names by SVDLinears, in place.

    `max_memory` bounds the bytes of calibration statistics held at once; what does not fit is observed in further
    runs of the loop. `statistics` are what a run of it has given already; they are used up. `run_id` names what the
    forward loop and the weights are: work of another run is refused. `progress(done, total)` counts layers. Under
    torchrun the processes share the layers; all end with the same model.
    Raises UserError for a model that is quantized already, for NaN or Inf, and for layers the loop never reaches.
    """
    if done := quantized_layers(model):
        raise UserError(
            f"this model is quantized already ({next(iter(done))}); start from the full-precision checkpoint"
        )
    plan = {name: recipe for name, _ in linears(model) if (recipe := config.recipe(name))}
    if not plan:
        raise UserError("no rule of the configuration matches a linear layer of this model")
    for name, recipe in plan.items():
        check_fit(recipe, linear_of(model, name))
    report = QuantReport(bytes_before=model_bytes(model))
    results = Results(work_dir, plan, run_id)
    mine = [name for i, name in enumerate(plan) if i % distributed.world_size() == distributed.rank()]
    waiting = [name for name in mine if name not in results]
    for chunk in chunks(model, plan, waiting, max_memory):
        start = time.perf_counter()
        inputs = observe_needed(model, plan, chunk, forward_loop) if statistics is None else statistics
        observed = time.perf_counter()
        for name in chunk:
            results[name] = quantize_linear(name, linear_of(model, name), plan[name], inputs.pop(name, None))
            progress(len(results), len(mine))
        report.seconds["calibrate"] = report.seconds.get("calibrate", 0) + observed - start
        report.seconds["quantize"] = report.seconds.get("quantize", 0) + time.perf_counter() - observed
    for name, (layer, line) in results.collect(list(plan)).items():
        swap(model, name, layer)
        report.layers.append(line)
    report.bytes_after = model_bytes(model)
    return report


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def check_fit(recipe: Recipe, linear: nn.Linear) -> None:
    """A UserError, before the long work, where a format's groups do not divide the layer's width."""
    for form in (recipe.weight, recipe.act, recipe.factors):
        if form:
            form.groups(linear.in_features)


def model_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def chunks(model: nn.Module, plan: dict[str, Recipe], names: list[str], max_memory: float) -> list[list[str]]:
    """Names in order, cut so that the statistics of each piece stay within `max_memory` bytes."""
    pieces: list[list[str]] = []
    held = float("inf")
    for name in names:
        need = Statistics.nbytes(linear_of(model, name).in_features) if plan[name].needs_inputs else 0
        if held + need > max_memory or not pieces:
            pieces.append([])
            held = 0
        pieces[-1].append(name)
        held += need
    return pieces


def observe_needed(
    model: nn.Module, plan: dict[str, Recipe], names: list[str], loop: ForwardLoop | None
) -> dict[str, Statistics]:
    """Statistics of those layers whose recipe asks for them."""
    needed = [name for name in names if plan[name].needs_inputs]
    if not needed:
        return {}
    if loop is None:
        raise UserError(f"the recipe of {needed[0]} needs calibration; give quantize_ a forward loop")
    return observe(model, needed, loop)
