"""A quantized model is a module like others: deepcopy, pickle, autocast, inference_mode and .to() work.

What `accelerate` returns runs only: it refuses to be copied or saved, so keep the quantized model for that.

    python examples/copies_and_precision.py
"""

import copy
import pickle

import torch
from torch import nn

import svdit

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
batches = torch.randn(16, 64, 64)
with torch.no_grad():
    before = model(batches)
    svdit.quantize_(model, "w8a8", list(batches))

device = "cuda" if torch.cuda.is_available() else "cpu"
variants = {
    "deepcopy": copy.deepcopy(model),
    "pickle": pickle.loads(pickle.dumps(model)),
    "to": copy.deepcopy(model).to(device),
    "accelerate": svdit.accelerate(copy.deepcopy(model)),
}
errors = {}
with torch.inference_mode():
    for name, variant in variants.items():
        x = batches.to(device) if name == "to" else batches
        errors[name] = float((variant(x).cpu() - before).norm() / before.norm())
    with torch.autocast("cpu", torch.bfloat16):
        errors["autocast"] = float((model(batches).float() - before).norm() / before.norm())
error = max(errors.values())
print(*(f"{name}: relative error of the output {value:.4f}" for name, value in errors.items()), sep="\n")
try:
    copy.deepcopy(variants["accelerate"])
except Exception as message:
    print(message)
