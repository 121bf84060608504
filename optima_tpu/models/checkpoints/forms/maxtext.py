"""MaxText's Orbax layout with its settings, not for ``transformers``."""

from pathlib import Path
from typing import Any

import numpy as np

from optima_tpu.models.checkpoints.exported import Exported
from optima_tpu.models.checkpoints.forms.base import Form, Zeros
from optima_tpu.models.checkpoints.maxtext import STEP, layout_of
from optima_tpu.models.checkpoints.orbax import save_items
from optima_tpu.report.contents import ExportForm
from optima_tpu.runtime import signals
from optima_tpu.runtime.processes import alone


class MaxText(Form):
    """MaxText's Orbax layout and settings; the whole model is in memory."""

    name = "maxtext"
    text = "MaxText's Orbax layout with its settings in maxtext.yml"
    card = (
        "`0/items` holds the parameters in MaxText's layout, and maxtext.yml the settings that belong to it: `maxtext.yml "
        "load_parameters_path=FOLDER/0/items tokenizer_path=FOLDER`, with absolute paths, are arguments of MaxText's trainer. "
        "That trainer moves the zeros too, unless `optima_tpu.keep_zeros` wraps its optimizer."
    )
    library = "maxtext"
    next = (
        "MaxText's trainer takes it as FOLDER/maxtext.yml load_parameters_path=FOLDER/0/items tokenizer_path=FOLDER; "
        "docs/guides/jax-programs.md has one that keeps the zeros"
    )

    def __init__(self, run: Exported, written_as: ExportForm):
        super().__init__(run, written_as)
        self._layout = layout_of(run.config(), run.source, written_as.scan_layers)

    def write_weights(self, folder: Path) -> Zeros:
        zeros, tree = Zeros(), dict[str, Any]()
        for leaf in self._layout.leaves:
            if alone():
                signals.check()
            tensors, masks = self.run.weights(leaf.names)
            for name, keep in masks.items():
                zeros[name] = self.run.zeros(name, tensors[name] == 0, keep)
                if np.count_nonzero(leaf.convert(tensors[name])) != tensors[name].size - zeros[name]:
                    raise RuntimeError(f"{name}: its zeros are others in MaxText's layout")
            *above, last = leaf.path
            node = tree
            for part in above:
                node = node.setdefault(part, {})
            node[last] = leaf.array(tensors)
        state = {"step": np.zeros((), np.int32), "params": {"params": tree}, "opt_state": {}}
        save_items(folder / STEP, state, {"scan_layers": self._layout.settings["scan_layers"]})
        for name, text in self._layout.files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        return zeros
