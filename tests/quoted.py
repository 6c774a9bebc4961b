"""What a Markdown page quotes: links, commands, options, paths, names of Python."""

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from pixels import ROOT

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)\)")
SCRIPTS = {  # in the root: the command each is
    "sample.py": "sample",
    "sample_ddp.py": "generate",
    "quantize_ptq.py": "quantize",
    "evaluate_metrics.py": "evaluate",
    "train.py": "train",
}
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "svdit/**/*.md", "benchmarks/*.md", "examples/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)


class Command(NamedTuple):
    """A command of a shell line: what runs ("generate", "benchmarks/kills.py", …), its words, and those of torchrun."""

    name: str
    words: list[str]
    torchrun: list[str]


def prose(text: str) -> str:
    """A page without its code blocks, fenced or indented."""
    return re.sub(r"^(    .*\n)+", "\n", FENCED.sub("", text), flags=re.MULTILINE)


def inline(text: str) -> list[str]:
    """The inline code of a page, on one line each."""
    return [" ".join(code.split()) for code in INLINE.findall(prose(text))]


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in any of these languages, without their indentation."""
    found = [match for match in FENCED.finditer(text) if match[2] in languages]
    return [re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE) for match in found]


def links(text: str) -> list[str]:
    """The targets of a page's links."""
    return LINK.findall(FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.MULTILINE)
    shown = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]  # without targets
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in shown}


def shell_lines(block: str) -> Iterator[str]:
    """The lines of a shell script or session, continued ones joined, without prompts and comments."""
    for line in re.sub(r" *\\\n\s*", " ", block).splitlines():
        yield re.sub(r"^\$ ", "", line.strip())


def commands(line: str) -> Iterator[Command]:
    """The commands of this repository in a line of shell."""
    try:
        words = shlex.split(re.sub(r";(?=\s|$)", " ; ", line), comments=True)
    except ValueError:  # no line of shell
        return
    part: list[str] = []
    for word in [*words, ";"]:
        if word in ("&&", "||", "|", ";", "&", "(", ")"):
            if command := _command(part):
                yield command
            part = []
        else:
            part.append(word)


def _command(words: list[str]) -> Command | None:
    """The command of these words: svdit NAME, python -m svdit NAME, python SCRIPT, torchrun …, sh or make."""
    for i, word in enumerate(words):
        before, rest = words[:i], words[i + 1 :]
        torchrun = before[before.index("torchrun") + 1 :] if "torchrun" in before else []
        if word == "svdit" and rest and (i == 0 or before[-1] == "-m" or re.fullmatch(r"\w+=\S*", before[-1])):
            return Command(rest[0], rest[1:], [w for w in torchrun if w != "-m"])
        alone = not before and bool(rest) and rest[0].startswith("-")
        if word in SCRIPTS and (alone or before[-1:] == ["python"] or torchrun):
            return Command(SCRIPTS[word], rest, torchrun)
        if re.fullmatch(r"(benchmarks|examples|docs)/[\w/]+\.(py|sh)", word) and before[-1:] in (["python"], ["sh"]):
            return Command(word, rest, [])
        if word == "make" and i == 0 and rest:
            return Command("make", rest, [])
    return None
