"""quantize_(model, config, forward_loop): any nn.Module, in place, one call.

    model = MyTransformer()
    config = QuantConfig((Rule("head", None), Rule("*", recipe_for("w8a8"))))
    report = quantize_(model, config, lambda m: [m(x) for x in batches])

The forward loop runs the model on typical inputs, the same at every call. As many layers as fit in memory are
observed at once, then solved one after the other. With a `work_dir`, an interrupted run resumes with the same bits.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from svdit import distributed
from svdit.errors import UserError
from svdit.quant.config import QuantConfig
from svdit.quant.linear import swap
from svdit.quant.observe import ForwardLoop, Statistics, chunks, full_precision, observe
from svdit.quant.report import QuantReport
from svdit.quant.resume import Results
from svdit.quant.select import select
from svdit.quant.solve import quantize_linear

Progress = Callable[[int, int], None]


@torch.inference_mode(False)
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
    """Replace the linears that `config` selects by SVDLinears, in place.

    `max_memory` bounds the bytes of calibration statistics held at once; with less, the loop runs several times.
    `statistics` are those of an earlier run of the loop; they are consumed. `run_id` identifies the weights and the
    loop: work of another run is refused. `progress(done, total)` counts layers. Under torchrun the processes share
    the layers and end with the same model.
    Raises UserError for what `select` and `observe` refuse, for arguments of other types, for a missing loop, and for
    work of another run.
    """
    for value, kind in ((model, nn.Module), (config, QuantConfig)):
        if not isinstance(value, kind):
            raise UserError(f"quantize_ got a {type(value).__name__}; pass a {kind.__name__}")
    selection = select(model, config)
    names = list(selection.recipes)
    report = QuantReport(bytes_before=model_bytes(model), skipped=selection.skipped)
    results = Results(work_dir, selection.recipes, run_id)
    mine = names[distributed.rank() :: distributed.world_size()]
    pending = [name for name in mine if name not in results]
    needing = [name for name in pending if selection.recipes[name].needs_inputs]
    if needing and forward_loop is None and statistics is None:
        raise UserError(f"the recipe of {needing[0]} needs calibration; pass a forward loop to quantize_")
    sizes = {n: Statistics.nbytes(selection.linears[n].in_features) if n in needing else 0 for n in pending}
    for chunk in chunks(sizes, max_memory):
        start = time.perf_counter()
        inputs = statistics
        if inputs is None:
            needed = [name for name in chunk if name in needing]
            inputs = observe(model, needed, forward_loop) if needed and forward_loop is not None else {}
        observed = time.perf_counter()
        for name in chunk:
            linear, recipe = selection.linears[name], selection.recipes[name]
            with full_precision(linear.weight.device):
                results[name] = quantize_linear(name, linear, recipe, inputs.pop(name, None))
            progress(len(results), len(mine))
        report.add_seconds(calibrate=observed - start, quantize=time.perf_counter() - observed)
    layers: dict[str, nn.Module] = {}
    for name, (layer, line) in results.collect(names).items():
        like = selection.linears[name].weight
        layer.dtype = like.dtype
        layers[name] = layer.to(like.device)
        report.layers.append(line)
    swap(model, layers)
    report.bytes_after = model_bytes(model)
    return report


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The Linear called `name`."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def model_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a model."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())
