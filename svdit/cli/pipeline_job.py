"""The work of `svdit quantize --pipeline`: record, quantize, save, and compare images; it resumes step by step."""

import argparse
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from svdit import __version__
from svdit.cli.quantize import remove
from svdit.evaluation.paired import psnr
from svdit.files import atomic_path, check_zip, remove_empty, temporary_folder, writing
from svdit.images import Pixels, write_png
from svdit.integrations.calls import Calls
from svdit.integrations.diffusers import attach_
from svdit.integrations.folders import PipelineFolder
from svdit.integrations.pipelines import CLASSES, Sampler
from svdit.integrations.rules import plan_for
from svdit.kernels import ops
from svdit.pictures import subject
from svdit.printing import warn
from svdit.progress import progress
from svdit.quant.quantize import quantize_
from svdit.quant.report import QuantReport
from svdit.runtime.accelerate import accelerate, fallbacks
from svdit.sheet import DIFFERENCE, compared, sheet

COMPARED = 2**20  # added to the seeds of the images that are compared, which calibrate nothing


class Job:
    """The work on one pipeline; everything that resumes is in the folder `work`."""

    def __init__(
        self, args: argparse.Namespace, sampler: Sampler, component: str, lines: list[str], run_id: str
    ) -> None:
        self.args, self.sampler, self.component, self.run_id = args, sampler, component, run_id
        self.work = args.output.with_name(f"{args.output.name}.partial")
        digest = hashlib.sha256(json.dumps([__version__, run_id]).encode()).hexdigest()
        self.calls = Calls(self.work / "calls", digest, args.calib_calls)
        config = self.model.config
        classes = config.get("num_embeds_ada_norm") or config.get("num_classes") or CLASSES
        self.calibrating = sampler.conditions(lines, args.calib_images, classes)
        self.compared = sampler.conditions(lines, args.images, classes)
        self.before: list[Pixels] = []
        self.after: list[Pixels] = []

    @property
    def model(self) -> Any:
        """The component that is quantized."""
        return getattr(self.sampler.pipeline, self.component)

    def quantize(self) -> tuple[QuantReport, dict[str, str]]:
        """Record, and quantize the component in place; returns the report, and why other layers are left alone."""
        start, args = time.perf_counter(), self.args
        if not self.calls.load():
            self._images_file.unlink(missing_ok=True)
            with progress("calibrating", unit="images") as tick:
                self.calls.record(self.model, self._runs(tick), args.seed)
        self.before = self._stored_images()
        recorded = time.perf_counter() - start
        plan = plan_for(self.model, args.preset, adaln=args.adaln, skip=args.skip, reached=self.calls.reached)
        loop = self.calls.loop(lambda: progress("replaying", unit="calls"))
        with progress("quantizing", unit="layers") as tick:
            report = quantize_(
                self.model,
                plan.config,
                loop,
                max_memory=args.max_memory * 1e9,
                work_dir=self.work / "layers",
                run_id=self.run_id,
                progress=tick,
            )
        report.add_seconds(record=recorded)
        attach_(self.model)
        return report, plan.kept

    def _runs(self, tick: Callable[[int, int], None]) -> Iterator[Callable[[], object]]:
        for i, condition in enumerate(self.calibrating):
            yield partial(self.sampler, condition, self.args.seed + i)
            tick(i + 1, len(self.calibrating))

    @property
    def _images_file(self) -> Path:
        return self.work / "images.npz"

    def _stored_images(self) -> list[Pixels]:
        """Images in full precision, those of an earlier run if there are any."""
        try:
            check_zip(self._images_file)
            with np.load(self._images_file) as stored:
                return [stored[f"arr_{i}"] for i in range(len(self.compared))]
        except FileNotFoundError:
            pass
        except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            warn(f"{self._images_file} is damaged ({error}); its images are generated again")
        images = self._images("images in full precision")
        with atomic_path(self._images_file) as temporary, temporary.open("wb") as file:
            np.savez(file, *images)
        return images

    def _images(self, what: str) -> list[Pixels]:

        images: list[Pixels] = []
        with progress(what, bool(self.compared), "images") as tick:
            for i, condition in enumerate(self.compared):
                images.append(self.sampler(condition, COMPARED + self.args.seed + i))
                tick(i + 1, len(self.compared))
        return images

    @contextmanager
    def saved(self, folder: PipelineFolder, variant: str | None) -> Iterator[None]:
        """Write the whole pipeline under a temporary name, and rename it at the end: an interrupted run can resume."""
        with temporary_folder(self.args.output.parent) as place:
            whole = place / "pipeline"
            with writing(self.args.output):
                self.model.save_pretrained(whole / self.component)
                folder.copy(whole, self.component, variant)
            yield
            with writing(self.args.output):
                whole.rename(self.args.output)

    def accelerate(self) -> str:
        """Pack the quantized layers; returns those in fp32 as a sentence."""
        return ops.summary(fallbacks(accelerate(self.model)))

    def compare(self) -> list[float]:
        """Generate the same images again; the PSNR of each to full precision in dB."""
        self.after = self._images("images, quantized")
        return [psnr(a, b) for a, b in zip(self.after, self.before, strict=True)]

    def draw(self, path: Path, decibels: list[float]) -> bool:
        """Draw the pairs with their PSNR, of a video its middle frame; whether that was possible."""
        if not self.compared:
            return False
        before, after = ([video[len(video) // 2] for video in videos] for videos in (self.before, self.after))
        conditions = [each if isinstance(each, str) else f"class {each}" for each in self.compared]
        captions = [
            f"{value:.1f} dB, seed {COMPARED + self.args.seed + i}\n{condition}"
            for i, (condition, value) in enumerate(zip(conditions, decibels, strict=True))
        ]
        about = subject(self.sampler.kind, self.component, self.args.preset)
        title = "Images from the same seeds, and their PSNR to full precision"
        rows = compared(before, {"quantized": after})
        write_png(path, sheet(title, about, rows, ("", captions), [DIFFERENCE]))
        return True

    def remove(self) -> None:
        """Delete what is only needed to resume."""
        self.calls.remove()
        remove(self.work / "layers")
        self._images_file.unlink(missing_ok=True)
        remove_empty(self.work)
