"""Files made by hand, with a valid checksum: each loads and computes what it says, or is refused in one sentence.

The cases replace one field of the header or one tensor. Few of them run by default, more than a thousand with
`-m slow`, as under sanitizers (`make sanitize`). No case may take minutes, crash, or end in a traceback.
"""

import copy
import faulthandler
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize, relative
from safetensors.torch import save_file

from svdit.checkpoints import io
from svdit.checkpoints.store import load_model
from svdit.errors import UserError
from svdit.kernels import ops
from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS, Format
from svdit.kernels.reference import quantize
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.linear import LinearSpec, layer_specs, linears, quantized_layers, rebuild_
from svdit.runtime.accelerate import accelerate

State = dict[str, Any]
STRIDES = [97, pytest.param(8, marks=pytest.mark.slow)]  # of the cases that run
SPECS = {  # what the layers of one block store
    "attn.qkv": LinearSpec(4, None, "bfloat16", WEIGHT_FORMATS["int4"], ACT_FORMATS["int8"], True, True, 32),
    "attn.proj": LinearSpec(weight=WEIGHT_FORMATS["int8"], act=ACT_FORMATS["int8"], hadamard=64),
    "mlp.fc1": LinearSpec(3, Format(8), weight=WEIGHT_FORMATS["int4-bf16"], act=ACT_FORMATS["int4"]),
    "mlp.fc2": LinearSpec(rank=5, factors=Format(3), rank_ratio=0.5),
    "adaLN_modulation.1": LinearSpec(weight=WEIGHT_FORMATS["int4-zero"]),
}
OTHERS = {
    "attn.qkv": LinearSpec(weight=WEIGHT_FORMATS["nvfp4"]),
    "attn.proj": LinearSpec(weight=WEIGHT_FORMATS["fp8"], act=ACT_FORMATS["fp8"]),
    "mlp.fc1": LinearSpec(weight=WEIGHT_FORMATS["mxfp4"], act=ACT_FORMATS["mxfp4"]),
    "mlp.fc2": LinearSpec(weight=Format(4, 64, "bf16"), act=Format(4, 64, "bf16", "unsigned"), shifted=True),
    "adaLN_modulation.1": LinearSpec(weight=Format(5, 16, "e4m3", "unsigned")),
}


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 48, 64, 128, 2**20, 2**31, 2**40, 2**63, 10**30, -(2**40), 10**9,
    0.5, 4.0, float("nan"), float("inf"), "", "8", "int8", "bf16", "e4m3", "full", "affine", "\x1b[31m\n; x", [], {},
    [4], {"bits": 4}, {"x": 1}, nested(50),
]  # fmt: skip


@pytest.fixture(scope="module")
def good() -> tuple[State, State]:
    """The tensors and the header of a file whose two blocks hold ten different formats."""
    config = DiTConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=5)
    model = randomize(DiT(config))
    torch.manual_seed(0)  # of the factors of new layers
    specs = {f"blocks.0.{name}": spec for name, spec in SPECS.items()}
    specs |= {f"blocks.1.{name}": spec for name, spec in OTHERS.items()}
    weights = {name: linear.weight.detach() for name, linear in linears(model)}
    rebuild_(model, {name: spec.to_dict() for name, spec in specs.items()})
    for name, layer in quantized_layers(model).items():
        if form := layer.spec.weight:
            layer.store_residual(*quantize(weights[name].abs() if form.span == "unsigned" else weights[name], form))
    layers = layer_specs(model)
    return dict(model.state_dict()), {"name": "", "config": asdict(config), "layers": layers, "provenance": {}}


