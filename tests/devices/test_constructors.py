"""No tensor is created on the default device by accident: constructors name a device, or a comment says why not.

    labels = torch.tensor(classes)  # device: of the arguments; `generate` moves them

A generator places nothing: with another default device than its own, torch raises an error or draws nothing.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "svdit"
CONSTRUCTORS = {
    *("arange", "as_tensor", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
REASON = "# device: "
FILES = sorted(PACKAGE.rglob("*.py"))


def unplaced(source: str) -> Iterator[int]:
    """The lines of constructors of tensors that have neither a device nor a reason."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = node.func.value, node.func.attr
        if not (isinstance(owner, ast.Name) and owner.id == "torch" and name in CONSTRUCTORS):
            continue
        explained = any(REASON in line for line in lines[node.lineno - 1 : node.end_lineno])
        if not explained and "device" not in {keyword.arg for keyword in node.keywords}:
            yield node.lineno


def test_the_guard_finds_them() -> None:
    source = """
a = torch.zeros(3)
b = torch.zeros(3, device=x.device)
c = x.new_zeros(3) + torch.zeros_like(x)
d = torch.arange(3)  # device: the CPU, for indices
e = f(torch.ones(
    3
), torch.randn(2))
g = torch.randn(2, generator=stream)
"""
    assert sorted(unplaced(source)) == [2, 6, 8, 9]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_constructor_has_a_device_or_a_reason(path: Path) -> None:
    found = [f"{path.relative_to(PACKAGE.parent)}:{line}" for line in unplaced(path.read_text())]
    assert not found, f"{', '.join(found)}: name a device, or say why with `{REASON}...`"
