"""Both sources of the processor's extensions agree; processors have names."""

from pathlib import Path

import pytest
import torch

from svdit.kernels.cpu.features import LINUX, OTHERS, capabilities, described
from svdit.kernels.cpu.ffi import ISAS


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not list extensions")
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists extensions there")
def test_linux_lists_what_torch_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.cpu.get_capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    names = capabilities.__wrapped__()
    assert names == {name: bool(expected.get(name)) for name in names}


def test_every_extension_that_an_instruction_set_needs_is_looked_up() -> None:
    assert {name for names in ISAS.values() for name in names} <= {*LINUX, *OTHERS}


AMD = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 1"
ARM = "processor\t: 0\nBogoMIPS\t: 2100.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
NAMES = {
    AMD: "AMD EPYC (Zen 4, family 25 model 17)",
    AMD.replace("17", "99"): "AMD EPYC (family 25 model 99)",
    ARM: "CPU implementer 0x41 CPU part 0xd4f",
    "": "",
}


@pytest.mark.parametrize("cpuinfo", NAMES)
def test_a_processor_is_named_by_family_and_model(cpuinfo: str) -> None:
    assert described(cpuinfo) == NAMES[cpuinfo]
