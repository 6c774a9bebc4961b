"""Generates the tables of the docs from results.csv: `python benchmarks/tables.py` updates them.

A table is enclosed by `<!-- table: cpu, 725 rows -->` and `<!-- end: cpu -->`. It is generated from the first 725 rows
of results.csv, which is append-only. New measurements therefore change no table until it is updated.
"""

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("results.csv")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = tuple(
    DOCS / f"{name}.md" for name in ("quantization", "recovery", "evaluation", "performance", "caching", "diffusers")
)
MARKED = re.compile(r"<!-- table: ([a-z ]+), (\d+) rows -->\n.*?<!-- end: \1 -->", re.DOTALL)
INTERVAL = r"(?:; )?95 % ([-\d.e]+ to [-\d.e]+)$"  # in notes, as the others
TIMES, ISA = r"^([\d.]+(?: and [\d.]+)? ms)\b", r"(?:^|, )(?:amx|avx\w+|neon\w+|portable)\b"
Row = dict[str, str]
Rows = Sequence[Row]


def read(path: Path = RESULTS) -> list[Row]:
    """All rows of results.csv."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: Rows, benchmark: str) -> dict[str, Row]:
    """The newest row of every name. Early rows use "picture" for "image"."""
    renamed = ({key: text.replace("picture", "image") for key, text in row.items()} for row in rows)
    return {row["name"]: row for row in renamed if row["benchmark"] == benchmark}


def markdown(header: list[str], lines: list[list[str]], source: str) -> str:
    """A table with its source as a caption."""
    if not lines:
        return "Not measured yet."
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in rows), "", source])


def source(rows: dict[str, Row], command: str = "", setting: str = "") -> str:
    """Caption: machine, versions, commit and date of the newest row, and the command to reproduce it."""
    if not rows:
        return ""
    row = list(rows.values())[-1]
    machine = re.sub(r"\b1 (core|thread)s\b", r"1 \1", row["machine"])
    parts = [setting, machine, row["versions"], f"commit {row['commit']}", row["date"]]
    return ". ".join(filter(None, ["; ".join(filter(None, parts)), reproduce(command)]))


def reproduce(command: str) -> str:
    """How to measure again, as a sentence; "" without a command."""
    return f"Reproduce with `python benchmarks/{command}`." if command else ""


def extract(pattern: str, text: str) -> str:
    """The first group of `pattern` in `text`; "" without a match."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def quality(rows: Rows, experiment: str, header: str) -> str:
    """Each method on the digits model: model size, PSNR and relative L2 of images, mean SQNR of layers."""
    measured = latest(rows, f"digits {experiment}")
    names = [key.removesuffix(" PSNR") for key in measured if key.endswith(" PSNR")]
    if experiment == "presets":
        names.sort(key=lambda name: -pooled_or_mean(measured[f"{name} PSNR"]))
    lines, note = [], ""
    for name in names:
        psnr, layer = measured[f"{name} PSNR"], measured.get(f"{name} layer SQNR")
        note, error = psnr["note"], extract("se ([0-9.]+)", psnr["note"])
        size = f"{float(extract('([0-9.]+) MB', note)):.2f}"
        value = f"{float(psnr['value']):.1f}" + (f" ± {error}" if error else "")
        pooled = extract("pooled ([0-9.]+)", note)
        value += f" ({float(pooled):.1f})" if pooled else ""
        relative = f"{float(measured[f'{name} relative L2']['value']):.4f}"
        lines.append([f"`{name}`", size, value, relative, f"{float(layer['value']):.1f}" if layer else "–"])
    rank = "" if experiment == "ranks" else ", rank 8"
    count = extract("^([0-9]+) digits", note)
    setting = f"{count} digits, DDIM 50, cfg 1.5{rank}; ± over 2 or 3 calibrations, without ± one calibration"
    setting += "; in brackets pooled" * ("pooled" in note)
    columns = [header, "model, MB", "PSNR, dB", "relative L2", "layer SQNR, dB"]
    return markdown(columns, lines, source(measured, f"bench_end_to_end.py {experiment}", setting))


def pooled_or_mean(row: Row) -> float:
    """The pooled PSNR of a measurement; early rows have only the mean."""
    return float(extract("pooled ([0-9.]+)", row["note"]) or row["value"])


