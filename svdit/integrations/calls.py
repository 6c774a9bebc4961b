"""The calls of a model while its pipeline runs: recorded to a folder, then replayed as a calibration set.

A uniform sample of the calls is kept, one file each, so neither memory nor disk grows with the number of steps. A
finished folder is used again by the same run; a damaged one is recorded again.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdit.errors import UserError
from svdit.files import atomic_path, remove_empty, sha256
from svdit.printing import warn
from svdit.quant.observe import ForwardLoop
from svdit.quant.select import names_by_linear

SUMMARY = "calls.json"
Progress = Callable[[int, int], None]


class Calls:
    """Calls in a folder. `run_id` identifies the pipeline and how it was run; `limit` is the most that are kept."""

    def __init__(self, folder: Path, run_id: str, limit: int) -> None:
        self.folder, self.run_id, self.limit = folder, run_id, limit
        self.reached: list[str] = []  # the linears that were called

    def load(self) -> bool:
        """Use what an earlier run recorded. False where it did not finish, or was damaged: record again then.

        Raises UserError where it ran another pipeline or with other settings.
        """
        try:
            content = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
            run_id, sums, reached = content["run_id"], dict(content["sha256"]), list(content["reached"])
        except FileNotFoundError:
            return False
        except (KeyError, OSError, TypeError, ValueError) as error:
            warn(f"{self.folder / SUMMARY} is damaged ({error}); the calls are recorded again")
            return False
        if run_id != self.run_id:
            raise UserError(f"{self.folder} is from a run with other settings or another version; delete it")
        for name, digest in sums.items():
            if not (self.folder / name).is_file() or sha256(self.folder / name) != digest:
                warn(f"{self.folder / name} is damaged; the calls are recorded again")
                return False
        self.reached = reached
        return True

    def record(self, model: nn.Module, runs: Iterable[Callable[[], object]], seed: int = 0) -> None:
        """Run each of `runs`, functions that call `model`, and keep some of the calls.

        Raises UserError for arguments that are no data, and where the model is never called.
        """
        self.remove()
        generator, seen, reached = torch.Generator().manual_seed(seed), 0, set[nn.Module]()
        linears = names_by_linear(model)

        def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            nonlocal seen
            drawn = int(torch.randint(seen + 1, (), generator=generator, device="cpu"))  # reservoir sampling
            place = seen if seen < self.limit else drawn
            seen += 1
            if place < self.limit:
                with atomic_path(self.folder / f"{place:05}.pt") as temporary:
                    torch.save((data(args, type(model).__name__), data(options, type(model).__name__)), temporary)

        with ExitStack() as stack:
            stack.enter_context(model.register_forward_pre_hook(keep, with_kwargs=True))
            for linear in linears:
                stack.enter_context(linear.register_forward_pre_hook(lambda linear, _: reached.add(linear)))
            for run in runs:
                run()
        if not seen:
            raise UserError(f"the pipeline never called its {type(model).__name__}; choose another component")
        self.reached = [name for linear, names in linears.items() if linear in reached for name in names]
        sums = {file.name: sha256(file) for file in self.files()}
        with atomic_path(self.folder / SUMMARY) as temporary:
            content = {"run_id": self.run_id, "sha256": sums, "reached": self.reached}
            temporary.write_text(json.dumps(content), encoding="utf-8")

    def files(self) -> list[Path]:
        """The recorded calls."""
        return sorted(self.folder.glob("*.pt"))

    def loop(self, progress: Callable[[], Any]) -> ForwardLoop:
        """The forward loop that repeats the calls; `progress()` is a context of a function (done, total)."""
        files = self.files()

        def loop(model: nn.Module) -> None:
            device = next(model.parameters()).device
            with progress() as tick:
                for i, file in enumerate(files):
                    args, options = torch.load(file, map_location=device, weights_only=True)
                    model(*args, **options)
                    tick(i + 1, len(files))

        return loop

    def remove(self) -> None:
        """Delete the folder's own files."""
        for file in (self.folder / SUMMARY, *self.files()):
            file.unlink(missing_ok=True)
        remove_empty(self.folder)


def data(value: Any, name: str) -> Any:
    """The arguments with their tensors (…) on the CPU. Raises UserError for objects that are no data."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)  # a view would be stored with its base
    if type(value) in (tuple, list):
        return type(value)(data(each, name) for each in value)
    if isinstance(value, dict):
        return {key: data(each, name) for key, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.Size):
        return value
    raise UserError(f"the pipeline passes a {type(value).__name__} to its {name}, which cannot be recorded; omit it")
