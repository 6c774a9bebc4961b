"""The forward pass of a DiT, of every family, as an ONNX graph: (N, C, H, W), (N,) and (N,) to (N, C or 2C, H, W).

Quantized layers are QuantizeLinear and DequantizeLinear around a MatMul, with the scales of activations computed in the
graph, one for each token. Weights are stored as INT8, low-rank factors in their own type.
"""

import json
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from svdit.errors import UserError
from svdit.export.graph import Graph
from svdit.kernels import reference as ref
from svdit.kernels.formats import Format
from svdit.model.dit import DiT
from svdit.model.embeddings import BottleneckPatchEmbed
from svdit.model.layers import Attention, Block, FinalLayer, Mlp, RMSNorm, SwiGLU
from svdit.quant.linear import SVDLinear

INT8 = Format(8)
Linear = nn.Linear | SVDLinear


def onnx_model(model: DiT) -> Any:
    """An onnx.ModelProto with the inputs x (N, C, H, W), t (N,), y (N,) int64; its metadata has the configuration.

    Raises UserError without the package onnx, for formats other than W8A8 and INT8 weights, and for models above 2 GB.
    """
    graph, config = Graph(), model.config
    Network(graph, model)
    sides = (model.used_channels, config.input_size, config.input_size)
    return graph.model(graph.nodes[-1].output[0], sides, {"config": json.dumps(asdict(config))})


