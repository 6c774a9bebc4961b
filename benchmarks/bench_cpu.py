"""Speed of a quantized DiT-XL/2, and of its families, on this CPU, compared with the same model in full precision.

    python benchmarks/bench_cpu.py                # whole model at batch 2 and 8, families, parts of a block, memory
    python benchmarks/bench_cpu.py --quick        # 4 blocks, batch 2, three rounds, no recording

Weights are random, and the full-precision model has exactly the dequantized weights, so the reported error is that of
rounding activations. All candidates run in one process, in shuffled order each round; times are medians, ratios are
medians of per-round ratios. A ratio is recorded with its 95 % confidence interval, unless that is wider than 10 % (3
points for shares) or the baseline varies by more than 15 % (p90 / p10). bfloat16 is skipped on processors without bf16
dot products, where it is slower than fp32.
"""

import argparse
import copy
import ctypes
import gc
import itertools
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bound import Bound, operations
from random_models import in_floats, model_inputs, quantized, random_layer, random_model
from record import record
from timing import Median, Run, measure, median, ratio, ratios, steady
from torch import Tensor, nn

from svdit.kernels import ops
from svdit.kernels.cpu import choice, ffi
from svdit.kernels.cpu import linear as cpu
from svdit.kernels.cpu.features import capabilities
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.model.dit import DiT, DiTConfig
from svdit.model.layers import attend
from svdit.model.zoo import config_for
from svdit.quant.linear import LinearSpec
from svdit.runtime.accelerate import accelerate

HAS_BF16 = any(capabilities().get(name) for name in ("avx512_bf16", "bf16"))  # bf16 is Arm's
SCHEMES = {"W8A8": ("W8A8", "int8"), "W4A8": ("W4A8", "int4"), "W4A4": ("W4A4", "int4")}  # blocks and adaLN
UNMEASURED = ("neonbf16", "neoni8mm", "neondot")
RESIDENT = Path("/proc/self/status")  # of Linux
FAMILIES = ("DiT-XL/2", "LightningDiT-XL/1", "JiT-B/16")
LAYERS = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}


@dataclass(frozen=True)
class Setting:
    """Size of the model, number of rounds, and whether to record results."""

    depth: int = 28
    rank: int = 32
    rounds: int = 9
    keep: bool = True

    def record(self, measured: Median, benchmark: str, name: str, unit: str, note: str = "") -> None:
        """Record a median, if this run is to be recorded."""
        if self.keep:
            measured.record(benchmark, name, unit, note)


def whole_model(setting: Setting, batch: int, compiled: bool) -> None:
    """Whole model: time, speed-up over eager fp32, and error."""
    x, t, y = model_inputs(batch)
    plain = in_floats(quantized("W8A8", "int8", setting.depth, setting.rank))
    candidates: dict[str, Run] = {
        "fp32 eager": lambda: plain(x, t, y),
        "fp32 eager medium": lambda: with_precision("medium", lambda: plain(x, t, y)),
    }
    if HAS_BF16:
        half = copy.deepcopy(plain).bfloat16()
        candidates["bf16 eager"] = lambda: half(x.bfloat16(), t, y)
    if HAS_BF16 and compiled:
        candidates["bf16 compile + freezing"] = compiled_model(copy.deepcopy(half), x.bfloat16(), t, y)
    truth, counts = {"fp32": plain(x, t, y)}, {}
    for name, (scheme, adaln) in SCHEMES.items():
        model = quantized(scheme, adaln, setting.depth, setting.rank)
        truth[name], counts[name] = in_floats(model)(x, t, y), operations(model, batch)
        fast = accelerate(model)
        candidates[name] = lambda fast=fast: fast(x, t, y)
    bound = Bound(choice.kernels())
    times = measure(candidates | {"peaks": bound}, setting.rounds)
    shape = f"{setting.depth} blocks, batch {batch}, rank {setting.rank}"
    print(f"\nDiT-XL/2 at 256 px, {shape}, {ops.describe(ops.choose())}")
    setting = replace(setting, keep=steady(times["fp32 eager"]) and setting.keep)
    for name, run in candidates.items():
        expected = truth.get(name, truth["fp32"])
        error = float((run().float() - expected).norm() / expected.norm())
        milliseconds, over = 1e3 * statistics.median(times[name]), ratio(times, "fp32 eager", name)
        print(f"{name:26} {milliseconds:9.1f} ms {over.value:6.2f} × fp32 eager, {over}   error {error:.2g}")
        note = f"{milliseconds:.0f} ms; {shape}, {choice.choice()}, error {error:.2g}"
        setting.record(over, "cpu", f"{name}, over fp32 eager, batch {batch}", "×", note)
    floats = [name for name in candidates if name not in SCHEMES and name != "fp32 eager"]
    best = min(floats, key=lambda name: statistics.median(times[name]))
    others = {f"{name}, over {best}": ratio(times, best, name) for name in SCHEMES}
    others["W4A8, time over W8A8's"] = ratio(times, "W4A8", "W8A8")
    for name, over in others.items():
        print(f"{name}: {over.value:.3f} ×, {over}")
        setting.record(over, "cpu", f"{name}, batch {batch}", "×", f"{shape}, {choice.choice()}")
    for name, count in counts.items():
        share = bound.share(count, times[name])
        print(f"{name}: the arithmetic at the peaks takes {share.value:.0f} % of its time, {share}")
        setting.record(share, "cpu", f"{name}, arithmetic at the peaks, batch {batch}", "%", f"of its time; {shape}")


