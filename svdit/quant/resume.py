"""Finished layers, saved one by one, so that an interrupted run resumes and processes can share the work.

Every file has a checksum; damaged ones are quantized again.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from svdit import __version__, distributed
from svdit.errors import UserError
from svdit.files import atomic_path
from svdit.printing import warn
from svdit.quant.config import Recipe
from svdit.quant.linear import LinearSpec, SVDLinear
from svdit.quant.report import LayerReport
from svdit.storage.checksum import digest


class DamagedError(Exception):
    """Why a file cannot be used."""


Result = tuple[SVDLinear, LayerReport]


class Results:
    """A mapping from layer name to its quantized layer and report; with a folder, it survives a restart."""

    def __init__(self, folder: Path | None, plan: dict[str, Recipe], run_id: str) -> None:
        self.folder, self.memory = folder, dict[str, Result]()
        if folder is None:
            return
        recipes = {name: asdict(recipe) for name, recipe in plan.items()}
        text = json.dumps([__version__, run_id, recipes], sort_keys=True)
        self.plan = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.memory)

    def __contains__(self, name: str) -> bool:
        if name not in self.memory and self.folder and self._path(name).exists():
            try:
                self.memory[name] = self._load(name)
            except DamagedError as error:
                warn(f"{self._path(name)} is damaged ({error}); the layer is quantized again")
        return name in self.memory

    def __setitem__(self, name: str, result: Result) -> None:
        self.memory[name] = result
        if self.folder is None:
            return
        layer, report = result
        O_I_bias = [layer.out_features, layer.in_features, layer.bias is not None]
        header = {"plan": self.plan, "shape": O_I_bias, "spec": asdict(layer.spec), "report": asdict(report)}
        with atomic_path(self._path(name)) as temporary:
            state = {key: value.detach().contiguous() for key, value in layer.state_dict().items()}
            save_file(
                state,
                temporary,
                {
                    "result": json.dumps(header, allow_nan=False),
                    "sha256": digest(header, {key: value.cpu() for key, value in state.items()}),
                },
            )

    def collect(self, names: list[str]) -> dict[str, Result]:
        """All results in the order of `names`, with those of other processes."""
        if distributed.world_size() > 1:  # tensors on a GPU would be received on the sender's
            for layer, _ in self.memory.values():
                layer.cpu()
        everyone: dict[str, Result] = {}
        for part in distributed.gather(self.memory):
            everyone.update(part)
        return {name: everyone[name] for name in names}

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _load(self, name: str) -> Result:
        path = self._path(name)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                header: dict[str, Any] = json.loads(metadata["result"])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            checksum, plan = digest(header, state), header["plan"]
        except Exception as error:  # a damaged file can raise anything
            raise DamagedError(str(error)) from None
        if metadata.get("sha256") != checksum:
            raise DamagedError("it does not match its checksum")
        if plan != self.plan:
            raise UserError(f"{path} is from a run with other settings or another version; delete {self.folder}")
        O, I, _ = header["shape"]
        layer = SVDLinear.from_tensors(LinearSpec.from_dict(header["spec"]), O, I, state)
        return layer, LayerReport(**header["report"])
