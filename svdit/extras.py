"""Optional dependencies: imported on first use, by `require("diffusers")`; pyproject.toml lists them as extras."""

from importlib import import_module
from typing import Any

from svdit.errors import UserError
from svdit.shims import allow_cpu_torchvision

EXTRAS = {  # package to the extra that installs it
    "accelerate": "diffusers",
    "diffusers": "vae",
    "gradio": "app",
    "matplotlib": "report",
    "onnx": "onnx",
    "scipy": "eval",
    "sklearn": "train",
    "torch_fidelity": "eval",
    "torchvision": "eval",
    "transformers": "diffusers",
}
USE_TORCHVISION = ("diffusers", "torch_fidelity", "torchvision")


def require(module: str) -> Any:
    """Import an optional module, "scipy.linalg" for example. Raises UserError with the pip command where it fails."""
    package = module.partition(".")[0]
    try:
        if package in USE_TORCHVISION:
            allow_cpu_torchvision()
        return import_module(module)
    except ImportError as error:
        raise UserError(f"cannot import {package} ({error}); run: pip install 'svdit[{EXTRAS[package]}]'") from None
