"""A quantizer of diffusers, registered when this module is imported: quantized models load and save like others.

    import svdit.integrations.diffusers

    pipeline = DiffusionPipeline.from_pretrained("flux-w4a4")
    svdit.accelerate(pipeline.transformer)

A model's config.json has `quantization_config`: {"quant_method": "svdit", "version": 1, "layers": {name: spec}}, and
its weights the tensors of these layers. Their types are part of the format: `torch_dtype` is for all other tensors.
"""

import weakref
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdit.checkpoints.restore import naming, plain_linear, specs_from_header
from svdit.errors import UserError
from svdit.extras import require
from svdit.integrations.rules import rules_for as rules_for
from svdit.kernels.checks import check
from svdit.quant.config import QuantConfig, Rule, recipe_for
from svdit.quant.linear import LinearSpec, SVDLinear, layer_specs, quantized_layers, swap
from svdit.quant.quantize import quantize_
from svdit.quant.solve import uncalibrated
from svdit.runtime.linear import FastLinear

require("diffusers")
from diffusers.quantizers import auto  # noqa: E402
from diffusers.quantizers.base import DiffusersQuantizer  # noqa: E402
from diffusers.quantizers.quantization_config import QuantizationConfigMixin  # noqa: E402

VERSION = 1
CONFIG = Path("config.json")  # as messages name it


class Method(str, Enum):
    """The `quant_method` in config.json."""

    SVDIT = "svdit"


class SvditConfig(QuantizationConfigMixin):
    """The quantized layers of a model, as in its config.json; or, with `preset`, how to quantize while loading.

    The latter needs no calibration and is less accurate than `svdit quantize`: the truncated SVD, no smoothing and no
    centring, and rounding to nearest. `skip` are patterns of layers to leave alone.
    `timesteps="published"` is for a DiT with published weights: see `published_timesteps_`.
    Raises UserError for other fields and values.
    """

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        *,
        version: int = VERSION,
        preset: str | None = None,
        skip: Iterable[str] = (),
        timesteps: str = "diffusers",
        quant_method: str = "svdit",
        **unknown: object,
    ) -> None:
        if type(version) is not int or version > VERSION:
            raise UserError(
                f"the quantization_config has version {version!r}, and svdit reads {VERSION}; upgrade svdit"
            )
        if unknown:
            raise UserError(
                f"the quantization_config has a field {min(unknown)!r}; pass an unchanged one, or upgrade svdit"
            )
        if (layers is None) == (preset is None):
            raise UserError("a quantization_config has either layers or a preset; pass one of them")
        if timesteps not in ("diffusers", "published"):
            raise UserError(f"timesteps is {timesteps!r}; choose diffusers or published")
        if not isinstance(layers, Mapping | None):
            raise UserError(
                f"the layers of the quantization_config are a {type(layers).__name__}; pass names and specs"
            )
        self.quant_method = Method.SVDIT  # type: ignore[assignment]
        self.version, self.preset, self.skip, self.timesteps = version, preset, tuple(skip), timesteps
        self.specs: dict[str, LinearSpec] = specs_from_header({"layers": dict(layers or {})}, CONFIG)
        if preset is not None:
            recipe_for(preset)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as config.json has it."""
        content: dict[str, Any] = {"quant_method": "svdit", "version": self.version}
        if self.preset is not None:
            content |= {"preset": self.preset, "skip": list(self.skip)}
        else:
            content["layers"] = {name: spec.to_dict() for name, spec in self.specs.items()}
        return content | ({"timesteps": self.timesteps} if self.timesteps != "diffusers" else {})

    to_diff_dict = to_dict  # for `to_json_string`

    def __repr__(self) -> str:
        return f"SvditConfig({self.preset!r})" if self.preset else f"SvditConfig({len(self.specs)} layers)"


class SvditQuantizer(DiffusersQuantizer):
    """Builds the layers of an `SvditConfig`, and checks what the files contain before it is used."""

    use_keep_in_fp32_modules = True  # the attributes that diffusers reads
    requires_calibration = False
    quantization_config: SvditConfig
    pre_quantized: bool

    def __init__(self, quantization_config: SvditConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.loaded_keys: set[str] = set()
        self.left: dict[str, set[str]] = {}  # by layer, the tensors that are yet to load
        self.model: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": None}

    def validate_environment(self, *args: object, **options: Any) -> None:
        """Raises UserError without the package accelerate, and for a device map with a disk."""
        require("accelerate")
        device_map = options.get("device_map")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise UserError("quantized layers cannot be offloaded to a disk; choose another device_map")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Note the names of the tensors in the files."""
        self.loaded_keys = set(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        self.model = weakref.ref(model)
        config = self.quantization_config
        if config.timesteps == "published":
            published_timesteps_(model)
        if not self.pre_quantized:
            return
        with naming(CONFIG, "layers that do not fit the model", "pass an unchanged folder"):
            modules = dict(model.named_modules(remove_duplicate=False))
            swap(model, {n: empty_layer(plain_linear(modules, n), spec) for n, spec in config.specs.items()})
            self._check_names(model)
        self.left = {name: set(layer.state_dict()) for name, layer in quantized_layers(model).items()}
        model.register_to_config(quantization_config=config)

    def _check_names(self, model: nn.Module) -> None:
        """Raises UserError where tensors of quantized layers are missing from the files, or unknown."""
        wanted, inside = set(model.state_dict()), tuple(f"{name}." for name in self.quantization_config.specs)
        unknown = {key for key in self.loaded_keys - wanted if key.startswith(inside)}
        for what, keys in (("lack", wanted - self.loaded_keys), ("have unknown", unknown)):
            if keys:
                raise UserError(f"the weights {what} {len(keys)} tensors (first: {min(keys)})")

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **options: Any
    ) -> bool:
        """Whether a tensor (…) of the files belongs to a quantized layer."""
        return param_name.rpartition(".")[0] in self.left

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        """Raises UserError: diffusers calls this where shapes (…) differ."""
        raise UserError(
            f"{param_name} is {tuple(loaded.shape)} and not {tuple(current.shape)}; pass an unchanged folder"
        )

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        *args: object,
        **options: Any,
    ) -> None:
        """Store a tensor (…) as it is in the files: `param_value` has been cast.

        Raises UserError for other types and for values that no quantization produces.
        """
        name, _, part = param_name.rpartition(".")
        layer, tensor = model.get_submodule(name), state_dict[param_name]
        assert isinstance(layer, SVDLinear)
        if tensor.dtype != (wanted := layer.state_dict()[part].dtype):
            raise UserError(f"{param_name} is {tensor.dtype} and not {wanted}; pass an unchanged folder")
        layer.store({part: tensor.to(target_device)})
        layer.dtype = options.get("dtype") or torch.float32
        self.left[name].discard(part)
        if not self.left[name]:
            with naming(CONFIG, f"a layer {name} with damaged weights", "copy or download the folder again"):
                check(layer.layer().detached())

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        if not self.pre_quantized:
            preset = self.quantization_config.preset or ""
            rules = rules_for(model, preset, skip=self.quantization_config.skip).rules
            data_free = (Rule(rule.pattern, rule.recipe and uncalibrated(rule.recipe)) for rule in rules)
            quantize_(model, QuantConfig(tuple(data_free)))
            attach_(model, self.quantization_config.timesteps)
            self.quantization_config = model.hf_quantizer.quantization_config
        return model

    @property
    def is_serializable(self) -> bool:
        """True. Raises UserError for an accelerated model, before anything is written."""
        model = self.model() if self.model else None
        if model is not None and any(isinstance(module, FastLinear) for module in model.modules()):
            raise UserError("an accelerated model cannot be saved; save the quantized model before accelerating it")
        return True

    @property
    def is_trainable(self) -> bool:
        """False: gradients do not pass through rounding."""
        return False