def label(method: str) -> str:
    """A preset, or SVDQuant with GPTQ, which no preset is."""
    published = re.fullmatch("svdquant-w(.)a(.)", method)
    return f"SVDQuant W{published[1]}A{published[2]}, GPTQ" if published else f"`{method}`"


def families(rows: Rows) -> str:
    """Each method on a digits model of every family: PSNR, and what quantization adds to the Fréchet distance."""
    measured = {name: row for name, row in latest(rows, "families").items() if not name.startswith("CIFAR")}
    models = models_of(measured)
    full = [measured[f"{model} full Fréchet"] for model in models]
    lines = [["full precision", *("–" for _ in models), *map(distance, full)]]
    for method in sorted({name.split(" ")[1] for name in measured if name.endswith("PSNR")}, key=order_of_method):
        decibels = [with_pooled(measured.get(f"{model} {method} PSNR")) for model in models]
        changes = [difference(measured.get(f"{model} {method} Fréchet")) for model in models]
        lines.append([label(method), *decibels, *changes])
    columns = [f"{model}, dB" for model in models] + [f"{model}, Fréchet" for model in models]
    return markdown(["method", *columns], lines, source(measured, "families.py methods", setting_of(full)))


def two_models(rows: Rows) -> str:
    """Size, PSNR, relative L2 and what quantization adds to the Fréchet distance, on the digits and on CIFAR-10."""
    measured, lines = latest(rows, "families"), []
    for model, name in (("DiT", "digits"), ("CIFAR", "CIFAR-10")):
        full = measured[f"{model} full Fréchet"]
        lines.append([name, "full precision", megabytes(full), "–", "–", distance(full)])
        methods = {key.split(" ")[1] for key in measured if key.startswith(f"{model} ") and key.endswith("PSNR")}
        for method in sorted(methods, key=order_of_method):
            psnr, change = measured[f"{model} {method} PSNR"], difference(measured[f"{model} {method} Fréchet"])
            relative = extract(r"relative L2 ([0-9.]+)", psnr["note"])
            lines.append([name, label(method), megabytes(psnr), with_pooled(psnr), relative, change])
    header = ["model", "method", "size, MB", "PSNR (pooled), dB", "relative L2", "Fréchet distance"]
    newest = {name: row for name, row in measured.items() if name.startswith(("DiT ", "CIFAR "))}
    return markdown(header, lines, source(newest, "families.py methods", setting_of(newest.values())))


def recovery(rows: Rows) -> str:
    """Before and after `svdit recover`, for every model, preset and calibration."""
    measured, lines = latest(rows, "recovery"), []
    for name in [key.removesuffix(" gain") for key in measured if key.endswith(", gain")]:
        before, after, gain, change = (
            measured[f"{name} {part}"] for part in ("before PSNR", "after PSNR", "gain", "Fréchet change")
        )
        pooled = [extract("pooled ([0-9.]+)", row["note"]) for row in (before, after)]
        steps, error = extract("([0-9]+) training steps", gain["note"]), extract("^se ([0-9.]+)", change["note"])
        lines.append([
            name.rstrip(",").replace("digits ", "DiT "), steps,
            f"{float(before['value']):.1f} → {float(after['value']):.1f}",
            f"{float(pooled[0]):.1f} → {float(pooled[1]):.1f}",
            f"{float(gain['value']):+.1f} ± {float(extract('^se ([0-9.]+)', gain['note'])):.1f}",
            f"{float(change['value']):+.2f} ± {float(error):.2f}",
        ])  # fmt: skip
    header = [
        "model, preset",
        "steps to the best",
        "PSNR, dB",
        "pooled, dB",
        "gain, dB",
        "change of the Fréchet distance",
    ]
    newest = {name: row for name, row in measured.items() if name.endswith(", gain")}
    setting = " / ".join(dict.fromkeys(row["note"].split("; ")[1] for row in newest.values()))
    return markdown(header, sorted(lines), source(newest, "recovery.py", setting))


def megabytes(row: Row) -> str:
    """The size of a model, from the note; "–" in early rows."""
    return extract(r"([0-9.]+) MB", row["note"]) or "–"


def distance(row: Row) -> str:
    """A Fréchet distance with its error, from the note."""
    error = float(extract("se ([^;]+)", row["note"]))
    return f"{float(row['value']):.{int(error < 100)}f} ± {error:.{int(error < 100)}f}"


