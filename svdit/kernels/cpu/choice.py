"""Which instruction set computes linears and attention on this processor: measured, because flags do not tell.

All pairs are timed on a transformer block, because what one saves the other may lose: attention decides in which type
qkv and fc1 write. It happens once for a processor, this library and this torch, and the choice is kept in the
cache, so that all processes of a machine, also concurrent ones, compute the same floats. It changes no integer.
SVDIT_ISA and SVDIT_ATTENTION override it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import torch

from svdit.errors import UserError
from svdit.files import atomic_path, exclusive
from svdit.kernels import fused
from svdit.kernels.cpu import ffi, linear
from svdit.kernels.cpu.build import MissingKernelsError, cache_folder
from svdit.kernels.cpu.features import processor
from svdit.kernels.cpu.sources import source_hash
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.kernels.layer import Layer, LinearSpec, Modulation, Residual

TORCH = "torch"  # its attention in fp32, one image after the other
TOKENS, WIDTH, HEADS = 256, 768, 12  # of the trial's block, one of DiT-B/2's: in a wider one attention weighs less
ROUNDS, REPEATS = 3, 6  # runs of a measurement; measurements of which two must agree, at most
ALIKE = 1.015  # of pairs that differ by less, one that attends in fp32 is taken, or else one instruction set
APART = 1.05  # torch's attention counts for so much more: in a model it needs norms and rotations, and ends `together`
HOPELESS = 1.5  # times the least
WAIT = 60.0  # seconds for another process that measures
Trial = Callable[[], object]


@dataclass(frozen=True)
class Choice:
    """An instruction set for linears; one, or TORCH, for attention."""

    linears: str
    attention: str

    def __str__(self) -> str:
        same = self.attention == self.linears
        return self.linears if same else f"{self.linears}, attention {self.attention}"


@cache
def choice() -> Choice:
    """What SVDIT_ISA and SVDIT_ATTENTION ask for, else what is fastest here.

    Raises MissingKernelsError where there is no library, UserError for an instruction set this machine lacks.
    """
    isa, attention = os.environ.get("SVDIT_ISA"), os.environ.get("SVDIT_ATTENTION")
    for name, value, others in (("SVDIT_ISA", isa, ()), ("SVDIT_ATTENTION", attention, (TORCH,))):
        known = (*ffi.isas(), *others)
        if value and value not in known:
            raise UserError(f"{name} is {value}, but this machine supports {', '.join(known)}")
    if isa:
        return Choice(isa, attention or isa)
    measured = kept()
    return Choice(measured.linears, attention or measured.attention)


def kernels() -> ffi.Kernels:
    """Those for linears."""
    return ffi.kernels(choice().linears)


def attention_kernels() -> ffi.Kernels | None:
    """Those for attention; None for torch's."""
    name = choice().attention
    return None if name == TORCH else ffi.kernels(name)


def attention_dtype() -> torch.dtype:
    """The type that attention reads."""
    own = attention_kernels()
    return own.low_dtype if own else torch.float32


def kept() -> Choice:
    """The choice in the cache, measured if there is none; of several processes one measures and the others wait."""
    place = f"{processor()}, {source_hash()}, {torch.__version__}"
    try:
        path = cache_folder() / f"choice-{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"
    except MissingKernelsError:
        return fastest(ffi.isas())
    with ExitStack() as stack:
        if found := read(path):
            return found
        with suppress(UserError):  # where the wait is over or the place has no locks, two measure
            stack.enter_context(exclusive(path, wait=WAIT))
        if found := read(path):
            return found
        found = fastest(ffi.isas())
        with suppress(UserError, OSError), atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return found


