"""The documented names: the named models, the SVD-factored linear layer, and the call that puts it into a model."""

from svdit.compat import DiT_models, SVDLinear, apply_svd_to_dit

__all__ = ["DiT_models", "SVDLinear", "apply_svd_to_dit"]
