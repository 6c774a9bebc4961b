"""The figures of structure in docs/log.md: `python benchmarks/structure.py [FOLDER]` prints them.

With -v also the names behind them. Public is what does not start with an underscore, at the top of a module or in a
public class.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHAPE = re.compile(r"\([^()]*[,…)]")  # (N, T, D), (N,), (…, K)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module) -> Iterator[ast.ClassDef | Function]:
    """Public functions, classes and their methods; of an overloaded one the definition."""
    for node in tree.body:
        overload = "overload" in [getattr(decorator, "id", "") for decorator in getattr(node, "decorator_list", [])]
        if isinstance(node, (ast.ClassDef, Function)) and not node.name.startswith("_") and not overload:
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (f for f in node.body if isinstance(f, Function) and not f.name.startswith("_"))


def without_docstring(tree: ast.Module) -> list[str]:
    """Public names that say nothing of themselves; a module's `forward` is said by its class."""
    return [node.name for node in public(tree) if not ast.get_docstring(node) and node.name != "forward"]


def without_shapes(tree: ast.Module) -> list[str]:
    """Public functions of tensors whose docstring shows no shape."""
    functions = [node for node in public(tree) if isinstance(node, Function)]
    return [
        f.name for f in functions if mentions_tensor(f) and (text := ast.get_docstring(f)) and not SHAPE.search(text)
    ]


def mentions_tensor(function: Function) -> bool:
    """Whether a parameter or the result is a Tensor."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [a.annotation for a in arguments] + [function.returns]
    return any(re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations if a)


def silent_raises(tree: ast.Module) -> list[str]:
    """Public functions that raise UserError, nested ones included, and whose docstring does not say so."""
    functions = [node for node in public(tree) if isinstance(node, Function)]
    return [f.name for f in functions if raises_user_error(f) and "UserError" not in (ast.get_docstring(f) or "")]


def raises_user_error(function: Function) -> bool:
    """Whether a `raise UserError(...)` is inside, or one of the `unknown` that makes it."""
    raised = (ast.unparse(node) for node in ast.walk(function) if isinstance(node, ast.Raise))
    return any(re.search(r"\b(UserError|unknown)\(", text) for text in raised)


def lengths(tree: ast.Module) -> list[int]:
    """Lines of every function."""
    return [node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, Function)]


def comments(text: str) -> int:
    """Lines that hold a comment."""
    return sum(line.lstrip().startswith("#") or "  # " in line for line in text.splitlines())


def main(folder: Path) -> None:
    """Print every figure."""
    texts = {path: path.read_text() for path in sorted(folder.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lines = sum(text.count("\n") for text in texts.values())
    spans = [n for tree in trees.values() for n in lengths(tree)]
    print(f"files {len(texts)}, lines {lines}, longest {max(text.count(chr(10)) for text in texts.values())}")
    share = sum(map(comments, texts.values())) / lines
    print(f"functions {len(spans)}, mean {sum(spans) / len(spans):.1f} lines, comments {share:.1%}")
    for check in (without_docstring, without_shapes, silent_raises):
        found = {path.relative_to(folder): names for path, tree in trees.items() if (names := check(tree))}
        print(f"{check.__name__}: {sum(map(len, found.values()))}")
        if "-v" in sys.argv:
            print(*(f"  {path}: {', '.join(names)}" for path, names in found.items()), sep="\n")


if __name__ == "__main__":
    main(Path(next((a for a in sys.argv[1:] if a != "-v"), ROOT / "svdit")))