def read(path: Path) -> Choice | None:
    """The choice in a file; None where there is none that this processor can follow."""
    try:
        found = Choice(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.linears in ffi.isas() and found.attention in (*ffi.isas(), TORCH) else None


def fastest(isas: list[str]) -> Choice:
    """The pair of these instruction sets, best by flag first, that is fastest; `portable` only if alone."""
    candidates = [isa for isa in isas if isa != "portable" and ffi.built(isa)] or isas
    layers = {isa: trial_layers(ffi.kernels(isa)) for isa in candidates}
    pairs = [Choice(*pair) for pair in product(candidates, (*candidates, TORCH))]
    with torch.no_grad():
        return settled({pair: block_trial(layers[pair.linears], pair) for pair in pairs})


def settled(trials: Mapping[Choice, Trial]) -> Choice:
    """The best of all measurements so far, once the newest agrees: on a busy machine the first ones do not.

    The choice is kept although they may never agree, because all processes must compute the same floats.
    """
    seconds = timed(trials)
    for _ in range(REPEATS - 1):
        again, before = timed({pair: trials[pair] for pair in hopeful(seconds)}), best(seconds)
        seconds = {pair: min(seconds[pair], again[pair]) for pair in again}
        if best(again) == before == best(seconds):
            break
    return best(seconds)


def timed(trials: Mapping[Choice, Trial]) -> dict[Choice, float]:
    """The fewest seconds of each, which run in turn after a warm-up; those without hope after the first turn, once."""
    seconds = dict.fromkeys(trials, float("inf"))
    for run in trials.values():
        run()
    for _ in range(ROUNDS):
        for pair in hopeful(seconds):
            start = time.perf_counter()
            trials[pair]()
            seconds[pair] = min(seconds[pair], time.perf_counter() - start)
    return seconds


def hopeful(seconds: Mapping[Choice, float]) -> list[Choice]:
    """Those that take at most HOPELESS times the least."""
    least = min(seconds.values())
    return [pair for pair, each in seconds.items() if each <= HOPELESS * least]


def best(seconds: Mapping[Choice, float]) -> Choice:
    """The pair with the fewest seconds; of those that are ALIKE one that attends in fp32, or one instruction set."""
    cost = {pair: each * (APART if pair.attention == TORCH else 1) for pair, each in seconds.items()}
    alike = [pair for pair, each in cost.items() if each <= ALIKE * min(cost.values())]
    return min(alike, key=lambda pair: (rounds(pair), pair.linears != pair.attention, cost[pair]))


def rounds(pair: Choice) -> bool:
    """Whether attention computes in bf16."""
    return pair.attention != TORCH and ffi.kernels(pair.attention).low_dtype == torch.bfloat16


def trial_layers(kernels: ffi.Kernels) -> list[linear.IntegerLinear]:
    """The four linears of a block of DiT-B/2, W4A8 with every part of svdit's recipe."""
    generator = torch.Generator().manual_seed(0)
    spec = LinearSpec(32, None, "bfloat16", WEIGHT_FORMATS["int4"], Format(8), True, True, 64)
    layers = []
    for O, I in ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)):
        tensors = {
            "residual_codes": torch.randint(0, 256, (O, I // 2), generator=generator, dtype=torch.uint8, device="cpu"),
            "residual_scales": torch.full((O, I // 64), 15, dtype=torch.int8, device="cpu"),
            "residual_steps": torch.full((O, 1), 1e-4, dtype=torch.float32, device="cpu"),
            "l1": torch.randn(O, 32, generator=generator, dtype=torch.bfloat16, device="cpu"),
            "l2": torch.randn(32, I, generator=generator, dtype=torch.bfloat16, device="cpu"),
            "in_scale": torch.ones(I, dtype=torch.float32, device="cpu"),
            "in_shift": torch.zeros(I, dtype=torch.float32, device="cpu"),
            "bias": torch.zeros(O, dtype=torch.float32, device="cpu"),
        }
        layers.append(linear.IntegerLinear(Layer(spec, (O, I), tensors), kernels))
    return layers


def block_trial(layers: list[linear.IntegerLinear], pair: Choice) -> Trial:
    """One image through a block: its linears, and attention, which decides what qkv and fc1 write."""
    qkv, proj, fc1, fc2 = layers
    own = None if pair.attention == TORCH else ffi.kernels(pair.attention)
    attention = partial(linear.attention, kernels=own) if own else fused.attention
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, WIDTH, generator=generator, dtype=torch.float32, device="cpu")
    shift, scale, gate = torch.zeros(3, 1, WIDTH, dtype=torch.float32, device="cpu")
    modulation = Modulation(shift, scale)

    def run() -> None:
        qkv.dtype = fc1.dtype = own.low_dtype if own else torch.float32
        with ffi.together() if own else nullcontext():
            proj(attention(qkv(x, modulation=modulation), HEADS), residual=Residual(x, gate))
            fc2(fc1(x, modulation=modulation, gelu=True), residual=Residual(x, gate))

    return run