def order_of_method(method: str) -> tuple[int, bool]:
    """W8A8 first, and svdit's recipe before SVDQuant."""
    return -int(method[-3] + method[-1]), "svdquant" in method


def difference(row: Row | None) -> str:
    """A difference to full precision with its error, from the note."""
    if row is None:
        return "–"
    value, error = map(float, extract("difference (.+?);", row["note"]).split(" se "))
    return f"{value:+.{2 * (error < 10)}f} ± {error:.{2 * (error < 10)}f}"


def with_pooled(row: Row | None) -> str:
    """A PSNR with its error, and the pooled one in brackets."""
    if row is None:
        return "–"
    error, pooled = extract("^se ([0-9.]+)", row["note"]), float(extract("pooled ([0-9.]+)", row["note"]))
    return f"{float(row['value']):.1f} ± {error} ({pooled:.1f})"


def conditioning(rows: Rows) -> str:
    """Formats of adaLN on every model and preset: PSNR, what it loses to floats, and the error of the modulations."""
    measured = latest(rows, "conditioning")
    columns = list(dict.fromkeys(name.split(", ", 1)[0] for name in measured))
    lines = []
    for form in dict.fromkeys(name.split(", ", 1)[1] for name in measured):
        found = [measured.get(f"{column}, {form}") for column in columns]
        lines.append([form, *map(loss, found)])
    header = ["adaLN", *columns]
    return markdown(header, lines, source(measured, "conditioning.py", setting_of(measured.values())))


def loss(row: Row | None) -> str:
    """A PSNR, pooled too, its difference to floats with an error, and the mean error and variance of modulations."""
    if row is None:
        return "–"
    names = ("pooled", "minus floats", "se", "mean", "variance")
    pooled, change, error, mean, variance = (float(extract(f"{name} (-?[0-9.]+)", row["note"])) for name in names)
    value = f"{float(row['value']):.1f} ({pooled:.1f})"
    return f"{value}; {change:+.1f} ± {error:.1f}; {mean:.0f}, {variance:.0f}" if error else value


def pipelines(rows: Rows) -> str:
    """SQNR of transformers of diffusers by preset, and the numbers of layers quantized and left alone."""
    measured = latest(rows, "pipelines")
    presets = list(dict.fromkeys(name.split(", ", 1)[1] for name in measured))
    lines = []
    for model in dict.fromkeys(name.split(", ")[0] for name in measured):
        own = [measured[f"{model}, {preset}"] for preset in presets]
        cells = [f"{float(row['value']):.1f} ({extract('([0-9]+) layers', row['note'])})" for row in own]
        lines.append([model, *cells, extract("([0-9]+) left", own[0]["note"])])
    header = [
        "dB (layers)",
        *(preset.upper().replace("EVERY", "every").replace("LINEAR", "linear") for preset in presets),
    ]
    return markdown([*header, "left alone at W8A8"], lines, source(measured, "pipelines.py"))


def families_by_time(rows: Rows) -> str:
    """The error of images, in %, of which some tenths of the steps were quantized, by family."""
    measured = latest(rows, "families by time")
    tenths = list(dict.fromkeys(name.rpartition("tenths ")[2] for name in measured))
    names = {model: [f"{model} w4a4, tenths {tenth}" for tenth in tenths] for model in models_of(measured)}
    cells = [[model, *(f"{100 * float(measured[n]['value']):.2f}" for n in line)] for model, line in names.items()]
    return markdown(["tenths", *tenths], cells, source(measured, "families.py times", setting_of(measured.values())))


def caching(rows: Rows) -> str:
    """PSNR of each model and way to skip blocks, by speed-up in block evaluations; the time of plans below them."""
    measured = latest(rows, "caching")
    sizes, methods = ("2×", "3×", "4×", "6×"), ("plan {}", "plan {}, time", "Taylor {}", "reuse {}")
    models = dict.fromkeys(name.rpartition(", plan 2×, time")[0] for name in measured if name.endswith("plan 2×, time"))
    lines = []
    for model in models:
        for method in methods:
            cells = [cached(measured[f"{model}, {method.format(size)}"], size) for size in sizes]
            lines.append([model, method.replace(" {}", ""), *cells])
    header = ["model", "PSNR in dB, or speed-up in time", *sizes]
    return markdown(header, lines, source(measured, "bench_caching.py", setting_of(measured.values())))


