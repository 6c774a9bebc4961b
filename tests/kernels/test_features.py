"""Both sources of the processor's extensions agree; processors have names."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

from svdit.kernels.cpu import features
from svdit.kernels.cpu.features import APPLE, HWCAPS, LINUX, OTHERS, capabilities, described
from svdit.kernels.cpu.ffi import ISAS


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not list extensions")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists extensions there")
def test_linux_lists_what_torch_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.cpu.get_capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    names = capabilities.__wrapped__()
    assert names == {name: bool(expected.get(name)) for name in names}


HWCAP, HWCAP2 = 16, 26
NEOVERSE_N1, NEOVERSE_V1 = {HWCAP: 1 << 20 | 0xFF}, {HWCAP: 1 << 20 | 0xFF, HWCAP2: 3 << 13 | 0xF}


@pytest.mark.parametrize(("numbers", "expected"), [(NEOVERSE_N1, {"dot"}), (NEOVERSE_V1, {"dot", "i8mm", "bf16"})])
def test_arm_on_linux(numbers: dict[int, int], expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(features, "auxiliary", lambda kind: numbers.get(kind, 0))
    assert {name for name, supported in capabilities.__wrapped__().items() if supported} == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux passes them")
def test_linux_passes_the_size_of_a_page() -> None:
    assert features.auxiliary(6) == mmap.PAGESIZE and features.auxiliary(10**6) == 0


def test_arm_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """An M1, by what sysctl answers."""
    answers = {"hw.optional.arm.FEAT_DotProd": b"\1\0\0\0", "hw.optional.arm.FEAT_I8MM": b"\0\0\0\0"}
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(features, "sysctl", lambda name: answers.get(name, b""))
    assert capabilities.__wrapped__() == {"dot": True, "i8mm": False, "bf16": False}
    monkeypatch.setattr(features, "cpuinfo", lambda: "")
    monkeypatch.setattr(features, "sysctl", lambda name: b"Apple M1\0" if name == "machdep.cpu.brand_string" else b"")
    assert features.processor.__wrapped__() == "Apple M1"


def test_a_sysctl_that_is_unknown_is_empty() -> None:
    assert features.sysctl("svdit.unknown") == b""


def test_every_extension_that_an_instruction_set_needs_is_looked_up() -> None:
    assert {name for names in ISAS.values() for name in names} <= {*LINUX, *OTHERS, *APPLE}
    assert (
        set(APPLE) == set(HWCAPS) == {name for isa, names in ISAS.items() if isa.startswith("neon") for name in names}
    )


AMD = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 1"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
NAMES = {
    AMD: "AMD EPYC (Zen 4, family 25 model 17)",
    AMD.replace("17", "99"): "AMD EPYC (family 25 model 99)",
    ARM: "Neoverse V2 (implementer 0x41 part 0xd4f)",
    ARM.replace("0xd4f", "0xfff"): "implementer 0x41 part 0xfff",
    "": "",
}


@pytest.mark.parametrize("cpuinfo", NAMES)
def test_a_processor_is_named_by_family_and_model(cpuinfo: str) -> None:
    assert described(cpuinfo) == NAMES[cpuinfo]
