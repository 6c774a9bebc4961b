"""The fake device itself: it raises where a GPU does, passes where a GPU works, and computes what the CPU does.

With `-m gpu` the same operations run on a real GPU, which shows that the tables are right.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices.fake_cuda import CudaGenerator, FakeCuda, value
from torch import Tensor

CPU, INDEX = torch.arange(12.0).reshape(3, 4), torch.tensor([0, 2])

# Each fails on a real GPU with "Expected all tensors to be on the same device", or its like.
MIXED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + CPU,
    "product": lambda x: x @ CPU.T,
    "linear": lambda x: F.linear(x, CPU),
    "in place": lambda x: x.add_(CPU),
    "concatenation": lambda x: torch.cat([x, CPU]),
    "where": lambda x: torch.where(x > 1, x, CPU),
    "selection": lambda x: torch.index_select(x, 0, INDEX),
    "lookup": lambda x: F.embedding(INDEX, x),
    "a CPU tensor indexed on the GPU": lambda x: CPU[INDEX.to("cuda")],
    "a CPU value written by index": lambda x: x.__setitem__(INDEX, CPU[:2]),
    "convolution": lambda x: F.conv2d(x[None, None], torch.ones(1, 1, 2, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], CPU[None, None]),
    "output": lambda x: torch.sub(x, x, out=torch.empty(3, 4)),
    "generator": lambda x: torch.randn(3, generator=torch.Generator(), device="cuda"),
    "other generator": lambda x: torch.randn(3, generator=CudaGenerator()),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "quantiles": lambda x: torch.quantile(x, torch.tensor([0.5])),
}

# Each works on a real GPU.
FINE: dict[str, Callable[[Tensor], Any]] = {
    "a number from the CPU": lambda x: x * torch.tensor(3.0),
    "a GPU tensor indexed from the CPU": lambda x: x[INDEX],
    "slices": lambda x: x[1:, None, ..., :2],
    "an element": lambda x: x[2, -1],
    "mask": lambda x: x[x > 3],
    "rows and columns": lambda x: x[[0, 2], torch.tensor([1, 3])],
    "places": lambda x: (x > 3).nonzero(),
    "distinct": lambda x: torch.unique(x % 3),
    "quantiles": lambda x: torch.quantile(x, torch.tensor([0.5], device=x.device)),
    "copy to the CPU": lambda x: torch.zeros(3, 4).copy_(x),
    "copy from the CPU": lambda x: x.clone().copy_(CPU + 1),
    "written slice": lambda x: x.clone().__setitem__(slice(1), CPU[:1]) or x,
    "eigenvectors": lambda x: torch.linalg.eigh(x @ x.T)[0],
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_raise(name: str) -> None:
    with FakeCuda():
        x = CPU.clone().to("cuda")
        with pytest.raises((RuntimeError, TypeError), match=r"devices?|got tensors on cpu and cuda"):
            MIXED[name](x)


@pytest.mark.parametrize("name", FINE)
def test_what_a_gpu_can_do_passes_with_the_same_values(name: str) -> None:
    with FakeCuda():
        x = CPU.clone().to("cuda")
        result = FINE[name](x)
        assert result.device.type == ("cpu" if name == "copy to the CPU" else "cuda")
    assert torch.equal(value(result), FINE[name](CPU.clone()))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_raise_on_a_gpu(name: str) -> None:
    if name == "other generator":
        pytest.skip("its generator is the fake one")
    with pytest.raises((RuntimeError, TypeError), match=r"devices?|device type"):
        MIXED[name](CPU.clone().to("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", FINE)
def test_the_rest_passes_on_a_gpu(name: str) -> None:
    result = FINE[name](CPU.clone().to("cuda"))
    assert result.device.type == ("cpu" if name == "copy to the CPU" else "cuda")
    assert torch.allclose(result.cpu(), FINE[name](CPU.clone()), atol=1e-4)  # eigenvalues up to 500, in float32


def test_decisions_depend_on_the_values() -> None:
    with FakeCuda():
        x = CPU.to("cuda")
        assert x.is_cuda and x.device == torch.device("cuda", 0) and len(x) == 3
        assert x.sum().item() == float(x.sum()) == 66 and bool(x.any()) and x.tolist() == CPU.tolist()
        x[0, 1] = 7
        x[1] = x[0] + 1
        assert x.cpu().numpy()[1].tolist() == [1, 8, 3, 4]
