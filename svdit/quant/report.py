"""The results of quantization as data: one entry per layer, and totals."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """The settings of a quantized layer, its size and its error."""

    name: str
    weight: str
    act: str
    rank: int
    numbers_before: int  # in the weight
    numbers_after: int  # in the residual and the factors
    residual: bool
    bytes_before: int
    bytes_after: int
    sqnr: float | None  # dB, of the layer's output on held-out inputs; None where undefined: no inputs, or all zero
    weight_error: float  # ‖W − W'‖ / ‖W‖, or 0 for a weight of zeros
    alpha: float
    beta: float
    note: str = ""


@dataclass
class QuantReport:
    """`bytes_*` count the whole model, layers that were left alone included."""

    layers: list[LayerReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase

    @property
    def warnings(self) -> list[str]:
        """Sentences about what a user would want to know before using the result."""
        sentences = [f"{line.name}: {line.note}" for line in self.layers if line.note]
        grown = [line for line in self.layers if not line.residual and line.numbers_after > line.numbers_before]
        if grown:
            ratio = sum(line.numbers_after for line in grown) / sum(line.numbers_before for line in grown)
            sentences.append(
                f"in {len(grown)} of {len(self.layers)} layers the two factors hold more numbers than the weight they "
                f"replace ({ratio:.2f} times as many); a dense weight of as many bits would be smaller and more exact"
            )
        for weight in sorted({line.weight for line in self.layers if line.weight.startswith("FP")}):
            where = " but on GPUs of capability 9.0" if weight.startswith("FP8") else ""
            sentences.append(f"{weight} is emulated everywhere{where}: the file is small, products are made in floats")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
