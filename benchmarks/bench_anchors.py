"""One block of DiT-XL/2 compared with other runtimes: SDNQ with an SVD branch, torchao, OpenVINO, each as documented.

    pip install -e '.[bench]'
    python benchmarks/bench_anchors.py

All runtimes quantize the same random float block, and errors are relative to that block. Float operations use bfloat16
if the processor has bf16 dot products, else fp32. The protocol is that of bench_cpu.py.
"""

import argparse
import copy
import statistics

import torch
import torch.nn.functional as F
from bench_cpu import HAS_BF16
from random_models import in_floats, model_inputs, quantized
from timing import Run, measure, ratio, steady
from torch import Tensor, nn

from svdit.kernels.cpu import choice
from svdit.model.dit import DiT
from svdit.quant.config import dit_config, recipe_for
from svdit.quant.quantize import quantize_
from svdit.runtime.accelerate import accelerate

DTYPE = torch.bfloat16 if HAS_BF16 else torch.float32


def ours(model: DiT, preset: str, x: Tensor, c: Tensor, **changes: int) -> Run:
    """svdit with every linear quantized, adaLN included, by a preset with changes. x (N, T, D), c (N, D)."""
    adaln = "int4" if preset == "w4a8" else "int8"
    quantize_(model, dit_config(recipe_for(preset, **changes), adaln), lambda model: model(*model_inputs(16)))
    fast, c = accelerate(model), F.silu(c)[:, None]
    block = fast.blocks[0]
    return lambda: block(x.clone(), fast.modulations(c, slice(None), [0])[0], None)  # the block updates x in place


def sdnq(block: nn.Module, x: Tensor, c: Tensor) -> Run:
    """SDNQ: INT8 with a rank-32 branch; SDNQ compiles its own layers. x (N, T, D), c (N, D)."""
    from sdnq import sdnq_post_load_quant

    options = {"weights_dtype": "int8", "use_svd": True, "svd_rank": 32, "use_quantized_matmul": True}
    block = sdnq_post_load_quant(block.to(DTYPE), torch_dtype=DTYPE, **options)
    x, c = x.to(DTYPE), c.to(DTYPE)
    return lambda: block(x, c)


def torchao(block: nn.Module, x: Tensor, c: Tensor) -> Run:
    """torchao: INT8 with per-token and per-row scales, compiled. x (N, T, D), c (N, D)."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.utils import should_reduce_range

    block = block.to(DTYPE)
    quantize_(block, Int8DynamicActivationInt8WeightConfig(reduce_range=should_reduce_range(torch.device("cpu"))))
    compiled, x, c = torch.compile(block), x.to(DTYPE), c.to(DTYPE)
    return lambda: compiled(x, c)


def openvino(block: nn.Module, x: Tensor, c: Tensor) -> Run:
    """OpenVINO: NNCF's static quantization for transformers, calibrated on the test inputs. x (N, T, D), c (N, D).

    Float operations are fp32, which was faster than OpenVINO's default, bfloat16.
    """
    import nncf
    import openvino as ov

    converted, inputs = ov.convert_model(block, example_input=(x, c)), (x.numpy(), c.numpy())
    kind = nncf.ModelType.TRANSFORMER
    converted = nncf.quantize(converted, nncf.Dataset([inputs]), subset_size=1, model_type=kind)
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = ov.compile_model(converted, "CPU", hints)
    return lambda: torch.from_numpy(compiled(inputs)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three rounds, no recording")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, c = torch.randn(2, 256, 1152), torch.randn(2, 1152)
    model = in_floats(quantized("W8A8", "int8", depth=1))
    block = model.blocks[0]
    candidates: dict[str, Run] = {"fp32 eager": lambda: block(x, c)}
    for preset in ("w8a8", "w4a8"):
        candidates[f"svdit {preset}"] = ours(copy.deepcopy(model), preset, x, c)
    candidates["svdit w8a8, rank 32"] = ours(copy.deepcopy(model), "w8a8", x, c, rank=32)
    with torch.no_grad():
        for name, build in {"SDNQ INT8, SVD 32": sdnq, "torchao INT8": torchao, "OpenVINO INT8": openvino}.items():
            try:
                candidates[name] = build(copy.deepcopy(block), x, c)
                candidates[name]()
            except Exception as error:  # third-party code may raise anything
                candidates.pop(name, None)
                print(f"{name} is unavailable: {str(error).splitlines()[0]}")
        times = measure(candidates, 3 if args.quick else args.rounds, calls=3)
        keep = steady(times["fp32 eager"]) and not args.quick
        expected = block(x, c)
        for name, run in candidates.items():
            error = float((run().float() - expected).norm() / expected.norm())
            milliseconds = 1e3 * statistics.median(times[name])
            over = ratio(times, name, "svdit w8a8")
            print(f"{name:20} {milliseconds:8.1f} ms, {over.value:5.2f} × svdit w8a8's, {over}; error {error:.2g}")
            if keep:
                note = f"{milliseconds:.1f} ms; error {error:.2g}; a block, batch 2, {choice.choice()}"
                over.record("anchors", f"{name}, time over svdit w8a8", "×", note)


if __name__ == "__main__":
    main()