def cached(row: Row, nominal: str) -> str:
    """A speed-up in time; or a PSNR, with the speed-up in block evaluations where it is not the nominal one."""
    if row["unit"] == "×":
        return f"{float(row['value']):.2f}×"
    speedup = f"{float(extract('^([0-9.]+)×', row['note'])):.2g}×"
    return f"{float(row['value']):.1f}" + (f" ({speedup})" if speedup != nominal else "")


def startup(rows: Rows) -> str:
    """The phases of `sample.py` in each version, by processor: wall time, and in brackets that of all processors."""
    measured = {name: latest(part, "startup") for name, part in by_processor(rows, "startup").items()}
    columns: dict[str, dict[str, Row]] = {}
    for processor, each in measured.items():
        for name, row in each.items():
            version, phase = name.split(": ")
            version = row["commit"].rstrip("+") if version == "this version" else version
            columns.setdefault(f"{version}, {processor}", {})[phase] = row
    phases = dict.fromkeys(phase for column in columns.values() for phase in column)
    lines = [[phase, *(seconds(column.get(phase)) for column in columns.values())] for phase in phases]
    captions = ". ".join(f"{name}: {source(each)}" for name, each in measured.items())
    setting = setting_of(row for each in measured.values() for row in each.values())
    return markdown(["s", *columns], lines, f"{setting}. {captions}. {reproduce('bench_startup.py')}")


def seconds(row: Row | None) -> str:
    """Wall time, and that of processors from the note."""
    return "–" if row is None else f"{float(row['value']):.2f} ({extract('^([0-9.]+)', row['note'])})"


def models_of(measured: Iterable[str]) -> list[str]:
    """The models that the names of measurements start with, DiT first."""
    return sorted({name.split(" ")[0] for name in measured}, key=("DiT", "SiT", "JiT").index)


def setting_of(rows: Iterable[Row]) -> str:
    """What the notes of these rows say last, once for each."""
    return " / ".join(dict.fromkeys(row["note"].rpartition("; ")[2] for row in rows))


def synthetic(rows: Rows) -> str:
    """SQNR of layer outputs on the synthetic block."""
    measured = latest(rows, "synthetic")
    columns = [("moderate", layer) for layer in ("qkv", "proj", "fc1", "fc2")] + [("plain", "qkv"), ("plain", "fc2")]
    lines = []
    for name in dict.fromkeys(name.split(" ", 2)[2] for name in measured):
        cells = [measured.get(f"{profile} {layer} {name}") for profile, layer in columns]
        lines.append([name, *(f"{float(row['value']):.2f}" if row else "" for row in cells)])
    header = ["SQNR, dB", *(layer if profile == "moderate" else f"{layer}, plain" for profile, layer in columns)]
    return markdown(header, lines, source(measured, "bench_quantization.py --profiles moderate plain", "rank 16"))


def listing(rows: Rows, benchmark: str, command: str, groups: tuple[str, ...] = ()) -> str:
    """One line per measurement, one column per processor; names that contain one of `groups` in that order."""
    measured = {name: latest(part, benchmark) for name, part in by_processor(rows, benchmark).items()}
    names = list(dict.fromkeys(name for each in measured.values() for name in each))
    names.sort(key=lambda name: [group not in name for group in groups])
    lines = []
    for name in names:
        found = [each.get(name) for each in measured.values()]
        newest = [row for row in found if row][-1]
        lines.append([name, *(cell(row) if row else "–" for row in found), setting_alone(newest["note"])])
    captions = ". ".join(f"{name}: {source(each)}" for name, each in measured.items())
    return markdown(["what", *measured, "setting"], lines, f"{captions}. {reproduce(command)}")


def choices(rows: Rows) -> str:
    """What was chosen for each block and processor, and where it was not the fastest, how much longer it took."""
    named = [row for row in rows if not row["name"].startswith("up to")]  # those chose for linears and attention apart
    measured = {name: latest(part, "cpu choice") for name, part in by_processor(named, "cpu choice").items()}
    names = sorted(
        dict.fromkeys(name for each in measured.values() for name in each), key=lambda name: name.split(",")[0]
    )
    lines = [
        [
            *name.removesuffix(", chosen over best").split(", up to "),
            *(chosen(each.get(name)) for each in measured.values()),
        ]
        for name in names
    ]
    captions = ". ".join(f"{name}: {source(each)}" for name, each in measured.items())
    return markdown(["block", "up to", *measured], lines, f"{captions}. {reproduce('bench_cpu.py --only choice')}")


