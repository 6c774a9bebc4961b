"""Speed of a quantized model of each kind of block on a CUDA device, compared with the same model in bfloat16.

    python benchmarks/bench_gpu.py                       # batch 64 and 2: whole model, products, memory, start-up
    python benchmarks/bench_gpu.py --quick               # 6 blocks, batch 8, three rounds, no recording

Weights are random, and the float model has exactly the dequantized weights. All candidates run in one process, in
shuffled order each round. CUDA events time a few runs on alternating inputs; times are medians, ratios are medians of
per-round ratios. The device's peak rates are measured in the same run. A run whose baseline varies by more than 15 %
(p90 / p10) is void and not recorded. Clocks are not locked.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle

import torch
from bench_cpu import FAMILIES, LAYERS, SCHEMES, Setting
from random_models import in_floats, model_inputs, random_layer, random_model
from record import record
from timing import ratio, steady
from torch import Tensor, nn

from svdit.kernels import ops
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.model.dit import DiT, DiTConfig
from svdit.model.zoo import config_for
from svdit.quant.linear import LinearSpec
from svdit.runtime.accelerate import accelerate
from svdit.runtime.dit import FastDiT
from svdit.runtime.graph import Replayed

RUNS = 4  # runs between two events, one per batch
Run = Callable[[], Tensor]


def measure(candidates: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds per candidate and round, after a warm-up, in a newly shuffled order each round."""
    order, times = random.Random(0), {name: list[float]() for name in candidates}
    for run in candidates.values():
        for _ in range(RUNS):
            run()
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(RUNS):
                candidates[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / RUNS)
    return times


