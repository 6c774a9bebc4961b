"""Several GPUs: every process uses its own, and what processes exchange is on the CPU."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import randomize
from devices.fake_cuda import FakeCuda, state_of
from torch import Tensor
from worlds import in_world

from svdit import distributed
from svdit.cli import setup
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.config import RECIPES, dit_config
from svdit.quant.quantize import quantize_
from svdit.sampling import calibration
from svdit.sampling.calibration import calibration_loop

CONFIG = dit_config(RECIPES["rtn"])
LOOP = calibration_loop(images=2, steps=2)


def small() -> DiT:
    model = randomize(DiT(DiTConfig(4, 2, 4, hidden_size=64, depth=1, num_heads=2, mlp_ratio=1, num_classes=5)))
    assert isinstance(model, DiT)
    return model


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Rank 1 on a machine of two GPUs, without them; the devices that become the current one."""
    current: list[Any] = []
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: current.append(backend))
    monkeypatch.setattr(distributed, "connect", lambda **options: dist.HashStore())
    monkeypatch.setattr(distributed.Watch, "start", lambda watch: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return current


@pytest.mark.parametrize("name", [None, "cuda"])
def test_every_process_uses_its_own_gpu(name: str | None, second_of_two: list[Any]) -> None:
    """`torch.cuda.set_device` raises for a device without an index."""
    with distributed.session(name and torch.device(name)):
        pass
    assert second_of_two == [torch.device("cuda", 1), "nccl"]


@pytest.mark.parametrize("name", [None, "cuda"])
def test_the_commands_device_is_this_processs_own(name: str | None, second_of_two: list[Any]) -> None:
    assert setup.device(name) == torch.device("cuda", 1)


class DevicesOf(pickle.Pickler):
    """Notes the devices of all tensors that would be sent."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: set[str] = set()

    def reducer_override(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            self.found.add(x.device.type)
            return (str, ())
        return NotImplemented


class SentError(Exception):
    """The second process has sent its layers and would wait for the first."""


def test_processes_exchange_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA tensor would arrive on the sender's GPU. Afterwards all layers are on the model's device.

    Rank 1 works until it sends its layers, then rank 0 receives them.
    """
    monkeypatch.setattr(calibration, "CONDITIONS", 64)
    sent: list[Any] = []
    expected = small()
    quantize_(expected, CONFIG, LOOP)

    def gather(value: Any) -> list[Any]:
        pickler = DevicesOf()
        pickler.dump(value)
        assert pickler.found == {"cpu"}
        sent.append(value)
        if len(sent) == 1:
            raise SentError
        return sent[::-1]

    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with FakeCuda():
        monkeypatch.setattr(distributed, "rank", lambda: 1)
        with pytest.raises(SentError):
            quantize_(small().to("cuda"), CONFIG, LOOP)
        monkeypatch.setattr(distributed, "rank", lambda: 0)
        model = small().to("cuda")
        quantize_(model, CONFIG, LOOP)
        state = state_of(model)
    assert all(torch.equal(state[name], x) for name, x in expected.state_dict().items())


def test_two_processes_resume_what_one_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes over gloo; layers solved before are not solved again."""
    monkeypatch.setattr(calibration, "CONDITIONS", 64)
    model, expected = small(), small()
    quantize_(expected, CONFIG, LOOP, work_dir=tmp_path)
    files = sorted(tmp_path.iterdir())
    for file in files[::2]:
        file.unlink()
    kept = {file: file.stat().st_mtime_ns for file in files[1::2]}

    def work() -> dict[str, Any]:
        mine = copy.deepcopy(model)
        quantize_(mine, CONFIG, LOOP, work_dir=tmp_path)
        return {name: x.detach().numpy() for name, x in mine.state_dict().items()}

    for state in in_world(2, work):
        assert all((state[name] == x.numpy()).all() for name, x in expected.state_dict().items())
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert sorted(tmp_path.iterdir()) == files