class Network:
    """Adds the nodes of a model to a graph; the last node's output is the model's."""

    def __init__(self, graph: Graph, model: DiT) -> None:
        self.graph, self.model, self.config = graph, model, model.config
        config = self.config
        x = graph.input("x", torch.float32, *model.input_shape)
        t, y = graph.input("t", torch.float32), graph.input("y", torch.int64)
        table = graph.constant("y_embedder.embedding_table.weight", model.y_embedder.embedding_table.weight.float())
        label = graph("Gather", table, y)
        c = graph("Add", self.times(t), label)
        self.conditioning = graph("Mul", c, graph("Sigmoid", c))  # silu, which every adaLN starts with
        x = graph("Add", self.patches(x), graph.constant("pos_embed", model.pos_embed.float()))
        tokens = model.pos_embed.shape[1]
        for i, block in enumerate(model.blocks):
            if config.context_tokens and i == config.context_start:
                context = graph.constant("in_context_posemb", model.in_context_posemb.float())
                D = config.hidden_size
                x = graph("Concat", graph("Add", graph.reshape(label, -1, 1, D), context), x, axis=1)
                tokens += config.context_tokens
            assert isinstance(block, Block)
            x = self.block(f"blocks.{i}", block, x, tokens)
        if config.context_tokens:
            starts, ends = graph.shape(config.context_tokens), graph.shape(tokens)
            x = graph("Slice", x, starts, ends, graph.shape(1))
        self.images(self.final("final_layer", model.final_layer, x))

    def linear(self, name: str, module: nn.Module, x: str, *sides: int) -> str:
        """A linear of x (…, I): (N, *sides, O)."""
        graph = self.graph
        assert isinstance(module, Linear)
        if isinstance(module, SVDLinear):
            y = self.quantized(name, module, graph.reshape(x, -1, module.in_features))
        else:
            weight = graph.constant(f"{name}.weight", module.weight.float())
            y = self.product(graph.reshape(x, -1, module.in_features), weight)
        if module.bias is not None:
            y = graph("Add", y, graph.constant(f"{name}.bias", module.bias.float()))
        return graph.reshape(y, -1, *sides, module.out_features)

    def quantized(self, name: str, layer: SVDLinear, x: str) -> str:
        """Qa(x̂) Wᵀ + (x̂ L2ᵀ) L1ᵀ of x (M, I): (M, O)."""
        graph, spec = self.graph, layer.spec
        if layer.in_shift is not None:
            x = graph("Sub", x, graph.constant(f"{name}.in_shift", layer.in_shift))
        if layer.in_scale is not None:
            x = graph("Mul", x, graph.constant(f"{name}.in_scale", layer.in_scale.reciprocal()))
        if spec.hadamard:
            rotation = graph.constant(f"hadamard_{spec.hadamard}", ref.hadamard_matrix(spec.hadamard))
            x = graph("MatMul", graph.reshape(x, -1, spec.hadamard), rotation)
            x = graph.reshape(x, -1, layer.in_features)
        terms = []
        if spec.weight:
            rounded = self.rounded(x, spec.act, name) if spec.act else x
            terms.append(self.product(rounded, self.matrix(name, layer, "residual", spec.weight)))
        if spec.rank:
            inner = self.product(x, self.matrix(name, layer, "l2", spec.factors))
            terms.append(self.product(inner, self.matrix(name, layer, "l1", spec.factors)))
        return graph("Add", *terms) if len(terms) > 1 else terms[0]

    def product(self, x: str, weight: str) -> str:
        """x (M, I) · weight (O, I)ᵀ. As Gemm: ONNX Runtime rounds the other input of a MatMul with INT8 weights."""
        return self.graph("Gemm", x, weight, transB=1)

    def rounded(self, x: str, form: Format, name: str) -> str:
        """x (M, I) as INT8 with one scale for each row, and back."""
        check_format(form, f"the activations of {name}")
        graph = self.graph
        largest = graph("ReduceMax", graph("Abs", x), graph.shape(1), keepdims=0)
        scales = graph("Max", graph("Div", largest, graph.number(127.0)), graph.number(1e-30))  # of rows of zeros
        codes = graph("QuantizeLinear", x, scales, axis=0, output_dtype=graph.onnx.TensorProto.INT8)
        return graph("DequantizeLinear", codes, scales, axis=0)

    def matrix(self, name: str, layer: SVDLinear, part: str, form: Format | None) -> str:
        """A matrix of a layer: INT8 codes and scales, or floats in their own type."""
        graph, name = self.graph, f"{name}.{part}"
        if form is None:
            factor = graph.constant(name, layer.layer().tensors[part])
            bf16 = layer.spec.factor_dtype == "bfloat16"
            return graph("Cast", factor, to=graph.onnx.TensorProto.FLOAT) if bf16 else factor
        check_format(form, name)
        codes = graph.constant(f"{name}_codes", ref.layer_codes(layer.layer(), part))
        scales = graph.constant(f"{name}_scales", ref.layer_scales(layer.layer(), part).values().flatten())
        return graph("DequantizeLinear", codes, scales, axis=0)

    def times(self, t: str) -> str:
        """(N,) times to (N, D)."""
        graph, mlp = self.graph, self.model.t_embedder.mlp
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device="cpu") / 128)
        angles = graph("Mul", graph.reshape(t, -1, 1), graph.constant("frequencies", frequencies))
        waves = graph("Concat", graph("Cos", angles), graph("Sin", angles), axis=1)
        hidden = self.linear("t_embedder.mlp.0", mlp[0], waves)
        return self.linear("t_embedder.mlp.2", mlp[2], graph("Mul", hidden, graph("Sigmoid", hidden)))

    def patches(self, x: str) -> str:
        """(N, C, H, W) to (N, T, D)."""
        graph, embedder = self.graph, self.model.x_embedder
        convolutions = {"proj1": embedder.proj1, "proj2": embedder.proj2} if isinstance(
            embedder, BottleneckPatchEmbed
        ) else {"proj": embedder.proj}  # fmt: skip
        for name, module in convolutions.items():
            parts = {"weight": module.weight, "bias": module.bias}
            names = [graph.constant(f"x_embedder.{name}.{k}", v.float()) for k, v in parts.items() if v is not None]
            x = graph("Conv", x, *names, strides=list(module.stride))
        return graph("Transpose", graph.reshape(x, 0, self.config.hidden_size, -1), perm=[0, 2, 1])

    def norm(self, name: str, module: nn.Module, x: str, width: int) -> str:
        """LayerNorm or RMSNorm over the last dimension of x."""
        graph = self.graph
        if isinstance(module, RMSNorm):
            mean = graph("ReduceMean", graph("Mul", x, x), graph.shape(-1))
            root = graph("Sqrt", graph("Add", mean, graph.number(1e-6)))
            return graph("Mul", graph("Div", x, root), graph.constant(f"{name}.weight", module.weight.float()))
        assert isinstance(module, nn.LayerNorm)
        if module.elementwise_affine:
            parts = [graph.constant(f"{name}.{k}", getattr(module, k).float()) for k in ("weight", "bias")]
        else:
            parts = [graph.constant(f"ones_{width}", torch.ones(width, device="cpu"))]
        return graph("LayerNormalization", x, *parts, axis=-1, epsilon=module.eps)

    def modulations(self, name: str, module: nn.Module, count: int) -> list[str]:
        """`count` modulations (N, 1, D) of an adaLN."""
        assert isinstance(module, nn.Sequential)
        every = self.linear(f"{name}.adaLN_modulation.1", module[1], self.conditioning, 1)
        return self.graph.several("Split", count, every, axis=2, num_outputs=count)

    def modulated(self, x: str, shift: str | None, scale: str) -> str:
        """x · (1 + scale) + shift"""
        graph = self.graph
        x = graph("Mul", x, graph("Add", scale, graph.number(1.0)))
        return graph("Add", x, shift) if shift else x

    def block(self, name: str, block: Block, x: str, tokens: int) -> str:
        """A transformer block of x (N, T, D)."""
        graph, D = self.graph, self.config.hidden_size
        shift1 = shift2 = None
        if block.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulations(name, block.adaLN_modulation, 6)
        else:
            scale1, gate1, scale2, gate2 = self.modulations(name, block.adaLN_modulation, 4)
        inner = self.modulated(self.norm(f"{name}.norm1", block.norm1, x, D), shift1, scale1)
        x = graph("Add", x, graph("Mul", gate1, self.attention(f"{name}.attn", block.attn, inner, tokens)))
        inner = self.modulated(self.norm(f"{name}.norm2", block.norm2, x, D), shift2, scale2)
        return graph("Add", x, graph("Mul", gate2, self.mlp(f"{name}.mlp", block.mlp, inner, tokens)))

    def attention(self, name: str, module: Attention, x: str, tokens: int) -> str:
        """Attention of x (N, T, D)."""
        graph, heads = self.graph, self.config.num_heads
        head = self.config.hidden_size // heads
        qkv = graph.reshape(self.linear(f"{name}.qkv", module.qkv, x, tokens), 0, tokens, 3, heads, head)
        parts = graph.several("Split", 3, graph("Transpose", qkv, perm=[2, 0, 3, 1, 4]), axis=0, num_outputs=3)
        q, k, v = (graph("Squeeze", part, graph.shape(0)) for part in parts)  # (N, heads, T, D/heads)
        if self.config.qk_norm != "none":
            q = self.norm(f"{name}.q_norm", module.q_norm, q, head)
            k = self.norm(f"{name}.k_norm", module.k_norm, k, head)
        if self.config.rope:
            q, k = self.rotated(q, tokens), self.rotated(k, tokens)
        scores = graph("MatMul", graph("Mul", q, graph.number(head**-0.5)), graph("Transpose", k, perm=[0, 1, 3, 2]))
        x = graph("MatMul", graph("Softmax", scores, axis=-1), v)
        return self.linear(f"{name}.proj", module.proj, graph("Transpose", x, perm=[0, 2, 1, 3]), tokens)

    def rotated(self, x: str, tokens: int) -> str:
        """x (N, heads, T, d), with each pair of channels turned by the token's place."""
        graph, (cosines, sines) = self.graph, self.model.rotation[:, -tokens:]
        d = cosines.shape[-1]
        turn = torch.zeros(d, d, device="cpu")  # (a, b) to (−b, a)
        turn[1::2, 0::2], turn[0::2, 1::2] = -torch.eye(d // 2, device="cpu"), torch.eye(d // 2, device="cpu")
        turned = graph("MatMul", x, graph.constant("quarter_turn", turn))
        cosines, sines = (
            graph.constant(f"rope_{tokens}_{part}", table) for part, table in (("cos", cosines), ("sin", sines))
        )
        return graph("Add", graph("Mul", x, cosines), graph("Mul", turned, sines))

    def mlp(self, name: str, module: nn.Module, x: str, tokens: int) -> str:
        """GELU or SwiGLU of x (N, T, D)."""
        graph = self.graph
        if isinstance(module, Mlp):
            hidden = graph("Gelu", self.linear(f"{name}.fc1", module.fc1, x, tokens), approximate="tanh")
            return self.linear(f"{name}.fc2", module.fc2, hidden, tokens)
        assert isinstance(module, SwiGLU)
        a, b = graph.several("Split", 2, self.linear(f"{name}.w12", module.w12, x, tokens), axis=2, num_outputs=2)
        hidden = graph("Mul", graph("Mul", a, graph("Sigmoid", a)), b)
        return self.linear(f"{name}.w3", module.w3, hidden, tokens)

    def final(self, name: str, layer: FinalLayer, x: str) -> str:
        """Patches (N, T, P·P·C) of x (N, T, D)."""
        shift, scale = self.modulations(name, layer.adaLN_modulation, 2)
        x = self.modulated(self.norm(f"{name}.norm_final", layer.norm_final, x, self.config.hidden_size), shift, scale)
        return self.linear(f"{name}.linear", layer.linear, x, self.model.pos_embed.shape[1])

    def images(self, x: str) -> str:
        """Patches (N, T, P·P·C) to images, of the channels in use."""
        graph, P, C = self.graph, self.config.patch_size, self.model.out_channels
        side = self.config.input_size // P
        x = graph("Transpose", graph.reshape(x, 0, side, side, P, P, C), perm=[0, 5, 1, 3, 2, 4])
        x = graph.reshape(x, 0, C, side * P, side * P)
        return graph("Slice", x, graph.shape(0), graph.shape(self.model.used_channels), graph.shape(1))


def check_format(form: Format, what: str) -> None:
    """Raises UserError for all formats but INT8 with one scale for each row."""
    if form != INT8:
        raise UserError(f"{what}: {form} has no form in ONNX that svdit writes; quantize with --preset w8a8")
