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
ARM = {  # by implementer and part
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
    ("0x41", "0xd84"): "Neoverse V3",
    ("0x41", "0xd8e"): "Neoverse N3",
    ("0xc0", "0xac3"): "Ampere-1",
    ("0xc0", "0xac4"): "Ampere-1A",
}
APPLE = {"dot": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16"}
HWCAPS = {"dot": (16, 20), "i8mm": (26, 13), "bf16": (26, 14)}  # of Linux for Arm: AT_HWCAP or AT_HWCAP2, and the bit
OTHERS = (  # Linux uses the same names
    *("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
)


@cache
def capabilities() -> dict[str, bool]:
    """Which extensions the processor and the kernel support; from the system where torch is too old to list them."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    if sys.platform == "darwin":
        return {name: any(sysctl(f"hw.optional.arm.{feature}")) for name, feature in APPLE.items()}
    if platform.machine() == "aarch64":  # emulators show another processor's /proc/cpuinfo
        return {name: bool(auxiliary(kind) >> bit & 1) for name, (kind, bit) in HWCAPS.items()}
    flags = set(cpuinfo().split())
    return {name: LINUX.get(name, name) in flags for name in (*LINUX, *OTHERS)}


@cache
def permits_tiles() -> bool:
    """Whether Linux lets this process, its threads and children use AMX's registers, for which it asks."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    arch_prctl, request, registers = 158, 0x1023, 18  # SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, (arch_prctl, request, registers))) == 0


def auxiliary(kind: int) -> int:
    """A number that Linux passes to every process; 0 where there is none of this kind."""
    function = ctypes.CDLL(None).getauxval
    function.argtypes, function.restype = [ctypes.c_ulong], ctypes.c_ulong
    return int(function(kind))


def cpuinfo() -> str:
    """Linux' description of the processors; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def sysctl(name: str) -> bytes:
    """The value that macOS has for a name; empty elsewhere, and for a name that it does not know."""
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    function = getattr(ctypes.CDLL(None), "sysctlbyname", None)
    if function is None or function(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0)):
        return b""
    return value.raw[: size.value]


@cache
def processor() -> str:
    """The name of this processor."""
    brand = sysctl("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")
    return described(cpuinfo()) or brand or platform.processor() or platform.machine()


def described(text: str) -> str:
    """The processor of a /proc/cpuinfo: its name, which clouds shorten, with its design, family and model."""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    vendor, family, model = (fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    if "CPU implementer" in fields:  # Arm's
        implementer, part = fields["CPU implementer"], fields.get("CPU part", "")
        numbers = f"implementer {implementer} part {part}"
        return f"{name} ({numbers})" if (name := ARM.get((implementer, part))) else numbers
    if not model:
        return ""
    design = DESIGNS.get((vendor, family, model))
    numbers = f"family {family} model {model}"
    return f"{fields.get('model name', vendor)} ({f'{design}, ' if design else ''}{numbers})"
