"""An ONNX graph under construction: nodes are added by calling it, and tensors are names."""

from typing import Any

import torch
from torch import Tensor

from svdit import __version__
from svdit.errors import UserError
from svdit.extras import require

OPSET, IR = 21, 10  # the first where QuantizeLinear says the type of its output
LARGEST = 2 * 10**9  # bytes of a file of protocol buffers
TYPES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.int8: "INT8", torch.int64: "INT64"}


class Graph:
    """`graph("Add", a, b)` adds a node and returns the name of its output."""

    def __init__(self) -> None:
        """Raises UserError without the package onnx."""
        self.onnx = require("onnx")
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.nbytes = 0

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        return self.several(op, 1, *inputs, **attributes)[0]

    def several(self, op: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node, and return the names of its outputs."""
        number = len(self.nodes)
        names = [f"{op}_{number}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), names, f"{op}_{number}", **attributes))
        return names

    def input(self, name: str, dtype: torch.dtype, *sides: int) -> str:
        """Declare an input (N, *sides)."""
        self.inputs.append(self._value(name, dtype, ("N", *sides)))
        return name

    def constant(self, name: str, value: Tensor) -> str:
        """A tensor (…) under a name; one that is known is not stored again."""
        if name not in self.constants:
            value = value.detach().cpu().contiguous()
            raw = value.flatten().view(torch.uint8).numpy().tobytes()
            kind = getattr(self.onnx.TensorProto, TYPES[value.dtype])
            self.constants[name] = self.onnx.helper.make_tensor(name, kind, value.shape, raw, raw=True)
            self.nbytes += len(raw)
        return name

    def number(self, value: float) -> str:
        """A scalar in fp32."""
        return self.constant(f"number_{value!r}", torch.tensor(value, device="cpu"))

    def shape(self, *sides: int) -> str:
        """The sides of a tensor as one (len,); 0 keeps a side, -1 is what is left."""
        return self.constant(f"sides_{'_'.join(map(str, sides))}", torch.tensor(sides, device="cpu"))

    def reshape(self, x: str, *sides: int) -> str:
        """x (…) with other sides."""
        return self("Reshape", x, self.shape(*sides))

    def model(self, output: str, sides: tuple[int, ...], properties: dict[str, str]) -> Any:
        """The model, whose one output (N, *sides) is called `output`, as onnx's checker accepts it.

        Raises UserError for one that no file can hold.
        """
        if self.nbytes > LARGEST:
            raise UserError(
                f"the graph has {self.nbytes / 1e9:.1f} GB, and an ONNX file 2 GB at most; export a quantized model"
            )
        self.nodes.append(self.onnx.helper.make_node("Identity", [output], ["output"]))
        value = self._value("output", torch.float32, ("N", *sides))
        graph = self.onnx.helper.make_graph(self.nodes, "svdit", self.inputs, [value], list(self.constants.values()))
        opsets = [self.onnx.helper.make_opsetid("", OPSET)]
        model = self.onnx.helper.make_model(
            graph, opset_imports=opsets, ir_version=IR, producer_name="svdit", producer_version=__version__
        )
        self.onnx.helper.set_model_props(model, properties)
        self.onnx.checker.check_model(model)
        return model

    def _value(self, name: str, dtype: torch.dtype, sides: tuple[int | str, ...]) -> Any:
        kind = getattr(self.onnx.TensorProto, TYPES[dtype])
        return self.onnx.helper.make_tensor_value_info(name, kind, sides)
