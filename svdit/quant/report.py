"""The results of quantization as data: one entry per layer, and totals."""

from dataclasses import asdict, dataclass, field
from typing import Any

FEW = 4  # rows per input feature below which the second moment is poorly known


@dataclass(frozen=True)
class LayerReport:
    """The settings of a quantized layer, its size and its error."""

    name: str
    weight: str
    act: str
    rank: int
    numbers_before: int  # elements of the weight
    numbers_after: int  # of the residual and the factors
    residual: bool
    bytes_before: int
    bytes_after: int
    sqnr: float | None  # dB, of the layer's output on held-out inputs; None where undefined: no such rows, or zeros
    weight_error: float  # ‖W − W'‖ / ‖W‖, or 0 for a weight of zeros
    alpha: float
    beta: float
    note: str = ""
    inputs: int = 0  # features
    rows: int = 0  # of inputs that the layer was fitted to; 0 without calibration
    held_out: int = 0  # of other inputs, that `sqnr` is measured on


@dataclass
class QuantReport:
    """`bytes_*` count the whole model, with the layers that are not quantized."""

    layers: list[LayerReport] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    skipped: dict[str, str] = field(default_factory=dict)  # layer: why it is not quantized although a rule asked for it

    def add_seconds(self, **seconds: float) -> None:
        """Add to the time of each phase."""
        for phase, time in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time

    @property
    def warnings(self) -> list[str]:
        """What a user should know before using the result, as sentences."""
        sentences = [f"{name} was not quantized: {reason}" for name, reason in self.skipped.items()]
        sentences += [f"{line.name}: {line.note}" for line in self.layers if line.note]
        if few := [line for line in self.layers if 0 < line.rows < FEW * line.inputs]:
            worst = min(few, key=lambda line: line.rows / line.inputs)
            sentences.append(
                f"{len(few)} of {len(self.layers)} layers were calibrated with fewer than {FEW} rows per input feature "
                f"(the fewest: {worst.name}, {worst.rows} rows for {worst.inputs} features); covariances are shrunk "
                "towards zero, but more inputs give a better model"
            )
        grown = [line for line in self.layers if not line.residual and line.numbers_after > line.numbers_before]
        if grown:
            ratio = sum(line.numbers_after for line in grown) / sum(line.numbers_before for line in grown)
            sentences.append(
                f"in {len(grown)} of {len(self.layers)} layers the two factors have more elements than the weight they "
                f"replace ({ratio:.2f}×); a dense weight with the same number of bits is smaller and more accurate"
            )
        for weight in sorted({line.weight for line in self.layers if line.weight.startswith("FP")}):
            where = " except on GPUs of capability 9.0" if weight.startswith("FP8") else ""
            sentences.append(f"{weight} is emulated everywhere{where}: it saves memory, but the products are in floats")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return asdict(self)
