"""Which instruction set computes linears and attention on this processor: measured, because flags do not tell.

The candidates are timed once for a processor, this library and this torch, and the choice is kept in the cache, so that
all processes of a machine, also concurrent ones, compute the same floats. It changes no integer. SVDIT_ISA and
SVDIT_ATTENTION override it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from svdit.errors import UserError
from svdit.files import atomic_path, exclusive
from svdit.kernels import fused
from svdit.kernels.cpu import ffi, linear
from svdit.kernels.cpu.build import MissingKernelsError, cache_folder
from svdit.kernels.cpu.features import processor
from svdit.kernels.cpu.sources import source_hash
from svdit.kernels.formats import WEIGHT_FORMATS, Format
from svdit.kernels.layer import Layer, LinearSpec

TORCH = "torch"  # its attention in fp32, one image after the other
TOKENS, WIDTH, HEADS = 256, 1152, 8  # of the trial; a head has 72 columns, as in DiT-XL/2
ROUNDS, REPEATS = 4, 6  # runs of a measurement; measurements of which two must agree, at most
ALIKE = 1.03  # of two candidates that differ by less, the one with fp32 beside its integers is taken
HOPELESS = 2  # times the least
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
    """The fastest of these instruction sets for each operation, best by flag first; `portable` only if alone."""
    candidates = [isa for isa in isas if isa != "portable" and ffi.built(isa)] or isas
    linears = {isa: linear_trial(ffi.kernels(isa)) for isa in candidates}
    attentions = {isa: attention_trial(ffi.kernels(isa)) for isa in candidates} | {TORCH: torch_trial()}
    with torch.no_grad():
        return Choice(settled(linears), settled(attentions))


def settled(trials: Mapping[str, Trial]) -> str:
    """The best of all measurements so far, once the newest agrees: on a busy machine the first ones do not.

    The choice is kept although they may never agree, because all processes must compute the same floats.
    """
    seconds = timed(trials)
    for _ in range(REPEATS - 1):
        again, before = timed(trials), best(seconds)
        seconds = {name: min(seconds[name], again[name]) for name in trials}
        if best(again) == before == best(seconds):
            break
    return best(seconds)


def timed(trials: Mapping[str, Trial]) -> dict[str, float]:
    """The fewest seconds of each, which run in turn after a warm-up; those that start HOPELESS are not repeated."""
    seconds: dict[str, float] = {}
    for run in trials.values():
        run()
    for _ in range(ROUNDS):
        for name, run in trials.items():
            if seconds.get(name, 0) <= HOPELESS * min(seconds.values(), default=0):
                start = time.perf_counter()
                run()
                seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
    return seconds


def best(seconds: Mapping[str, float]) -> str:
    """The name with the fewest seconds, or one that is ALIKE and has no bf16."""
    least = min(seconds.values())
    alike = [name for name, each in seconds.items() if each <= ALIKE * least]
    return min(alike, key=lambda name: (rounds(name), seconds[name]))


def rounds(name: str) -> bool:
    """Whether the low-rank branch and attention of a candidate are bf16."""
    return name != TORCH and ffi.kernels(name).low_dtype == torch.bfloat16


def linear_trial(kernels: ffi.Kernels) -> Trial:
    """W8A8 with every part of svdit's recipe, on one image."""
    generator = torch.Generator().manual_seed(0)
    spec = LinearSpec(32, None, "bfloat16", WEIGHT_FORMATS["int8"], Format(8), True, True, 64)
    tensors = {
        "residual_codes": torch.randint(-127, 128, (WIDTH, WIDTH), generator=generator, dtype=torch.int8),
        "residual_scales": torch.full((WIDTH, 1), 1e-3),
        "l1": torch.randn(WIDTH, 32, generator=generator).bfloat16(),
        "l2": torch.randn(32, WIDTH, generator=generator).bfloat16(),
        "in_scale": torch.ones(WIDTH),
        "in_shift": torch.zeros(WIDTH),
        "bias": torch.zeros(WIDTH),
    }
    packed = linear.IntegerLinear(Layer(spec, (WIDTH, WIDTH), tensors), kernels)
    return partial(packed, torch.randn(1, TOKENS, WIDTH, generator=generator))


def attention_trial(kernels: ffi.Kernels) -> Trial:
    """Attention of one image."""
    return partial(linear.attention, trial_qkv().to(kernels.low_dtype), HEADS, kernels)


def torch_trial() -> Trial:
    """The same by torch."""
    return partial(fused.attention, trial_qkv(), HEADS)


def trial_qkv() -> Tensor:
    """Queries, keys and values (1, T, 3D)."""
    return torch.randn(1, TOKENS, 3 * HEADS * 72, generator=torch.Generator().manual_seed(0))
