"""svdit: quantize diffusion transformers with SVDQuant, sample from them, and measure quality and speed.

    import svdit

    model = svdit.load("digits")
    svdit.quantize_(model, "w8a8")
    images = svdit.sample(model, [0, 1, 2], steps=50)

Names are imported on first use: `import svdit` itself imports no torch.
"""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdit.api import evaluate, load, psnr, quantize_, sample, save, save_image
    from svdit.checkpoints.store import load_model, load_quantized, save_model, save_quantized
    from svdit.errors import UserError
    from svdit.evaluation.compare import compare
    from svdit.evaluation.options import Options
    from svdit.holdout import held_out
    from svdit.kernels.formats import Format
    from svdit.model.dit import DiT
    from svdit.model.zoo import DiT_models
    from svdit.quant.config import QuantConfig, Recipe, Rule, recipe_for
    from svdit.runtime.accelerate import accelerate
    from svdit.runtime.decoder import load_autoencoder
    from svdit.sampling.batch import generate
    from svdit.sampling.config import SamplingConfig
    from svdit.sampling.dataset import generate_dataset

__version__ = "0.1.0"

_MODULES = {
    **dict.fromkeys(("load", "quantize_", "sample", "psnr", "evaluate", "save", "save_image"), "api"),
    **dict.fromkeys(("QuantConfig", "Recipe", "Rule", "recipe_for"), "quant.config"),
    **dict.fromkeys(("load_model", "save_model", "load_quantized", "save_quantized"), "checkpoints.store"),
    "UserError": "errors",
    "Format": "kernels.formats",
    "held_out": "holdout",
    "accelerate": "runtime.accelerate",
    "generate": "sampling.batch",
    "generate_dataset": "sampling.dataset",
    "SamplingConfig": "sampling.config",
    "load_autoencoder": "runtime.decoder",
    "Options": "evaluation.options",
    "compare": "evaluation.compare",
    "DiT": "model.dit",
    "DiT_models": "model.zoo",
}

__all__ = [
    "DiT", "DiT_models", "Format", "Options", "QuantConfig", "Recipe", "Rule", "SamplingConfig", "UserError",
    "accelerate", "compare", "evaluate", "generate", "generate_dataset", "held_out", "load", "load_autoencoder",
    "load_model", "load_quantized", "psnr", "quantize_", "recipe_for", "sample", "save", "save_image", "save_model",
    "save_quantized",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        near = get_close_matches(name, _MODULES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"module 'svdit' has no attribute {name!r}{hint}")
    return getattr(import_module(f"svdit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