auto.AUTO_QUANTIZER_MAPPING["svdit"] = SvditQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING["svdit"] = SvditConfig


def attach_(model: Any, timesteps: str = "diffusers") -> None:
    """Let `save_pretrained` of a model that `quantize_` quantized write what `from_pretrained` needs.

    `timesteps` as in `SvditConfig`. Raises UserError for a model that is not quantized, or not of diffusers.
    """
    if not (specs := layer_specs(model)) or not hasattr(model, "register_to_config"):
        raise UserError(f"this {type(model).__name__} is no quantized model of diffusers; call quantize_ on one before")
    config = SvditConfig(specs, timesteps=timesteps)
    quantizer = SvditQuantizer(config, pre_quantized=True)
    quantizer.model = weakref.ref(model)
    model.register_to_config(quantization_config=config)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, Method.SVDIT


def empty_layer(linear: nn.Linear, spec: LinearSpec) -> SVDLinear:
    """A layer of this spec in place of `linear`, whose tensors are on the meta device."""
    shapes = spec.tensors(linear.out_features, linear.in_features)
    bias: Tensor | None = linear.bias
    if bias is None and not spec.shifted:
        del shapes["bias"]
    tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
    return SVDLinear(linear.in_features, linear.out_features, spec=spec, tensors=tensors)


def published_timesteps_(model: Any) -> None:
    """Space the timestep frequencies of diffusers' DiT as the published DiT does: by 1/128 and not by 1/127.

    DiTTransformer2DModel differs there from the model whose weights it loads.
    Raises UserError for other models.
    """
    if type(model).__name__ != "DiTTransformer2DModel":
        raise UserError(
            f"timesteps='published' is for a DiTTransformer2DModel, not for a {type(model).__name__}; omit it"
        )
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
