"""A CUDA device without a GPU: FakeTensorMode tracks every tensor's device, real CPU tensors hold the values.

    with FakeCuda():
        model.to("cuda")                # every parameter now claims to be on cuda:0
        quantize_(model, ...)           # raises where one operation gets tensors of two devices, as on a GPU
        value(model.head.weight)        # as computed on the CPU, bit for bit

FakeTensorMode alone stops at `.item()`, `bool(x)`, `.tolist()` and `nonzero`, whose results depend on values. Here each
operation runs on the values, and its results become fake tensors on the device of its arguments.
torch's C++ believes that all is on the CPU, so that the backward pass, which needs a CUDA stream otherwise, runs too.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from svdit.checkpoints import io

aten = torch.ops.aten
COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::lift_fresh")
MOVES = ("aten::to", "aten::type_as")  # arrive whole in inference mode, and return x itself where it need not move
INDEXING = ("aten::index", "aten::index_put_")  # a CPU tensor may index a CUDA one, but not the reverse


Generator = torch.Generator


class CudaGenerator(Generator):
    """A generator that claims to be on the GPU: a CPU build of torch has none."""

    device = torch.device("cuda", 0)


def generator(device: torch.device | str = "cpu") -> Generator:
    """In place of `torch.Generator`, for CUDA devices too."""
    return CudaGenerator() if torch.device(device).type == "cuda" else Generator()


def value(x: Any) -> Any:
    """The values of a fake tensor, as a CPU tensor; anything else unchanged."""
    return x.values_ if isinstance(x, FakeTensor) else x


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """`function` of every leaf of nested lists, tuples and dicts."""
    if isinstance(tree, dict):
        return {key: mapped(function, each) for key, each in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [mapped(function, each) for each in tree]
        return tuple(parts) if isinstance(tree, tuple) else parts
    return function(tree)


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of a tree."""
    found: list[Tensor] = []
    mapped(lambda x: found.append(x) if isinstance(x, Tensor) else None, tree)
    return found


def with_values(fake: Any, real: Any) -> Any:
    """`fake`, with the values of `real`; laid out in memory as those are, where an operation leaves that open."""
    if isinstance(fake, (list, tuple)):
        return type(fake)(with_values(x, values) for x, values in zip(fake, real, strict=True))
    if isinstance(fake, FakeTensor):
        if fake.stride() != real.stride():
            fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=fake.device)
        fake.values_ = real
    return fake


def on_values(function: Callable[..., Any], args: Any, kwargs: dict[str, Any] | None = None) -> Any:
    """`function` of the values, on the CPU."""

    def argument(x: Any) -> Any:
        return torch.device("cpu") if isinstance(x, torch.device) else value(x)

    with _disable_current_modes():
        return function(*mapped(argument, args), **mapped(argument, kwargs or {}))


class Values(TorchDispatchMode):
    """Runs every operation on the values as well, and checks devices also where FakeTensorMode does not."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # for torch's C++, which would look for a GPU; Python sees cuda
        if func._schema.name in MOVES:
            with self:
                return func.decompose(*args, **(kwargs or {}))
        args, kwargs = mapped(self.lifted, args), mapped(self.lifted, dict(kwargs or {}))
        device = common_device(func, args, kwargs)
        real = on_values(func, args, kwargs)
        written = {id(x.values_): x for x in tensors((args, kwargs))}  # in place, or `out`
        if any(id(y) in written and not same_layout(written[id(y)], y) for y in tensors(real)):
            return with_values(func(*args, **kwargs), real)
        with _disable_current_modes():
            return mapped(lambda y: written[id(y)] if id(y) in written else self.fake(y, device), real)

    def fake(self, real: Any, device: torch.device) -> Any:
        """A fake tensor of these values, laid out in memory as they are; a number, of .item(), unchanged."""
        if not isinstance(real, Tensor):
            return real
        shape = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
        if offset := real.storage_offset():
            whole = torch.empty(len(real.untyped_storage()) // real.element_size(), dtype=real.dtype, device="meta")
            shape = whole.as_strided(real.shape, real.stride(), offset)
        return with_values(FakeTensor(self.fakes, shape, device), real)

    def lifted(self, x: Any) -> Any:
        """A real tensor as a fake one on the CPU that shares its values."""
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        with _disable_current_modes():
            fake = self.fakes.from_tensor(x, static_shapes=True)
        return with_values(fake, x)


def like(x: Tensor, real: Any) -> Any:
    """Fake tensors of the shapes and types of `real`, on the device of x."""
    return mapped(lambda y: torch.empty(y.shape, dtype=y.dtype, device=x.device), real)


def same_layout(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def common_device(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where an operation's results are. Raises RuntimeError where it gets tensors of two devices."""
    given, name = tensors((args, kwargs)), func._schema.name
    devices = {x.device for x in given if x.ndim or x.device.type == "cuda"}  # CUDA kernels accept numbers from the CPU
    types = {device.type for device in devices}
    mixed = len(types) > 1 and name not in COPIES
    if name in INDEXING:
        written = [x.device.type for x in args[2:] if isinstance(x, Tensor) and x.ndim]
        mixed = (given[0].device.type == "cpu" and "cuda" in types) or not {*written} <= {given[0].device.type}
    if mixed:
        raise RuntimeError(f"{name} got tensors on {' and '.join(sorted(types))}")
    return kwargs.get("device") or next((x for x in devices if x.type == "cuda"), torch.device("cpu"))