def fields(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in nested dicts, the dicts too."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from fields(value, (*path, key))


def header_cases(tensors: State, header: State) -> Iterator[tuple[str, State, State]]:
    """One field replaced, removed, or added."""
    full = {"format_version": 1, "tool_version": "0", "shared": {}, **header}
    for path in fields(full):
        for value in [*VALUES, "removed"]:
            changed = copy.deepcopy(full)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value == "removed":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield f"{'.'.join(path)} = {value!r:.40}", tensors, changed
    one, two = "blocks.0.attn.proj", "blocks.1.attn.proj"
    for name, shared in {
        "unknown": {"a": "b"},
        "itself": {"pos_embed": "pos_embed"},
        "number": {"pos_embed": 3},
        "list": {"pos_embed": ["pos_embed"]},
        "other": {"pos_embed": "final_layer.linear.weight"},
        "layer": {f"{two}.residual_codes": f"{one}.residual_codes"},
        "float": {"final_layer.linear.weight": f"{one}.residual_codes"},
    }.items():
        yield f"shared {name}", tensors, {**full, "shared": shared}
    for name in ("", "blocks", "blocks.0", "nowhere", "final_layer.linear", "x_embedder.proj", "blocks.0.norm1"):
        layers = {**header["layers"], name: header["layers"][one]}
        yield f"another layer {name!r}", tensors, {**full, "layers": layers}


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{f"{dtype}": (lambda x, dtype=dtype: x.float().to(dtype)) for dtype in (
        torch.float16, torch.float64, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64,
        torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    )},
    **{f"filled with {value}": (lambda x, value=value: filled(x, value)) for value in (
        0.0, -1.0, 1.0, torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 1e-45, 448.0, -128.0, 127.0, 255.0, 15.0, 16.0,
    )},
    "no rows": lambda x: x[:0],
    "a row fewer": lambda x: x[:-1],
    "twice": lambda x: torch.cat([x, x]),
    "flat": lambda x: x.reshape(-1),
    "transposed": lambda x: x.transpose(0, -1).contiguous(),
    "another dimension": lambda x: x[None],
    "one number": lambda x: x.reshape(-1)[0],
}  # fmt: skip


def filled(x: torch.Tensor, value: float) -> torch.Tensor:
    """Every third number replaced by the bits that `value` has in the type of x, or by some for integers."""
    x = x.clone()
    flat = x.view(-1)
    if not x.is_floating_point():
        value = {torch.nan: 77, torch.inf: 127, -torch.inf: -128}.get(value, int(max(-1e3, min(1e3, value)))) % 256
        flat = flat.view(torch.uint8)
    flat[::3] = torch.full((1,), value).to(flat.dtype)
    return x


def tensor_cases(tensors: State, header: State) -> Iterator[tuple[str, State, State]]:
    """One tensor changed, removed, renamed, or added."""
    for key, tensor in tensors.items():
        if key.startswith("blocks.") or key == "pos_embed":
            for name, change in CHANGES.items():
                yield f"{key} {name}", {**tensors, key: change(tensor)}, header
            rest = {other: value for other, value in tensors.items() if other != key}
            yield f"{key} removed", rest, header
            yield f"{key} renamed", {**rest, f"{key}x": tensor}, header
    yield "one more", {**tensors, "blocks.0.attn.qkv.l3": torch.ones(2)}, header


def write(path: Path, tensors: State, header: State) -> None:
    """A file with a valid checksum, whatever it contains."""
    header = {"format_version": 1, **header}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {io.KEY: json.dumps({**header, "sha256": io.digest(header, tensors)})})


INPUTS = (
    torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)),
    torch.tensor([3, 900]),
    torch.tensor([0, 5]),
)


@torch.no_grad()
def outcome(path: Path) -> str:
    """How loading and running the file ends, "" if it must not end so."""
    try:
        model = load_model(path)
    except UserError as error:
        message = str(error)
        good = message.startswith(str(path)) and message.count("\n") == 0 and "; " in message and len(message) < 1000
        return "refused" if good else ""
    if model.config.input_size != 4 or model.config.num_classes != 5:
        return ""
    expected = model(*INPUTS)
    y = accelerate(model, "cpu" if not ops.reasons()["cpu"] else None)(*INPUTS)
    # With bf16 attention codes tip, and a scale of 16 enlarges them to 0.055; on the others it is 3e-7.
    return "right" if relative(y, expected) < 0.1 or not expected.isfinite().all() else ""


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("cases", [header_cases, tensor_cases])
def test_every_hostile_file_is_refused_or_right(
    good: tuple[State, State], tmp_path: Path, stride: int, cases: Callable[..., Iterator[tuple[str, State, State]]]
) -> None:
    made = list(cases(*good))[::stride]
    outcomes: dict[str, str] = {}
    for number, (name, tensors, header) in enumerate(made):
        faulthandler.dump_traceback_later(120, exit=True)  # a hang ends the run
        path = tmp_path / f"{number}.safetensors"
        write(path, tensors, header)
        try:
            outcomes[name] = outcome(path)
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}"
        path.unlink()
    faulthandler.cancel_dump_traceback_later()
    assert {name: result for name, result in outcomes.items() if result not in ("refused", "right")} == {}
    print({kind: list(outcomes.values()).count(kind) for kind in ("refused", "right")})
    assert len(outcomes) == len(made) and "refused" in outcomes.values()
