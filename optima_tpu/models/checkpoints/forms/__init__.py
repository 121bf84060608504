"""The forms of an export, each in a file.

A form writes a model's weights and masks into a folder, reads them again and compares them. What a person reads of a form, in
``--help`` and on the model card, is a text of its class.
"""

from collections.abc import Mapping

from optima_tpu.models.checkpoints.forms.base import Form, Options
from optima_tpu.models.checkpoints.forms.compressed import Compressed, CompressedW8A8
from optima_tpu.models.checkpoints.forms.gguf import GGUF
from optima_tpu.models.checkpoints.forms.maxtext import MaxText
from optima_tpu.models.checkpoints.forms.plain import PackedForm, Plain

_CLASSES: tuple[type[Form], ...] = (Plain, PackedForm, Compressed, CompressedW8A8, GGUF, MaxText)

FORMS: Mapping[str, type[Form]] = {form.name: form for form in _CLASSES}
"""The forms by their names on the command line."""

__all__ = ["FORMS", "Form", "MaxText", "Options", "PackedForm", "Plain"]
