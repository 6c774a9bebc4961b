"""Decoding an image by Stable Diffusion's autoencoder on the C kernels, over torch: whole, and layer by layer.

    python benchmarks/bench_decoding.py [--rounds 5]

Random weights and latents of 256 px. A layer is group norm, SiLU and a 3×3 convolution; or, enlarged, the convolution
of an image of half the size. torch runs as `model/vae.py` does: NNPACK's convolutions on all threads, the rest on one.
The bound is the time of the multiplications of Winograd's products alone at the peak of registers.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from timing import Run, measure, ratio, steady
from torch import Tensor, nn

from svdit.kernels.cpu import choice, ffi
from svdit.kernels.cpu.images import Workspace, convolve, group_norm
from svdit.model.autoencoder import Autoencoder, in_single_threads
from svdit.model.vae import VAE, Conv3, VAEConfig, start_threads
from svdit.runtime.decoder import Decoder

LAYERS = [  # inputs, outputs, pixels along a side, enlarged
    (512, 512, 32, False),
    (512, 512, 64, False),
    (512, 512, 128, True),
    (256, 256, 128, False),
    (256, 256, 256, True),
    (128, 128, 256, False),
]
TORCH = "torch"


def bound(I: int, O: int, side: int, enlarged: bool, peak: float) -> float:
    """The seconds that F(6×6, 3×3) takes at `peak` operations per second."""
    return 2 * (49 if enlarged else 64) * (-(-side // 6)) ** 2 * I * O / peak


def by_torch(conv: Conv3, norm: nn.GroupNorm | None) -> Callable[[Tensor], Tensor]:
    """The layer of x (1, I, h, w) on torch."""
    if norm is None:
        return lambda x: conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return lambda x: conv(F.silu(norm(x), inplace=True))


def ours(conv: Conv3, norm: nn.GroupNorm | None, x: Tensor, kernels: ffi.Kernels) -> Run:
    """The layer of x (h, w, I) on the C kernels."""
    side = len(x) << (norm is None)
    workspace, out = Workspace(kernels), torch.empty(side, side, len(conv.weight))

    def run() -> None:
        affine = group_norm(x, norm.num_groups, norm.weight, norm.bias, kernels) if norm is not None else None
        convolve(x, conv.weight, conv.bias, workspace, out, norm=affine, enlarge=norm is None)

    return run


def layer(I: int, O: int, side: int, enlarged: bool, isas: list[str]) -> dict[str, Run]:
    """A layer on torch and on every instruction set."""
    conv, norm = Conv3(I, O).requires_grad_(False), None if enlarged else nn.GroupNorm(32, I).requires_grad_(False)
    x, torchs = torch.randn(1, I, side >> enlarged, side >> enlarged), by_torch(conv, norm)
    runs: dict[str, Run] = {TORCH: lambda: in_single_threads(torchs, [x])}
    last = x[0].permute(1, 2, 0).contiguous()
    return runs | {isa: ours(conv, norm, last, ffi.kernels(isa)) for isa in isas}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with torch.no_grad():
        start_threads()
    isas = list(dict.fromkeys([choice.choice().linears, "avx2"]))
    vae, z = VAE(VAEConfig((128, 256, 512, 512), layers_per_block=2)).requires_grad_(False), torch.randn(1, 4, 32, 32)
    whole = {TORCH: Autoencoder("random", vae)}
    whole |= {isa: Autoencoder("random", vae, decoder=Decoder(vae, ffi.kernels(isa))) for isa in isas}
    candidates = {"one image of 256 px": {name: lambda each=each: each.decode(z) for name, each in whole.items()}}
    for I, O, side, enlarged in LAYERS:
        name = f"{I} to {O} channels, {'enlarged to ' * enlarged}{side} px"
        candidates[name] = layer(I, O, side, enlarged, isas)
    bounds = dict(zip(list(candidates)[1:], LAYERS, strict=True))
    for name, runs in candidates.items():
        times = measure(runs, args.rounds, calls=2)
        if not steady(times[TORCH]):
            continue
        for isa in isas:
            note = f"{1e3 * median(times[isa]):.1f} ms; torch {1e3 * median(times[TORCH]):.1f} ms"
            if name in bounds:
                peak = ffi.peak(ffi.kernels(isa), "fp32", 1_000_000)
                note += f", bound {1e3 * bound(*bounds[name], peak):.1f} ms"
            over = ratio(times, TORCH, isa)
            over.record("decoding", f"{name}, {'AVX2' if isa == 'avx2' else 'the fastest'}", "×", note)


if __name__ == "__main__":
    main()
