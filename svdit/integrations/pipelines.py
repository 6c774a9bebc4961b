"""Pipelines of diffusers as functions from a prompt, or a class, and a seed to images."""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from svdit.errors import UserError, out_of_memory
from svdit.extras import require
from svdit.files import reading
from svdit.images import Pixels
from svdit.integrations.folders import PipelineFolder

PROMPTS = (
    "a photograph of a red fox in a snowy forest",
    "an oil painting of a harbour at dawn",
    "a bowl of fresh strawberries on a wooden table",
    "the skyline of a city at night, reflected in a river",
    "a portrait of an old fisherman, studio lighting",
    "a watercolour of a hummingbird and purple flowers",
    "an astronaut riding a bicycle on the moon",
    "a cosy library with tall shelves and a fireplace",
    "a close-up of a mechanical watch",
    "a sailing boat in a storm, dramatic clouds",
    "a plate of spaghetti with tomato sauce and basil",
    "a small robot watering plants in a greenhouse",
    "a mountain lake with clear turquoise water",
    "a street market in Marrakesh, spices and lanterns",
    "a sign that says HELLO WORLD above a cafe",
    "a sleeping cat on a windowsill in the rain",
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CLASSES = 1000  # of ImageNet, where the model does not say how many it has
OF_PIPELINES = (  # errors of their code, for inputs and weights that do not fit
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(NotImplementedError, RuntimeError, TypeError, ValueError),
)


@dataclass(frozen=True)
class Sampler:
    """A pipeline with fixed options; call it with a prompt, or a class label, and a seed.

    Raises UserError for a pipeline that needs other inputs, and for options that it does not have.
    """

    pipeline: Any
    options: dict[str, Any]

    def __post_init__(self) -> None:
        if self.conditioning is None:
            raise UserError(f"a {self.kind} has neither a prompt nor class labels; it cannot be calibrated")
        if unknown := self.options.keys() - self.parameters.keys():
            raise UserError(f"a {self.kind} has no option {min(unknown)}; choose from {', '.join(self.parameters)}")
        needed = {name for name, each in self.parameters.items() if each.default is each.empty}
        if missing := needed - {self.conditioning} - self.options.keys():
            raise UserError(f"a {self.kind} needs {', '.join(sorted(missing))}; pass it as --call {min(missing)}=VALUE")

    @property
    def kind(self) -> str:
        """The class of the pipeline."""
        return type(self.pipeline).__name__

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The options of a call."""
        parameters = inspect.signature(type(self.pipeline).__call__).parameters.items()
        variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        return {name: each for name, each in parameters if name != "self" and each.kind not in variadic}

    @property
    def conditioning(self) -> str | None:
        """The option that says what is to be seen."""
        return next((name for name in ("prompt", "class_labels") if name in self.parameters), None)

    def conditions(self, lines: Sequence[str], count: int, classes: int = CLASSES) -> list[str | int]:
        """`count` prompts, or class labels: `lines` in turn, if there are any.

        Raises UserError for lines that are no labels.
        """
        if self.conditioning == "prompt":
            own: Sequence[str | int] = lines or PROMPTS
        else:
            own = [label(line, classes) for line in lines] or [i * classes // count for i in range(count)]
        return [own[i % len(own)] for i in range(count)]

    def __call__(self, condition: str | int, seed: int) -> Pixels:
        """Images, or the frames of a video, uint8 (F, H, W, 3). Raises UserError where they contain NaN."""
        options = dict(self.options)
        options[self.conditioning or ""] = condition if isinstance(condition, str) else [condition]
        own = {"generator": torch.Generator("cpu").manual_seed(seed), "output_type": "np"}
        options |= {name: value for name, value in own.items() if name in self.parameters}
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            result = self.pipeline(**options)
        except OF_PIPELINES as error:
            if out_of_memory(error):
                raise
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise UserError(f"the {self.kind} cannot run ({reason}); check its folder and --call") from error
        return frames(result[0], self.kind)


def label(line: str, classes: int) -> int:
    """The class label in a line. Raises UserError for other text."""
    if not (line.isascii() and line.isdecimal() and len(line) < 10 and int(line) < classes):
        raise UserError(f"{line!r} is no class label; write one from 0 to {classes - 1} on each line")
    return int(line)


def frames(images: Any, kind: str) -> Pixels:
    """What a pipeline returned, as uint8 (F, H, W, 3). Raises UserError for other shapes, and for NaN."""
    values = np.asarray([np.asarray(image) for image in images])
    if values.ndim < 4 or values.shape[-1] not in (1, 3):
        raise UserError(f"a {kind} returned an array {values.shape}, and not images; pass another pipeline")
    if values.dtype != np.uint8:
        if not np.isfinite(values).all():
            raise UserError(f"the images of the {kind} contain NaN or Inf; check its weights and their dtype")
        values = (values.clip(0, 1) * 255).round().astype(np.uint8)
    values = values.reshape(-1, *values.shape[-3:])
    return np.broadcast_to(values, (*values.shape[:3], 3))


def load(folder: PipelineFolder, component: str, variant: str | None, device: torch.device) -> Any:
    """The pipeline, on the device, in the type that the component's weights are stored in.

    Raises UserError for a class that the installed version of diffusers does not have, and for damaged folders.
    """
    diffusers = require("diffusers")
    if not isinstance(getattr(diffusers, folder.kind, None), type):
        raise UserError(f"diffusers {diffusers.__version__} has no pipeline {folder.kind}; upgrade diffusers")
    dtype = stored_dtype(folder.weights(component, variant))
    quiet(diffusers)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder.path, variant=variant, dtype=dtype, local_files_only=True
        )
    except UserError:
        raise
    except Exception as error:  # of many libraries, about any of the files
        if out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise UserError(f"diffusers cannot load {folder.path} ({reason}); check or download it again") from error
    return pipeline.to(device)


def quiet(diffusers: Any) -> None:
    """No progress bars or warnings of diffusers and transformers."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    if find_spec("transformers"):
        logging = require("transformers.utils.logging")
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """The type of most of the values in files of weights; fp32 where they are not safetensors.

    Raises UserError for damaged files.
    """
    counts = dict.fromkeys(DTYPES.values(), 0)
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with reading(file), safe_open(file, "pt") as content:
                    for name in content.keys():  # noqa: SIM118
                        part = content.get_slice(name)
                        counts[DTYPES.get(part.get_dtype(), torch.float32)] += math.prod(part.get_shape())
            except SafetensorError as error:
                raise UserError(f"{file} is damaged ({error}); download it again") from None
    return max(counts, key=lambda dtype: counts[dtype])
