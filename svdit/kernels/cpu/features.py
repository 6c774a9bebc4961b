"""The instruction set extensions of this processor, by torch's names."""

from functools import cache
from pathlib import Path

import torch

LINUX = {
    "avx512_f": "avx512f",
    "avx512_bw": "avx512bw",
    "avx512_vl": "avx512vl",
    "avx512_dq": "avx512dq",
    "fma3": "fma",
}
OTHERS = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16")  # Linux uses the same names


@cache
def capabilities() -> dict[str, bool]:
    """Which extensions the processor and the kernel support; from /proc/cpuinfo where torch is too old to list them."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()) if cpuinfo.exists() else set()
    return {name: LINUX.get(name, name) in flags for name in (*LINUX, *OTHERS)}