def chosen(row: Row | None) -> str:
    """A choice, and its time over that of the best with the 95 % interval."""
    if row is None:
        return "–"
    pair, best = extract("chosen (.*?); best", row["note"]), extract("best (.*?); a block", row["note"])
    interval = extract(INTERVAL, row["note"])
    return pair if pair == best else f"{pair}: {number(row)} {best}" + f" ({interval})" * bool(interval)


def by_processor(rows: Rows, benchmark: str) -> dict[str, list[Row]]:
    """The rows of a benchmark by the short name of their processor."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        if row["benchmark"] == benchmark:
            parts.setdefault(short_name(row), []).append(row)
    return parts


def short_name(row: Row) -> str:
    """The processor of a measurement. Early rows give its brand only; log.md has what they were."""
    name = re.sub(r", \d+ cores.*", "", row["machine"])
    if name == "AMD EPYC":
        return "Zen 3" if row["date"] < "2026-11-25" else "Zen 5"
    return extract(r"\(([^()]+), family", name) or name.replace("(R)", "").replace(" Processor", "")


def cell(row: Row) -> str:
    """The value, and in brackets its 95 % interval and the times that its note begins with."""
    found = [part for part in (extract(INTERVAL, row["note"]), extract(TIMES, row["note"])) if part]
    return number(row) + (f" ({'; '.join(found)})" if found else "")


def setting_alone(note: str) -> str:
    """A note without what differs between processors: times, the interval and the instruction set."""
    return re.sub(TIMES, "", re.sub(ISA, "", re.sub(INTERVAL, "", note))).strip("; ")


def number(row: Row) -> str:
    """The value with three significant digits, and the unit."""
    value = float(row["value"])
    return f"{value:.0f} {row['unit']}" if abs(value) >= 1000 else f"{value:.3g} {row['unit']}"


CPU = ("batch 2", "batch 8", "share of peak", "share of a block", "attention", "memory", "first forward pass")
TABLES: dict[str, Callable[[Rows], str]] = {
    "digits": lambda rows: quality(rows, "presets", "method"),
    "ablation": lambda rows: quality(rows, "ablation", "recipe"),
    "ranks": lambda rows: quality(rows, "ranks", "recipe"),
    "budget": lambda rows: quality(rows, "budget", "weights"),
    "families": families,
    "two models": two_models,
    "recovery": recovery,
    "families by time": families_by_time,
    "conditioning": conditioning,
    "pipelines": pipelines,
    "caching": caching,
    "synthetic": synthetic,
    "cost": lambda rows: listing(rows, "cost", "bench_cost.py"),
    # Differences paired by seed are not in results.csv: digits_evaluation.py writes this table and updates the page.
    "evaluation": lambda rows: (ROOT / "benchmarks" / "digits_evaluation.md").read_text().strip(),
    "evaluation speed": lambda rows: listing(rows, "evaluation", "evaluation.py"),
    "cpu": lambda rows: listing(rows, "cpu", "bench_cpu.py", CPU),
    "cpu families": lambda rows: listing(rows, "cpu families", "bench_cpu.py --only families"),
    "cpu choice": choices,
    "anchors": lambda rows: listing(rows, "anchors", "bench_anchors.py"),
    "guidance interval": lambda rows: listing(rows, "guidance interval", "bench_sampling.py --digits"),
    "backends": lambda rows: listing(rows, "digits backends", "bench_end_to_end.py backends"),
    "sampling": lambda rows: listing(rows, "sampling", "bench_sampling.py"),
    "startup": startup,
    "decoding": lambda rows: listing(rows, "decoding", "bench_decoding.py"),
}


def filled(text: str, rows: Rows, update: bool = False) -> str:
    """`text` with every table generated from its pinned number of rows, or with `update` from all rows."""

    def table(match: re.Match[str]) -> str:
        name, pin = match[1], int(match[2])
        content = TABLES[name](rows[:pin])
        if update and TABLES[name](rows) != content:
            pin, content = len(rows), TABLES[name](rows)
        return f"<!-- table: {name}, {pin} rows -->\n{content}\n<!-- end: {name} -->"

    return MARKED.sub(table, text)


def update_pages() -> None:
    """Bring the tables of all pages up to date."""
    for page in PAGES:
        page.write_text(filled(page.read_text(), read(), update=True))


if __name__ == "__main__":
    update_pages()
