"""How each model of a page was made: the command, the settings, the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from svdit.report.page_inputs import Run, number, part
from svdit.report.page_markup import Markup, join, plain, table, tag

NONE = "–"
METHOD = (  # of a recipe
    *("low_rank", "rank", "factor_dtype", "centre", "smoothing", "hadamard"),
    *("search_scales", "rounding", "iterations"),
)
STEPS = {"plan": "choosing formats", "calibrate": "calibrating", "quantize": "quantizing", "evaluate": "evaluating"}


def making(runs: Sequence[Run]) -> Markup | None:
    """For each model: the command, the settings, the layers that were left alone, the time on which processor."""
    parts = [made(run) for run in runs if run.report or run.manifest or run.evaluation]
    return join([*parts, times(runs)]) if parts else None


def made(run: Run) -> Markup:
    """How one model and its images were made."""
    content: list[Markup | None] = []
    if run.report:
        unrecorded = tag("p", "The command is not recorded: the report is of an earlier version.", class_="note")
        content += [repeat(run.report) or unrecorded, facts(quantization_facts(run))]
    if run.manifest:
        hidden = ("labels", "files", "quantization", "tool", "command")
        settings = {k: v for k, v in run.manifest.items() if k not in hidden and v is not None}
        content += [repeat(run.manifest), details("Settings of the images", facts(settings))]
    if run.evaluation.get("command") != run.manifest.get("command"):  # equal for metrics of `generate --evaluate`
        content.append(repeat(run.evaluation))
    return join([tag("h3", run.name), *content])


def repeat(record: Mapping[str, object]) -> Markup | None:
    """The command that made a file; none where it is not recorded."""
    command = record.get("command")
    return tag("pre", tag("code", command), tabindex="0") if command else None


def quantization_facts(run: Run) -> dict[str, object]:
    """What was quantized and how, as entries of a list."""
    report, settings = run.report, part(run.report, "settings")
    recipe, source = part(settings, "recipe"), part(report, "source")
    target = {k: v for k, v in run.plan.items() if v is not None and k != "tries"}
    kept = report.get("kept")
    chosen = {
        "model": report.get("model"),
        "source": source and f"{source.get('file')}, SHA-256 {brief(source.get('sha256'))}",
        "preset": settings.get("preset") or settings.get("mode"),
        "rank ratio": settings.get("rank_ratio"),
        "weights": run.layers and counted(line.get("weight") for line in run.layers),
        "activations": run.layers and counted(line.get("act") for line in run.layers),
        "method": {key: recipe[key] for key in METHOD if recipe.get(key) not in (None, 0)},
        "adaLN": settings.get("adaln"),
        "skipped on request": settings.get("skip"),
        "target": target,
        "calibration": settings.get("calibration"),
        "left in full precision": kept if isinstance(kept, list) else None,
        "backend": report.get("backend"),
        "date": report.get("date"),
        "versions": report.get("versions"),
    }
    return {key: value for key, value in chosen.items() if value}


def facts(entries: Mapping[str, object]) -> Markup:
    """A list of names and values."""
    return tag("dl", *(tag("div", tag("dt", k.replace("_", " ")), tag("dd", brief(v))) for k, v in entries.items()))


def times(runs: Sequence[Run]) -> Markup | None:
    """Seconds by phase, with the processor."""
    spent = [
        (run.name, phase, number(seconds), machine)
        for run in runs
        for phase, seconds, machine in (
            *((phase, seconds, run.report.get("machine")) for phase, seconds in part(run.report, "seconds").items()),
            ("evaluate", run.evaluation.get("seconds"), part(run.evaluation, "versions").get("machine")),
        )
    ]
    rows = [
        (name, STEPS.get(phase, phase), f"{s:.1f}", machine or NONE)
        for name, phase, s, machine in spent
        if s and s >= 0.05
    ]
    columns = ("model", "step", "seconds", "processor")
    return join([tag("h3", "Time"), table(columns, rows, "Time", visible=False)]) if rows else None


def details(title: str, content: Markup) -> Markup:
    """Content that opens on a click."""
    return tag("details", tag("summary", title), content)


def brief(value: object) -> str:
    """A value of a settings table; a hash is shortened, a dict becomes its entries that are set."""
    if isinstance(value, dict):
        entries = {str(k).replace("_", " "): v for k, v in value.items() if v is not None and v is not False}
        return ", ".join(k if v is True else f"{k} {brief(v)}" for k, v in entries.items()) or "none"
    text = ", ".join(map(brief, value)) or "none" if isinstance(value, list) else plain(value)
    return text[:16] + "…" if len(text) == 64 and text.isalnum() else text


def counted(values: Iterable[object]) -> str:
    """The different formats, the most frequent first."""
    counts = Counter(str(value) for value in values if value is not None)
    if len(counts) > 3:
        return f"{len(counts)} formats"
    return ", ".join(name if len(counts) == 1 else f"{name} ({n})" for name, n in counts.most_common()) or NONE


def title_of(runs: Sequence[Run]) -> str:
    """The models' name, or what else the page is of."""
    models = {str(m) for run in runs for m in (run.manifest.get("model"), run.report.get("model")) if m}
    return " and ".join(sorted(models)) or ", ".join(run.name for run in runs[:4]) or "images"
