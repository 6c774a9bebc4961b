"""Models with random quantized layers, and the float model with exactly their dequantized weights."""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from svdit.kernels.formats import ACT_FORMATS, WEIGHT_FORMATS
from svdit.kernels.reference import SCALE_DTYPES, Scales
from svdit.model.dit import DiT, DiTConfig
from svdit.quant.linear import LinearSpec, SVDLinear, linears, quantized_layers, swap

XL_2 = DiTConfig()
ADALN = {"int8": WEIGHT_FORMATS["int8"], "int4": WEIGHT_FORMATS["int4-bf16"]}
SCHEMES = {
    "W8A8": ("int8", "int8"),
    "W4A8": ("int4", "int8"),
    "W4A8 channel": ("int4-channel", "int8"),
    "W4A4": ("int4", "int4"),
}


def random_layer(linear: nn.Linear, spec: LinearSpec, generator: torch.Generator) -> SVDLinear:
    """A quantized layer of random codes, weights about N(0, 1/I), with random per-channel shift and scale."""
    O, I = linear.out_features, linear.in_features
    layer = SVDLinear(I, O, spec=replace(spec, rank=0, scaled=False, shifted=False))
    layer.spec, form = spec, spec.weight
    assert form is not None
    codes = torch.randint(max(form.lo, -127), form.hi + 1, (O, I), generator=generator, dtype=torch.int8)
    size = (3 / I) ** 0.5 / form.hi
    if form.scale == "int8":
        groups = torch.randint(9, 16, (O, form.groups(I)), generator=generator, dtype=torch.int8)
        scales = Scales(groups, torch.full((O, 1), size / 12))
    else:
        scales = Scales(torch.full((O, form.groups(I)), size).to(SCALE_DTYPES[form.scale]))
    layer.store_residual(codes, scales)
    if spec.rank:
        layer.store_factors(
            torch.randn(O, spec.rank, generator=generator) / spec.rank**0.5,
            torch.randn(spec.rank, I, generator=generator) / I**0.5,
        )
    if spec.scaled:
        layer.in_scale = torch.rand(I, generator=generator) + 0.5
        layer.in_shift = torch.randn(I, generator=generator) * 0.1
    return layer


def quantized(scheme: str, adaln: str = "int8", depth: int = 28, rank: int = 32, input_size: int = 32) -> DiT:
    """DiT-XL/2 with the linears of its blocks quantized; deterministic."""
    return random_model(DiTConfig(depth=depth, input_size=input_size), scheme, adaln, rank)


def random_model(config: DiTConfig, scheme: str, adaln: str = "int8", rank: int = 32) -> DiT:
    """The same for any configuration."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = DiT(config)
    weight, act = SCHEMES[scheme]
    spec = LinearSpec(rank, None, "bfloat16", WEIGHT_FORMATS[weight], ACT_FORMATS[act], True, True, 64)
    for name, linear in list(linears(model)):
        if "adaLN" in name:
            swap(model, {name: random_layer(linear, LinearSpec(weight=ADALN[adaln]), generator)})
        elif name.startswith("blocks"):
            swap(model, {name: random_layer(linear, spec, generator)})
    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            if x.is_meta:
                value = torch.randn(x.shape, generator=generator) * (0.02 if x.ndim > 1 else 0.1)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.eval().requires_grad_(False)


def in_floats(model: DiT) -> DiT:
    """The same model with nn.Linear layers of the dequantized weights."""
    model = copy.deepcopy(model)
    for name, layer in quantized_layers(model).items():
        linear = nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features)
        linear.weight = nn.Parameter(layer.effective_weight(), requires_grad=False)
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        shifted = bias if layer.in_shift is None else bias - linear.weight @ layer.in_shift
        linear.bias = nn.Parameter(shifted, requires_grad=False)
        swap(model, {name: linear})
    return model


def model_inputs(batch: int, config: DiTConfig = XL_2) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, H, W), t (N,), y (N,) of a guided step: one t, half of the labels null. `batch` must be even."""
    generator, side = torch.Generator().manual_seed(1), config.input_size
    x = torch.randn(batch // 2, config.in_channels, side, side, generator=generator).repeat(2, 1, 1, 1)
    labels = torch.cat([torch.arange(batch // 2) * 100 % 1000, torch.full((batch // 2,), 1000)])
    return x, torch.full((batch,), 0.5 if config.is_flow else 500), labels