def families(setting: Setting) -> None:
    """Speed-up of W8A8 over eager fp32 for a model of each kind of block, all in the same rounds."""
    runs, counts, batch, bound = dict[str, Run](), {}, 2, Bound(choice.kernels())
    for name in FAMILIES:
        model = random_model(config_for(name), "W8A8", rank=setting.rank)
        inputs, plain, counts[name] = model_inputs(batch, model.config), in_floats(model), operations(model, batch)
        fast = accelerate(model)
        runs[f"{name} fp32"] = lambda plain=plain, inputs=inputs: plain(*inputs)
        runs[f"{name} W8A8"] = lambda fast=fast, inputs=inputs: fast(*inputs)
    times = measure(runs | {"peaks": bound}, setting.rounds)
    setting = replace(setting, keep=steady(times[f"{FAMILIES[0]} fp32"]) and setting.keep)
    speedups = {name: ratios(times, f"{name} fp32", f"{name} W8A8") for name in FAMILIES}
    for name in FAMILIES:
        over, share = median(speedups[name]), bound.share(counts[name], times[f"{name} W8A8"])
        relative = median([a / b for a, b in zip(speedups[name], speedups[FAMILIES[0]], strict=True)])
        slow, fast = (1e3 * statistics.median(times[f"{name} {kind}"]) for kind in ("fp32", "W8A8"))
        note = f"{slow:.0f} and {fast:.0f} ms; batch {batch}, rank {setting.rank}, {choice.choice()}"
        print(f"{name:18} W8A8 {over.value:5.2f} × fp32 eager, {over}; {relative.value:.2f} of {FAMILIES[0]}'s; {note}")
        print(f"{name:18} the arithmetic at the peaks takes {share.value:.0f} % of the time of W8A8, {share}")
        setting.record(over, "cpu families", f"{name}, W8A8 over fp32 eager", "×", note)
        if name != FAMILIES[0]:
            setting.record(relative, "cpu families", f"{name}, over {FAMILIES[0]}'s", "", "ratio of speed-ups")
        setting.record(share, "cpu families", f"{name}, arithmetic at the peaks", "%", "of the time of W8A8")


def with_precision(precision: str, run: Run) -> Tensor:
    """`run` with the given float32 matmul precision."""
    torch.set_float32_matmul_precision(precision)
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision("highest")


