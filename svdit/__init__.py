"""svdit: quantize diffusion transformers with SVDQuant, sample from them, and measure quality and speed.

    import svdit

    model = svdit.load_model("digits")
    svdit.quantize_(model, svdit.QuantConfig((svdit.Rule("blocks.*", svdit.recipe_for("w8a8")),)), forward_loop)

Names are imported on first use: `import svdit` itself imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdit.checkpoints.store import load_model, load_quantized, save_model, save_quantized
    from svdit.evaluation.compare import compare
    from svdit.evaluation.evaluate import evaluate
    from svdit.holdout import held_out
    from svdit.kernels.formats import Format
    from svdit.model.dit import DiT
    from svdit.model.zoo import DiT_models
    from svdit.quant.config import QuantConfig, Rule, recipe_for
    from svdit.quant.quantize import quantize_
    from svdit.runtime.accelerate import accelerate
    from svdit.sampling.batch import generate
    from svdit.sampling.dataset import generate_dataset

__version__ = "0.1.0"

_MODULES = {
    "quantize_": "quant.quantize",
    "QuantConfig": "quant.config",
    "Rule": "quant.config",
    "recipe_for": "quant.config",
    "Format": "kernels.formats",
    "held_out": "holdout",
    "load_model": "checkpoints.store",
    "save_model": "checkpoints.store",
    "load_quantized": "checkpoints.store",
    "save_quantized": "checkpoints.store",
    "accelerate": "runtime.accelerate",
    "generate": "sampling.batch",
    "generate_dataset": "sampling.dataset",
    "evaluate": "evaluation.evaluate",
    "compare": "evaluation.compare",
    "DiT": "model.dit",
    "DiT_models": "model.zoo",
}

__all__ = [
    "DiT", "DiT_models", "Format", "QuantConfig", "Rule", "accelerate", "compare", "evaluate", "generate",
    "generate_dataset", "held_out", "load_model", "load_quantized", "quantize_", "recipe_for", "save_model",
    "save_quantized",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'svdit' has no attribute {name!r}")
    return getattr(import_module(f"svdit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
