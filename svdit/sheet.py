"""A sheet of images in rows and columns with labels, below a title; drawn by Pillow, so it needs no other package."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svdit.images import Pixels
from svdit.printing import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
NARROW, WIDE = 640, 1920  # pixels of the images beside each other: small ones are enlarged, large ones reduced
PAD, GREY = 2, 128
DIFFERENCE = "difference: grey where equal, lighter where brighter than in full precision, darker where less bright"


def difference(image: Pixels, reference: Pixels, gain: int) -> Pixels:
    """gain (image − reference) around grey, uint8 (…, H, W, 3)."""
    signed = gain * (image.astype(np.int32) - reference)
    return np.clip(GREY + signed, 0, 255).astype(np.uint8)


def visible_gain(rms: float) -> int:
    """The power of 2 up to 64 by which differences become visible: RMS times gain is about 64 levels."""
    return int(2 ** np.clip(np.round(np.log2(64 / max(rms, 1e-9))), 0, 6))


def rms(images: Sequence[Pixels], references: Sequence[Pixels]) -> float:
    """The root of the mean squared difference of images (H, W, 3), in levels."""
    pairs = zip(images, references, strict=True)
    return float(np.sqrt(np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in pairs])))


def compared(
    before: Sequence[Pixels], variants: Mapping[str, Sequence[Pixels]], name: str = "full precision", gain: int = 0
) -> list[tuple[str, list[Pixels]]]:
    """The rows of a sheet: images (H, W, 3) in full precision, and variants by their labels with their differences.

    `gain` of the differences; 0: that of the variant which differs most.
    """
    gain = gain or visible_gain(max(rms(after, before) for after in variants.values()))
    rows = [(name, list(before))]
    for label, after in variants.items():
        differences = [difference(b, a, gain) for a, b in zip(before, after, strict=True)]
        rows += [(label, list(after)), (f"difference\n× {gain}", differences)]
    return rows


def sheet(
    title: str,
    about: str,
    rows: Sequence[tuple[str, Sequence[Pixels]]],
    columns: tuple[str, Sequence[str]] = ("", ()),
    notes: Iterable[str] = (),
) -> Pixels:
    """Rows of equally large images (H, W, 3) with a label each, uint8 (H, W, 3).

    `columns`: a label and what stands above each column. `notes` stand below.
    """
    count, (height, width) = max(len(images) for _, images in rows), rows[0][1][0].shape[:2]
    factor = max(1, NARROW // (count * (width + PAD))) if count * width <= WIDE else WIDE / (count * width)
    size = round(width * factor), round(height * factor)
    points = max(16, count * size[0] // 32)
    label, small, bold = font(points), font(points * 4 // 5), font(points, bold=True)
    rows = [("\n".join(fitted(text, label, NARROW // 3)), images) for text, images in rows]
    labels = [line for text in (columns[0], *(text for text, _ in rows)) for line in text.split("\n")]
    canvas = Canvas(points // 2, max(label.getlength(line) for line in labels), count, size)
    canvas.text(title, bold)
    canvas.text(about, small)
    if columns[0] or columns[1]:
        canvas.captions(*columns, small)
    for text, images in rows:
        canvas.row(text, label, images)
    for note in notes:
        canvas.text(note, small)
    return canvas.pixels()


class Canvas:
    """White paper with a margin, a column for labels and one for each image of (width, height); filled downwards."""

    def __init__(self, edge: int, labels: float, count: int, size: tuple[int, int]) -> None:
        self.edge, self.size, self.top = edge, size, edge
        self.left = edge + (int(labels) + edge if labels else 0)
        self.width = self.left + count * (size[0] + PAD) + edge
        self.items: list[tuple[int, int, Image.Image | str, Font | None]] = []

    def text(self, text: str, font: Font) -> None:
        """Lines over the whole width."""
        for line in fitted(text, font, self.width - 2 * self.edge):
            self.items.append((self.edge, self.top, line, font))
            self.top += line_height(font)
        self.top += self.edge // 3

    def captions(self, label: str, texts: Sequence[str], font: Font) -> None:
        """A text above each column, at most as wide, and one above the labels."""
        label_lines, cells = label.split("\n"), [fitted(text, font, self.size[0]) for text in texts]
        bottom = self.top + max(map(len, [label_lines, *cells])) * line_height(font)
        places = [self.edge, *(self.left + i * (self.size[0] + PAD) for i in range(len(cells)))]
        for x, lines in zip(places, [label_lines, *cells], strict=True):
            for j, line in enumerate(reversed(lines), 1):
                self.items.append((x, bottom - j * line_height(font), line, font))
        self.top = bottom + self.edge // 3

    def row(self, label: str, font: Font, images: Sequence[Pixels]) -> None:
        """Images beside each other, after the label."""
        lines, height = label.split("\n"), max(self.size[1], (label.count("\n") + 1) * line_height(font))
        for i, pixels in enumerate(images):
            how = Image.Resampling.NEAREST if self.size[0] >= pixels.shape[1] else Image.Resampling.LANCZOS
            image = Image.fromarray(pixels).resize(self.size, how)
            self.items.append((self.left + i * (self.size[0] + PAD), self.top, image, None))
        middle = self.top + (self.size[1] - len(lines) * line_height(font)) // 2
        for j, line in enumerate(lines):
            self.items.append((self.edge, max(self.top, middle) + j * line_height(font), line, font))
        self.top += height + PAD

    def pixels(self) -> Pixels:
        """Everything on it, uint8 (H, W, 3)."""
        paper = Image.new("RGB", (self.width, self.top + self.edge), "white")
        draw = ImageDraw.Draw(paper)
        for x, y, content, font in self.items:
            if isinstance(content, str):
                draw.text((x, y), content, fill="black", font=font)
            else:
                paper.paste(content, (x, y))
        return np.asarray(paper)


def font(points: int, bold: bool = False) -> Font:
    """DejaVu where matplotlib is installed, which contains it; else Pillow's own, which has ASCII only."""
    found = find_spec("matplotlib")
    if found and found.origin:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        return ImageFont.truetype(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / name, points)
    return ImageFont.load_default(points)


def line_height(font: Font) -> int:
    """Pixels from one line of text to the next."""
    return round(1.25 * font.getbbox("Ég")[3])


def fitted(text: str, font: Font, width: int, most: int = 3) -> list[str]:
    """The text in at most `most` lines of this width in pixels; "…" where it is cut."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in drawable(paragraph, font).split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
    kept = lines[:most]
    if len(lines) > most:
        kept[-1] += " …"
    return [shortened(line, font, width) for line in kept]


def drawable(text: str, font: Font) -> str:
    """The text on one line, in characters that the font has."""
    text = printable(text)
    if "DejaVu" in str(font.getname()[0] if isinstance(font, ImageFont.FreeTypeFont) else ""):
        return text
    return "".join(c if c.isascii() or c in "±·…°" else {"×": "x", "–": "-"}.get(c, "?") for c in text)


def shortened(line: str, font: Font, width: int) -> str:
    """The line, or as much of its beginning as fits before "…"."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"
