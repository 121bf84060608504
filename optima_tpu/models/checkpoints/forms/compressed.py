"""Integers and scales of a quantised run, as compressed-tensors has them."""

import json
from pathlib import Path

from optima_tpu.errors import UserError
from optima_tpu.method.quantization import Quantizer
from optima_tpu.models.checkpoints.compressed_tensors import quantization_config
from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.forms.base import Zeros
from optima_tpu.models.checkpoints.forms.plain import Plain
from optima_tpu.report.contents import ExportForm


class Compressed(Plain):
    """Integers and scales as the library compressed-tensors stores them."""

    name = "compressed-tensors"
    text = "the integers and scales of a run with --quantize, for transformers with the package compressed-tensors, and for vLLM"
    stacks = False
    compact = True
    quantizer: Quantizer

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        self.quantizer = run.quantizer(self.name)

    def write(self, folder: Path) -> Zeros:
        source, path = self.run.source, folder / "config.json"
        quantized = set(source.quantized())
        others = (name for name in source.names() if name.endswith(".weight") and len(source.shape(name)) == 2)
        modules = (name.removesuffix(".weight") for name in others if name not in quantized)
        quantization = quantization_config(self.quantizer, modules, self.activations)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}, indent=2) + "\n")
        return super().write(folder)


class CompressedW8A8(Compressed):
    """8-bit integers by rows, for programs whose activations have 8 bits."""

    name = "compressed-tensors-w8a8"
    text = "the same of a run with int8 by rows, with activations rounded to 8 bits when the model runs"
    activations = True

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        if (self.quantizer.bits, self.quantizer.group) != (8, None):
            raise UserError(
                f"expected a run with --quantize int8 --quantize.group null to export as {self.name}, whose programs take a "
                f"scale for each row, got {run.directory} with {self.quantizer}; take --format {Compressed.name}"
            )
