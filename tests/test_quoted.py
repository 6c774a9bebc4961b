"""Every command, option, path, link and name of Python that a page quotes exists."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pixels import ROOT
from quoted import PAGES, Command, anchors, blocks, commands, inline, links, prose, shell_lines
from torch.distributed.run import get_args_parser

import svdit
from svdit.cli import COMMANDS, VARIANTS, parser

SHELL = ("", "bash", "sh", "console")
ANY = {option for name in COMMANDS for option in parser(name)._option_string_actions}
ANY |= {option for name, (flag, _) in VARIANTS.items() for option in parser(name, [flag])._option_string_actions}
TORCHRUN = {option.replace("_", "-") for option in get_args_parser()._option_string_actions}
OF_OTHERS = {  # options of sbatch, pip and git that pages explain
    *("--requeue", "--signal", "--no-kill", "--array", "--gpus-per-node", "--version", "--help"),
    *("--constraint", "--editable", "--wheel-dir", "--no-index", "--find-links", "--local-dir", "--shm-size"),
}
HISTORY = {"log.md", "CHANGELOG.md"}  # where names may be of the past
SUFFIXES = ("py", "c", "h", "sh", "css", "js", "md", "csv", "toml", "yml")
FILES = {path.name for path in ROOT.rglob("*") if not {".git", ".venv", "build"} & set(path.parts)}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "svdit").rglob("*.py"))
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_value(option: str) -> str:
    return option.partition("=")[0]


def unknown_options(command: Command) -> list[str]:
    """The options that the command, or torchrun before it, does not have."""
    options = [without_value(word) for word in command.words if re.match(r"--?[a-zA-Z]", word)]
    if command.name in COMMANDS:
        known = parser(command.name, command.words)._option_string_actions
        wrong = [option for option in options if option not in known]
    elif command.name == "make":
        wrong = [word for word in command.words if "=" not in word and word not in TARGETS]
    else:
        path = ROOT / command.name
        wrong = [o for o in options if o not in path.read_text()] if path.is_file() else [command.name]
    given = [without_value(word).replace("_", "-") for word in command.torchrun if word.startswith("--")]
    return wrong + [option for option in given if option not in TORCHRUN]


def is_whole(command: Command) -> bool:
    """Whether the words could be typed as they stand: no placeholders, which are capitals or have an ellipsis."""
    return not any("…" in word or "..." in word or "[" in word for word in command.words)


@of_pages
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    missing = []
    for link in links(read(page)):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(read(target))):
            missing.append(link)
    assert missing == []


@of_pages
def test_pages_are_linked_not_named(page: Path) -> None:
    text = re.sub(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)", "", prose(read(page)))
    named = re.findall(r"[\w./-]*\w\.md\b", text)
    assert [name for name in named if (page.parent / name).is_file() or (ROOT / name).is_file()] == []


@of_pages
def test_commands_in_blocks_can_be_typed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for block in blocks(read(page), *SHELL):
        for line in shell_lines(block):
            for command in commands(line):
                wrong += [f"{line}: {option}" for option in unknown_options(command)]
                if command.name in COMMANDS and is_whole(command):
                    try:
                        parser(command.name, command.words).parse_args(command.words)
                    except SystemExit:
                        wrong.append(f"{line}: {capsys.readouterr().err}")
                elif "/" not in command.name and command.name not in {*COMMANDS, "make", "--version"}:
                    wrong.append(f"{line}: there is no svdit {command.name}")
    assert wrong == []


@of_pages
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    anyone = ANY | TORCHRUN | OF_OTHERS
    wrong = []
    for code in inline(read(page)):
        found = list(commands(code))
        for command in found:
            if re.match(r"[a-z-]+$", command.name) and command.name not in {*COMMANDS, "make"}:
                wrong.append(f"there is no svdit {command.name}")
            wrong += [f"{code}: {option}" for option in unknown_options(command) if command.name in COMMANDS]
            wrong += [f"{code}: {option}" for option in unknown_options(command) if "/" in command.name]
        if not found and code.startswith("--"):
            options = [without_value(word) for word in code.split() if word.startswith("--") and "…" not in word]
            wrong += [f"{code}: {option}" for option in options if option not in anyone and page.name not in HISTORY]
    assert wrong == []


@of_pages
def test_paths_exist(page: Path) -> None:
    missing = []
    for code in inline(read(page)):
        if page.name in HISTORY or not re.fullmatch(rf"[\w./-]+\.({'|'.join(SUFFIXES)})", code):
            continue
        if "/" in code:
            places = [ROOT, ROOT / "svdit", page.parent]
            if not any((place / code).exists() for place in places) and code.split("/")[0] in TOP:
                missing.append(code)
        elif code.endswith((".py", ".c", ".h")) and code not in FILES:
            missing.append(code)
    assert missing == []


TOP = {path.name for folder in (ROOT, ROOT / "svdit") for path in folder.iterdir() if path.is_dir()}


@of_pages
def test_environment_variables_are_read(page: Path) -> None:
    quoted = set(re.findall(r"\bSVDIT_[A-Z0-9_]+", read(page)))
    tests = "\n".join(read(path) for path in (ROOT / "tests").rglob("*.py"))
    assert {name for name in quoted if name not in SOURCE and name not in tests} == set()


@of_pages
def test_python_is_what_the_package_has(page: Path) -> None:
    for block in blocks(read(page), "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), block
            elif isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name) for alias in node.names), block
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("svdit."):
                inspect.signature(resolve(ast.unparse(node.func))).bind(
                    *node.args, **{keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
                )
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("svdit."):
                resolve(ast.unparse(node))
    for code in inline(read(page)):
        for name in re.findall(r"(?<![\w/.@-])svdit(?:\.[A-Za-z_]\w*)+(?![\w/]|\.\w)", code):
            if page.name not in HISTORY and not name.endswith((".svg", ".so", ".py")):
                resolve(name)


def resolve(name: str) -> Any:
    """What a dotted name stands for, importing modules on the way."""
    value: Any = svdit
    path = "svdit"
    for part in name.split(".")[1:]:
        path += f".{part}"
        value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
    return value


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.sh")), ids=lambda path: path.name)
def test_commands_of_the_shell_examples_exist(script: Path) -> None:
    found = [command for line in shell_lines(read(script)) for command in commands(line)]
    assert len(found) >= 3
    assert [option for command in found for option in unknown_options(command)] == []


def test_mistakes_in_pages_are_seen() -> None:
    line = "python sample.py --sed 1 && svdit smaple; torchrun --nnode 2 sample_ddp.py --chkpt x | svdit compare --srt"
    found = list(commands(line))
    assert [command.name for command in found] == ["sample", "smaple", "generate", "compare"]
    assert [unknown_options(command) for command in found if command.name in COMMANDS] == [
        ["--sed"], ["--chkpt", "--nnode"], ["--srt"]
    ]  # fmt: skip
    assert unknown_options(next(commands("make tset"))) == ["tset"]
    assert unknown_options(next(commands("python benchmarks/kils.py 9"))) == ["benchmarks/kils.py"]
    assert anchors("# A `b` c?\n## [x](y), z/2\n") == {"a-b-c", "x-z2"}
    with pytest.raises(ModuleNotFoundError, match="quantise"):
        resolve("svdit.quantise_")
