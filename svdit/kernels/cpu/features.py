"""This processor: its name, and its instruction set extensions by torch's names."""

import ctypes
import platform
import re
import sys
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
DESIGNS = {  # by vendor, family and model
    ("AuthenticAMD", "25", "1"): "Zen 3",
    ("AuthenticAMD", "25", "17"): "Zen 4",
    ("AuthenticAMD", "26", "2"): "Zen 5",
    ("GenuineIntel", "6", "106"): "Ice Lake",
    ("GenuineIntel", "6", "143"): "Sapphire Rapids",
    ("GenuineIntel", "6", "207"): "Emerald Rapids",
    ("GenuineIntel", "6", "173"): "Granite Rapids",
}
OTHERS = (  # Linux uses the same names
    *("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
)


@cache
def capabilities() -> dict[str, bool]:
    """Which extensions the processor and the kernel support; from /proc/cpuinfo where torch is too old to list them."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    flags = set(cpuinfo().split())
    return {name: LINUX.get(name, name) in flags for name in (*LINUX, *OTHERS)}


@cache
def permits_tiles() -> bool:
    """Whether Linux lets this process, its threads and children use AMX's registers, for which it asks."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request, registers = 158, 0x1023, 18  # SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, (arch_prctl, request, registers))) == 0


def cpuinfo() -> str:
    """Linux' description of the processors; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


@cache
def processor() -> str:
    """The name of this processor."""
    return described(cpuinfo()) or platform.processor() or platform.machine()


def described(text: str) -> str:
    """The processor of a /proc/cpuinfo: its name, which clouds shorten, with its design, family and model."""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    vendor, family, model = (fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    if not model:  # Arm's has numbers only
        return " ".join(f"{key} {fields[key]}" for key in ("CPU implementer", "CPU part") if key in fields)
    design = DESIGNS.get((vendor, family, model))
    numbers = f"family {family} model {model}"
    return f"{fields.get('model name', vendor)} ({f'{design}, ' if design else ''}{numbers})"