class Frontend(TorchFunctionMode):
    """What torch does above the dispatcher, where it asks for a real CUDA device or refuses fake tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.device:
            args, kwargs = tuple(map(numbered, args)), {key: numbered(x) for key, x in kwargs.items()}
        check_generator(args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None and (not tensors(args) or any(isinstance(x, FakeTensor) for x in tensors(args))):
            return handler(*args, **kwargs)
        return func(*args, **kwargs)


def check_generator(args: Any, kwargs: dict[str, Any]) -> None:
    """Raise where random numbers of one device are drawn from a generator of another one."""
    if (stream := kwargs.get("generator")) is not None:
        device = torch.device(kwargs.get("device") or next((x.device for x in tensors(args)), "cpu"))
        if (device.type == "cuda") is not isinstance(stream, CudaGenerator):
            raise RuntimeError(f"a generator of another device than {device}")


def numbered(x: Any) -> Any:
    """cuda as cuda:0, since no device is the current one."""
    is_cuda = (isinstance(x, str) and x == "cuda") or (isinstance(x, torch.device) and x.type == "cuda")
    return torch.device("cuda", 0) if is_cuda else x


def reading(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that reads the memory of a CPU tensor."""

    def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cpu":
            raise TypeError(f"{method.__name__} cannot read the memory of device {x.device}")
        return on_values(method, (x, *args), kwargs)

    return read


def to(x: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """`x.to(device, dtype)`, or `x.to(y)`"""
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    device = next((y.device for y in args if isinstance(y, Tensor)), device) or x.device
    dtype = dtype or x.dtype
    if (device, dtype) == (x.device, x.dtype) and not copy and memory_format is None:
        return x
    return aten._to_copy.default(x, device=device, dtype=dtype, memory_format=memory_format)


def quantile(x: Tensor, q: Tensor) -> Tensor:
    """`torch.quantile(x, q)`"""
    common_device(aten.gather.default, (x, q), {})
    real = on_values(torch.quantile, (x, q))
    return with_values(like(x, real), real)


def deepcopy(x: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy(x)`"""
    copied = x.detach().clone()
    return nn.Parameter(copied, x.requires_grad) if isinstance(x, nn.Parameter) else copied


HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.to: to,
    Tensor.cpu: lambda x: to(x, "cpu"),
    Tensor.cuda: lambda x: to(x, "cuda:0"),
    Tensor.is_cuda.__get__: lambda x: x.device.type == "cuda",
    **{method: reading(method) for method in (Tensor.numpy, Tensor.__array__, Tensor.data_ptr)},
    Tensor.tolist: lambda x: on_values(Tensor.tolist, (x,)),
    Tensor.__deepcopy__: deepcopy,
    torch.quantile: quantile,
    torch.asarray: lambda x, **how: on_values(torch.asarray, (x,), how),  # of storage, which safetensors reads
}


def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of `nn.Module._apply`, which swaps fake tensors in memory and does not accept references to them."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, x in module._parameters.items():
        if x is not None:
            module._parameters[name] = nn.Parameter(function(x), x.requires_grad)
    module._buffers.update({name: function(x) for name, x in module._buffers.items() if x is not None})
    return module


def file_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.save` of the values, or `torch.load` of real tensors."""
    return lambda *args, **kwargs: on_values(function, args, kwargs)


class ThisThread(ThreadPoolExecutor):
    """Calls at once: modes apply to the thread that enters them."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **options))
        return future


REPLACED: list[tuple[Any, str, Any]] = [  # which tensors' own methods do not call
    (torch, "Generator", generator),
    (torch.cuda, "get_device_name", lambda device: "a fake GPU"),
    (torch, "save", file_function(torch.save)),
    (torch, "load", file_function(torch.load)),
    (nn.Module, "_apply", apply),
    (io, "ThreadPoolExecutor", ThisThread),
]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The values of a model's parameters and buffers, which must all be on the GPU. To call inside `FakeCuda`."""
    state = model.state_dict()
    left = [name for name, x in state.items() if x.device != torch.device("cuda", 0)]
    assert state and not left, f"not on the GPU: {left}"
    return {name: value(x) for name, x in state.items()}


class FakeCuda:
    """The modes together: within, "cuda" is a device. Gradients are recorded where `grad` asks for them."""

    def __init__(self, grad: bool = False) -> None:
        self.grad = grad

    def __enter__(self) -> None:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.modes = ExitStack()
        for owner, name, replacement in REPLACED:
            self.modes.enter_context(patch.object(owner, name, replacement))
        for mode in (torch.set_grad_enabled(self.grad), fakes, Values(fakes), Frontend()):
            self.modes.enter_context(mode)

    def __exit__(self, *error: Any) -> None:
        self.modes.close()