def compiled_model(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> Run:
    """torch.compile with freezing, one graph per block. x (N, C, H, W), t and y (N,)."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.config.recompile_limit = 4 * len(model.blocks)
    start = time.perf_counter()
    for block in model.blocks:
        block.compile()
    with torch.no_grad():
        model(x, t, y)
    print(f"torch.compile took {time.perf_counter() - start:.0f} s")
    return lambda: model(x, t, y)


def peak(setting: Setting) -> None:
    """Peak rates of this processor, computed from registers."""
    kernels = choice.kernels()
    for kind in ffi.peaks(kernels):
        name = str(kernels.low_dtype).removeprefix("torch.") if kind == "low" else kind
        rates = [ffi.peak(kernels, kind, 3_000_000) / 1e9 for _ in range(9)]
        rate = max(rates)
        print(f"peak from registers, {name}: {rate:.0f} GOP/s")
        valid = steady([1 / rate for rate in rates]) and setting.keep
        if valid and name != "float32":
            record("cpu", f"{name.upper()} out of registers", rate, "GOP/s", kernels.isa)


def parts(setting: Setting) -> None:
    """INT8 products relative to the peak in the same round; share of the low-rank branch and of the transforms."""
    kernels, generator = choice.kernels(), torch.Generator().manual_seed(0)
    totals: dict[str, list[float]] = {}
    for name, (I, O) in LAYERS.items():
        linear, x = nn.Linear(I, O, device="meta"), torch.randn(2, 256, I, generator=generator)
        full = LinearSpec(setting.rank, None, "bfloat16", WEIGHT_FORMATS["int8"], Format(8), True, True, 64)
        specs = {
            "all": full,
            "no branch": replace(full, rank=0),
            "no transform": replace(full, scaled=False, shifted=False, hadamard=0),
            "product alone": LinearSpec(0, None, "bfloat16", full.weight, full.act),
            "W4A8": replace(full, weight=WEIGHT_FORMATS["int4"]),
        }
        layers = {what: random_layer(linear, spec, generator) for what, spec in specs.items()}
        packed = {what: cpu.IntegerLinear(layer.layer().detached(), kernels) for what, layer in layers.items()}
        runs: dict[str, Run] = {what: lambda p=p, x=x: p(x) for what, p in packed.items()}
        bare = packed.pop("product alone")
        codes, peaks = bare.quantize(x), list[float]()
        runs["product alone"] = lambda p=bare, codes=codes: p.multiply(codes, 2)
        runs["peak"] = lambda peaks=peaks: peaks.append(ffi.peak(kernels, "int8", 500_000))
        times = measure(runs, 5 * setting.rounds)
        rates = [2 * 512 * I * O / seconds for seconds in times["product alone"]]
        share = median([100 * rate / most for rate, most in zip(rates, peaks[1:], strict=True)])
        rate = statistics.median(rates) / 1e9
        print(f"{name:5} {I}→{O}: INT8 product {rate:6.0f} GOP/s = {share.value:.0f} % of the peak, {share}")
        for what, seconds in times.items():
            totals[what] = [a + b for a, b in zip(totals.get(what, [0.0] * len(seconds)), seconds, strict=True)]
        setting.record(share, "cpu", f"INT8 product {I}→{O}, share of peak", "%", f"512 rows, {kernels.isa}")
    linears = totals["all"]
    block = [a + b for a, b in zip(linears, attention(setting, generator), strict=True)]
    for what, name in (("no branch", f"rank-{setting.rank} branch"), ("no transform", "Hadamard and centring")):
        rounds = zip(linears, totals[what], block, strict=True)
        share = median([100 * (whole - rest) / of for whole, rest, of in rounds])
        print(f"{name}: {share.value:.1f} % of a block, {share}")
        setting.record(share, "cpu", f"{name}, share of a block", "%", f"batch 2, {kernels.isa}")
    w8a8, w4a8 = (1e3 * statistics.median(totals[what]) for what in ("all", "W4A8"))
    print(f"linears of a block: W8A8 {w8a8:.1f} ms, W4A8 {w4a8:.1f} ms")


def attention(setting: Setting, generator: torch.Generator) -> list[float]:
    """Seconds of the kernels' attention by round; also times torch's SDPA and, in bfloat16, unfused matrix products."""
    qkv, kernels = torch.randn(2, 256, 3456, generator=generator), choice.kernels()
    q, k, v = qkv.view(2, 256, 3, 16, 72).permute(2, 0, 3, 1, 4)
    low = qkv.to(kernels.low_dtype)
    runs: dict[str, Run] = {
        "own": lambda: ops.attention(low, 16, "cpu"),
        "SDPA fp32": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    if HAS_BF16:
        halves = [x.bfloat16() for x in (q, k, v)]
        runs["SDPA bf16"] = lambda: F.scaled_dot_product_attention(*halves)
        runs["products bf16"] = lambda: attend(*halves)
    times = measure(runs, 5 * setting.rounds)
    own, *others = ((name, 1e3 * statistics.median(seconds)) for name, seconds in times.items())
    print(f"attention, own: {own[1]:.2f} ms")
    for name, milliseconds in others:
        over = ratio(times, name, "own")
        print(f"attention, {name}: {milliseconds:.2f} ms, {over.value:.2f} times own, {over}")
        note = f"{milliseconds:.2f} and {own[1]:.2f} ms; 256 tokens, batch 2, {kernels.isa}"
        setting.record(over, "cpu", f"attention, {name}, time over own", "×", note)
    return times["own"]


def choices(setting: Setting) -> None:
    """For every instruction set that could be the processor's best: is what `choice` chooses the fastest for a block of
    each kind?"""
    known = [isa for isa in ffi.isas() if isa != "portable" and ffi.built(isa)]
    chosen = {isa: str(choice.fastest(known[i:])) for i, isa in enumerate(known)}
    for name in FAMILIES:
        times = pair_times(replace(config_for(name), depth=1, context_start=0), known, setting)
        medians = {pair: statistics.median(seconds) for pair, seconds in times.items()}
        ranked = sorted(medians, key=medians.__getitem__)
        print(f"{name}:", "; ".join(f"{pair} {1e3 * medians[pair]:.1f} ms" for pair in ranked))
        for i, first in enumerate(known):
            allowed = {str(choice.Choice(*pair)) for pair in itertools.product(known[i:], (*known[i:], choice.TORCH))}
            best = next(pair for pair in ranked if pair in allowed)
            over = ratio(times, chosen[first], best)
            print(f"{name}, up to {first}: chosen {chosen[first]}, {over.value:.3f} times the time of {best}, {over}")
            note = f"chosen {chosen[first]}; best {best}; a block"
            setting.record(over, "cpu choice", f"{name}, up to {first}, chosen over best", "×", note)


def pair_times(config: DiTConfig, known: list[str], setting: Setting) -> dict[str, list[float]]:
    """Seconds of a model by round for every pair of instruction sets for linears and attention."""
    model, inputs, runs = random_model(config, "W4A8", rank=setting.rank), model_inputs(2, config), dict[str, Run]()
    for linears, attention in itertools.product(known, (*known, choice.TORCH)):
        with patch.dict(os.environ, {"SVDIT_ISA": linears, "SVDIT_ATTENTION": attention}):
            choice.choice.cache_clear()
            fast, kernels = accelerate(copy.deepcopy(model)), choice.choice()
        runs[str(kernels)] = lambda fast=fast, kernels=kernels: run_with(kernels, lambda: fast(*inputs))
    choice.choice.cache_clear()
    return measure(runs, 3 * setting.rounds)


def run_with(kernels: choice.Choice, run: Run) -> Tensor:
    """`run` with these kernels for attention."""
    choice.choice, kept = lambda: kernels, choice.choice
    try:
        return run()
    finally:
        choice.choice = kept


def resident() -> tuple[int, int]:
    """Resident bytes now, and their peak since the counter was last cleared."""
    status = RESIDENT.read_text()
    now, peak = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "VmHWM"))  # type: ignore[index]
    return now * 1024, peak * 1024


def settled() -> int:
    """Resident bytes after garbage collection and trimming the heap."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()[0]


def memory_of(setting: Setting, kind: str) -> None:
    """Memory added by the model, peak of a forward pass, time of the first one. Runs in a separate process."""
    accelerate(quantized("W8A8", "int8", 1))(*model_inputs(2))  # libraries that torch loads on first use
    before = settled()
    model = quantized(*SCHEMES.get(kind, SCHEMES["W8A8"]), setting.depth, setting.rank)
    run = in_floats(model) if kind == "fp32" else model
    del model
    start = time.perf_counter()
    run = accelerate(run)
    packed = time.perf_counter() - start
    added = (settled() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run(*model_inputs(2))
    first, peak = packed + time.perf_counter() - start, (resident()[1] - before) / 2**20
    print(f"{kind:6} adds {added:6.0f} MiB, {peak:6.0f} in a forward pass; packed and run once in {first:.2f} s")
    if setting.keep:
        record("cpu", f"{kind}, memory added", peak, "MiB", "peak of a forward pass, batch 2, over torch alone")
        record("cpu", f"{kind}, packing and the first forward pass", first, "s", "batch 2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small model, few rounds, no recording")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--no-compile", action="store_true", help="skip compiled bf16, which takes a minute to compile")
    parser.add_argument("--only", choices=["parts", "choice", "memory", "model", "families"], help="run only this part")
    parser.add_argument("--memory-of", choices=["fp32", *SCHEMES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    setting = Setting(4, args.rank, 3, keep=False) if args.quick else Setting(rank=args.rank, rounds=args.rounds)
    torch.set_grad_enabled(False)
    if args.memory_of:
        memory_of(setting, args.memory_of)
        return
    for isa in filter(UNMEASURED.__contains__, ffi.isas()):
        command = f"SVDIT_ISA={isa} python benchmarks/bench_cpu.py"
        print(f"nobody has measured {isa}: run {command} too, and send benchmarks/results.csv")
    peak(setting)
    if args.only in (None, "parts"):
        parts(setting)
    if args.only in (None, "choice"):
        choices(setting)
    if args.only in (None, "families"):
        families(setting)
    for kind in ("fp32", *SCHEMES) if args.only in (None, "memory") and RESIDENT.exists() else ():
        quick = ["--quick"] if args.quick else []
        subprocess.run([sys.executable, __file__, "--memory-of", kind, *quick], check=True)
    for batch in ([2] if args.quick else args.batch) if args.only in (None, "model") else ():
        whole_model(setting, batch, not args.no_compile)


if __name__ == "__main__":
    main()
