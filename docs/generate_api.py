"""Writes docs/api.md from the docstrings behind `import svdit`: python docs/generate_api.py

It reads the source, without torch. A test compares the page with what this writes.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import svdit  # noqa: E402
from svdit.cli.arguments import keys  # noqa: E402

INTRODUCTION = """\
# Python API

<!-- Written by docs/generate_api.py from the docstrings: edit those. -->

```python
import svdit

model = svdit.load("digits")
original = svdit.sample(model, [0, 1, 2], steps=50)
svdit.quantize_(model, "w8a8")
images = svdit.sample(model, [0, 1, 2], steps=50)
print(svdit.psnr(images, original))
svdit.save(model, "digits-w8a8.safetensors")
```

Names are imported on first use: `import svdit` itself imports no torch. A mistake raises `UserError` with one sentence;
of a misspelt name it lists the choices. The scripts in [examples](../examples) show the functions at work, and
[unsupported.md](unsupported.md) lists what is not supported.
"""
SECTIONS = {
    "Functions": (
        *("load", "quantize_", "recipe_for", "sample", "save_image", "psnr", "save", "accelerate"),
        *("generate_dataset", "evaluate", "compare"),
    ),
    "Settings": (
        "Recipe",
        "Format",
        "Rule",
        "QuantConfig",
        "held_out",
        "SamplingConfig",
        "load_autoencoder",
        "Options",
    ),
    "Results": ("QuantReport", "LayerReport", "Report"),
    "Models and errors": ("DiT", "DiT_models", "UserError"),
    "What load, save and sample call": ("load_model", "load_quantized", "save_model", "save_quantized", "generate"),
}
RESULTS = {"QuantReport": "quant.report", "LayerReport": "quant.report", "Report": "evaluation.report"}
TABLES = {
    "DiT_models": 'Freshly initialized models by name: `svdit.DiT_models["DiT-XL/2"]()`. Keyword arguments override '
    "fields\nof the configuration, `input_size` and `num_classes` for example.",
}
ALIASES = {  # types in the signatures
    "Method": "api",
    "ForwardLoop": "quant.observe",
    "Labels": "sampling.labels",
    "Callback": "diffusion.samplers",
    "Noise": "diffusion.samplers",
}
NAMES = {  # the keys of dict literals
    "presets": ("quant/config.py", "RECIPES"),
    "samplers of a DiT": ("diffusion/samplers.py", "SAMPLERS"),
    "samplers of flows": ("diffusion/flow_samplers.py", "FLOW_SAMPLERS"),
    "metrics": ("evaluation/metrics.py", "METRICS"),
    "backends": ("kernels/ops.py", "BACKENDS"),
}
WIDTH = 100
Definition = ast.FunctionDef | ast.ClassDef


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for title, names in SECTIONS.items():
        parts += [f"## {title}\n", *map(entry, names)]
    return "\n".join([*parts, "## Names and types\n", *tables()])


def read(name: str) -> tuple[str, list[ast.stmt]]:
    """The source of the module that has a name, and its statements."""
    module = {**svdit._MODULES, **RESULTS, **ALIASES}[name]
    source = (ROOT / "svdit" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    return source, ast.parse(source).body


def entry(name: str) -> str:
    """The heading, the signature or fields, and the docstring of one name."""
    if name in TABLES:
        return f"### `{name}`\n\n{TABLES[name]}\n"
    source, statements = read(name)
    node = [node for node in statements if isinstance(node, Definition) and node.name == name][-1]  # behind overloads
    code = signature(node, source) if isinstance(node, ast.FunctionDef) else fields(node, source)
    shown = f"```python\n{code}\n```\n\n" if code else ""
    text = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", ast.get_docstring(node) or "")
    return f"### `{name}`\n\n{shown}{text}\n"


def signature(function: ast.FunctionDef, source: str) -> str:
    """`def name(arguments) -> result: ...`, one argument a line where it is long."""
    result = f" -> {ast.get_source_segment(source, function.returns)}" if function.returns else ""
    given = list(arguments(function.args, source))
    line = f"def {function.name}({', '.join(given)}){result}: ..."
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"def {function.name}(", *(f"    {argument}," for argument in given), f"){result}: ..."])


def arguments(given: ast.arguments, source: str) -> Iterator[str]:
    """Each argument with its type and default, and the signs between them."""

    def argument(name: ast.arg, default: ast.expr | None = None) -> str:
        parts = [f": {ast.get_source_segment(source, name.annotation)}"] if name.annotation else []
        return "".join([name.arg, *parts, *([f" = {ast.get_source_segment(source, default)}"] if default else [])])

    positional = [*given.posonlyargs, *given.args]
    required = len(positional) - len(given.defaults)
    for i, name in enumerate(positional):
        yield argument(name, given.defaults[i - required] if i >= required else None)
        if i + 1 == len(given.posonlyargs):
            yield "/"
    if given.kwonlyargs:
        yield "*"
    for name, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield argument(name, default)
    if given.kwarg:
        yield f"**{argument(given.kwarg)}"


def fields(definition: ast.ClassDef, source: str) -> str:
    """The fields of a dataclass with their comments, as they stand in the source; empty for other classes."""
    found = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    if not (found and definition.decorator_list):
        return ""
    return "\n".join([f"class {definition.name}:", *source.splitlines()[found[0].lineno - 1 : found[-1].end_lineno]])


def tables() -> Iterator[str]:
    """The names that strings can be, and what the types in the signatures are."""
    yield "| strings | |\n|---|---|"
    yield from (f"| {what} | {', '.join(f'`{key}`' for key in keys(*where))} |" for what, where in NAMES.items())
    yield "\n```python"
    for name in ALIASES:
        source, statements = read(name)
        found = [n for n in statements if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == name]
        yield ast.get_source_segment(source, found[0]) or ""
    yield "```\n"


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
