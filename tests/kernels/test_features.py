"""Both sources of the processor's extensions agree."""

from pathlib import Path

import pytest
import torch

from svdit.kernels.cpu.features import LINUX, OTHERS, capabilities
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
