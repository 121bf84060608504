"""The recorded settings of a run that are read on their own.

``config.parse.recorded_run`` checks all settings.
"""

from typing import Any

from optima_tpu.runtime.records import Count, Undeclared


class MethodSettings(Undeclared, frozen=True):
    """A method, by its name or its import path.

    Options of a user's own method may have any type.
    """

    name: str


class SolverSettings(MethodSettings, frozen=True):
    """A solver, and where a row stops."""

    tolerance: Any = None


class QuantizerSettings(MethodSettings, frozen=True):
    """A quantizer; ``group`` inputs share a scale, or with None a row does."""

    group: Count | None


class TrainingSettings(MethodSettings, frozen=True):
    """A training, and what it moves."""

    train: str


class RecipeSettings(Undeclared, frozen=True, kw_only=True):
    """Settings that decide weights, see ``run_config.weights_settings``."""

    dtype: str | None
    pattern: str
    layers: str
    selector: MethodSettings
    solver: SolverSettings | None
    target: MethodSettings
    quantize: QuantizerSettings | None
    allocation: MethodSettings
    distill: TrainingSettings | None

    @property
    def method(self) -> str:
        """ "wanda + cg"."""
        return f"{self.selector.name} + {self.solver.name if self.solver else 'none'}"


class CalibrationSettings(Undeclared, frozen=True):
    """The calibration text, its windows, and those that the model wrote."""

    source: str
    windows: Count
    length: Count | None
    written: Count


class EvaluationSettings(Undeclared, frozen=True):
    """The evaluation text; None for the calibration text's source."""

    source: str | None


class RecoverySettings(Undeclared, frozen=True):
    """The settings of a recovery: the pruned model that it began from."""

    model: str


class RunSettings(RecipeSettings, frozen=True, kw_only=True):
    """Settings of a run, see ``run_config.to_dict``, or of a recovery."""

    model: str
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    recover: RecoverySettings | None = None

    @property
    def model_name(self) -> str:
        """The last part of the model, "name" of "org/name" or "wheel:name"."""
        return self.model.removeprefix("wheel:").rstrip("/").rpartition("/")[2]

    @property
    def evaluation_source(self) -> str:
        """The text that perplexity was measured on."""
        return self.evaluation.source or self.calibration.source


class ManifestEntries(Undeclared, frozen=True):
    """What decides a run's weights, see ``inputs.manifest_of``.

    Attributes:
      model: fingerprint of the model that was pruned.
      start: fingerprint of the pruned model that a recovery started from; None for a run that prunes.
    """

    model: str
    recipe: RecipeSettings
    code: str
    start: str | None = None
