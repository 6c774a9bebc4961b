"""HTML and SVG as nested calls; every string that is not markup already is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from svdit.printing import printable

VOID = {"meta", "input", "img", "br"}


class Markup(str):
    """Text that is HTML; only `tag` and `raw` make it."""


def raw(text: str) -> Markup:
    """The package's own style sheet and script."""
    return Markup(text)


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element: `class_` is class, `_` becomes `-`; None and False omit an attribute, True is one without a value."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            label = key.removesuffix("_").replace("_", "-")
            parts.append(label if value is True else f'{label}="{html.escape(plain(value))}"')
    start = f"<{' '.join(parts)}>"
    return Markup(start if name in VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """The children one after another; None is nothing."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(plain(c)) for c in children if c is not None))


def plain(value: object) -> str:
    """Text that a page can show: control characters, marks of direction and stray bytes as escapes."""
    return f"{value:.5g}" if isinstance(value, float) else "\n".join(map(printable, str(value).split("\n")))


def table(columns: Sequence[object], rows: Iterable[Sequence[object]], caption: str, visible: bool = True) -> Markup:
    """A table that scrolls sideways on a narrow screen; the first cell of a row is its heading.

    Columns of numbers are aligned on the right. `visible`: whether the caption is shown, or only read out.
    """
    rows = list(rows)
    sides = [None if i == 0 or any(map(is_text, cells)) else "n" for i, cells in enumerate(zip(*rows, strict=True))]
    head = tag("tr", *(tag("th", title, scope="col", class_=side) for title, side in zip(columns, sides, strict=True)))
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", c, class_=s) for c, s in zip(row[1:], sides[1:], strict=True)),
        )
        for row in rows
    ]
    grid = tag("table", tag("caption", caption, class_="unseen"), tag("thead", head), tag("tbody", *body))
    return join([tag("p", caption, class_="note") if visible else None, scrolling(grid, caption)])


def scrolling(grid: Markup, label: str, more: str = "") -> Markup:
    """A table in a box that scrolls, also with the keyboard."""
    return tag("div", grid, class_=f"scroll {more}".strip(), tabindex="0", role="region", aria_label=label)


def is_text(cell: object) -> bool:
    """Whether a cell has no number: it belongs on the left."""
    return not re.match(r"[-+]?\d[\d.]*(e[-+]?\d+)?( |×|$)|–$", str(cell))


def section(name: str, title: str, content: Markup) -> Markup:
    """A part of the page, which the navigation links to."""
    heading = tag("h2", title, id=f"{name}-title")
    return tag("section", heading, content, id=name, aria_labelledby=f"{name}-title")