def ceilings(rounds: int) -> dict[str, float]:
    """Peak rates: TFLOP/s of a bf16 product, TOP/s of torch's INT8 product, TB/s of a copy (read plus write)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    i, j = (torch.randint(-127, 128, (8192, 8192), device="cuda", dtype=torch.int8) for _ in range(2))
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    runs: dict[str, Run] = {
        "bf16": lambda: a @ b,
        "int8": lambda: torch._int_mm(i, j.t()),
        "copy": lambda: target.copy_(source),
    }
    median = {name: statistics.median(times) for name, times in measure(runs, rounds).items()}
    work = {"bf16": 2 * 8192**3, "int8": 2 * 8192**3, "copy": 2 * source.numel()}
    return {name: work[name] / seconds / 1e12 for name, seconds in median.items()}


def inputs(batch: int, config: DiTConfig) -> list[tuple[Tensor, Tensor, Tensor]]:
    """RUNS guided batches of different noise: x (N, C, H, W), t and y (N,)."""
    x, t, y = (part.cuda() for part in model_inputs(batch, config))
    return [(x + 0.1 * k * torch.randn_like(x), t, y) for k in range(RUNS)]


def in_turn(model: Callable[..., Tensor], batches: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> Run:
    """Each call runs the model on the next batch."""
    turn = cycle([(x.to(dtype), t, y) for x, t, y in batches])
    return lambda: model(*next(turn))


def floats(model: DiT, batches: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Run]:
    """The bfloat16 model: eager, and compiled with max-autotune in a CUDA graph."""
    half = copy.deepcopy(model).bfloat16()
    compiled = torch.compile(half, mode="max-autotune-no-cudagraphs")
    start = time.perf_counter()
    x, t, y = batches[0]
    compiled(x.bfloat16(), t, y)
    torch.cuda.synchronize()
    print(f"torch.compile took {time.perf_counter() - start:.0f} s")
    return {
        "bf16 eager": in_turn(half, batches, torch.bfloat16),
        "bf16 max-autotune + CUDA graph": in_turn(Replayed(compiled), batches, torch.bfloat16),
    }


def packed(
    name: str, config: DiTConfig, rank: int, batches: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[FastDiT, Tensor]:
    """The accelerated model, and the output of the dequantized model for the first batch, (N, C or 2C, H, W)."""
    model = random_model(config, *SCHEMES[name], rank).cuda()
    expected = in_floats(model)(*batches[0])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    fast = accelerate(model, "triton")
    assert isinstance(fast, FastDiT)
    fast(*batches[0])
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 2**20
    print(f"{name}: packing, autotuning and first run {seconds:.1f} s; peak {peak:.0f} MiB above the stored model")
    return fast, expected


def whole_model(model: str, setting: Setting, batch: int) -> None:
    """Whole model: time, speed-up over compiled bfloat16, and error."""
    config = config_for(model)
    config = replace(config, depth=min(config.depth, setting.depth))
    batches, baseline = inputs(batch, config), "bf16 max-autotune + CUDA graph"
    plain = in_floats(random_model(config, "W8A8", rank=setting.rank)).cuda()
    candidates, truth = floats(plain, batches), {"bf16": plain(*batches[0])}
    del plain
    ours: dict[str, FastDiT] = {}
    for name in SCHEMES:
        ours[name], truth[name] = packed(name, config, setting.rank, batches)
        candidates[f"{name} + CUDA graph"] = in_turn(ours[name], batches, torch.float32)
        candidates[name] = in_turn(ours[name].compute, batches, torch.float32)
    times = measure(candidates, setting.rounds)
    setting = replace(setting, keep=steady(times[baseline]) and setting.keep)
    shape = f"{config.depth} blocks, batch {batch}, rank {setting.rank}"
    print(f"\n{model} at 256 px, {shape}, {torch.cuda.get_device_name()}")
    for name, run in candidates.items():
        expected = truth[name.split(" + ")[0] if name.startswith("W") else "bf16"]
        error = float(
            (run().float() - expected).norm() / expected.norm()
        )  # after the timing, every candidate's next batch is the first
        median, over = statistics.median(times[name]), ratio(times, baseline, name)
        print(f"{name:32} {median * 1e3:9.2f} ms {over.value:6.2f} × {baseline}, {over}   error {error:.2g}")
        note = f"{median * 1e3:.2f} ms; {shape}, error {error:.2g}"
        setting.record(over, "gpu", f"{model}, {name}, over {baseline}, batch {batch}", "×", note)
    eager = [name for name, fast in ours.items() if not fast.step.graphs]
    print(f"not replayed as a graph: {', '.join(eager) or 'none'}")


def products(setting: Setting, batch: int, ceiling: dict[str, float]) -> None:
    """Each linear of a block of DiT-XL/2: fused kernels compared with torch's bfloat16, in TOP/s."""
    generator, M = torch.Generator().manual_seed(0), 256 * batch
    for name, (I, O) in LAYERS.items():
        linear = nn.Linear(I, O, device="meta")
        x = torch.randn(1, M, I, generator=generator).cuda()
        half, weight = x.bfloat16(), torch.randn(O, I, device="cuda", dtype=torch.bfloat16)
        runs: dict[str, Run] = {"bf16": lambda half=half, weight=weight: nn.functional.linear(half, weight)}
        for scheme, (_, act) in {"W8A8": ("int8", 8), "W4A8": ("int4", 8)}.items():
            form = WEIGHT_FORMATS[{"W8A8": "int8", "W4A8": "int4"}[scheme]]
            spec = LinearSpec(setting.rank, None, "bfloat16", form, Format(act), True, True, 64)
            layer = ops.pack(random_layer(linear, spec, generator).cuda().layer().detached(), "triton", inner=True)
            runs[scheme] = lambda layer=layer, x=x: layer(x)
            runs[f"{scheme} quantize alone"] = lambda layer=layer, x=x: layer.quantize(x)[0]
        median = {what: statistics.median(times) for what, times in measure(runs, setting.rounds).items()}
        rate = 2 * M * I * O / (median["W8A8"] - median["W8A8 quantize alone"]) / 1e12
        print(f"{name:5} {I}→{O}: " + ", ".join(f"{what} {1e3 * s:.3f} ms" for what, s in median.items()))
        print(f"      INT8 product {rate:.0f} TOP/s = {rate / ceiling['bf16']:.2f} × the bf16 peak")
        if setting.keep:
            record("gpu", f"INT8 product {I}→{O} with rank {setting.rank}", rate, "TOP/s", f"{M} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small model, few rounds, no recording")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 2])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    if reason := ops.reasons("cuda")["triton"]:
        print(f"GPU benchmark skipped: {reason}")
        return
    setting = Setting(6, args.rank, 3, keep=False) if args.quick else Setting(rank=args.rank, rounds=args.rounds)
    torch.set_grad_enabled(False)
    ceiling = ceilings(setting.rounds)
    print(", ".join(f"{what} {rate:.2f}" for what, rate in ceiling.items()), "(TFLOP/s, TOP/s, TB/s)")
    if setting.keep:
        for (what, rate), unit in zip(ceiling.items(), ("TFLOP/s", "TOP/s", "TB/s"), strict=True):
            record("gpu", f"ceiling, {what}", rate, unit, "8192³ products, a copy of 1 GiB")
    for batch in [8] if args.quick else args.batch:
        products(setting, batch, ceiling)
        for model in FAMILIES:
            whole_model(model, setting, batch)


if __name__ == "__main__":
    main()
