"""Imported masks; ``MaskSource.how`` names the format that was recognised."""

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from optima_tpu.config.model_spec import is_hub_id
from optima_tpu.errors import UserError
from optima_tpu.method.problem import Given, ReadGiven
from optima_tpu.method.selectors import Imported
from optima_tpu.models.checkpoints import TensorSource, hub, open_model, refuse_damaged_model
from optima_tpu.models.checkpoints.export import MASKS
from optima_tpu.models.checkpoints.orbax import CheckpointTensors, refuse_damaged_checkpoint
from optima_tpu.models.masks.check import check_masks, check_weights
from optima_tpu.models.masks.npz import MASKLLM, open_npz
from optima_tpu.models.masks.safetensors_file import open_safetensors
from optima_tpu.models.masks.source import UNDERSTOOD, MaskSource
from optima_tpu.models.masks.torch_files import open_torch_file, open_torch_folder
from optima_tpu.report.run_record import RUN
from optima_tpu.runtime.checksums import refuse_changed
from optima_tpu.runtime.inside import own, refuse_special

__all__ = ["MaskSource", "check_masks", "check_weights", "open_given", "open_masks"]

_FILES = {".npz": open_npz, ".safetensors": open_safetensors, ".pt": open_torch_file, ".pth": open_torch_file}


def open_masks(spec: str | None) -> MaskSource:
    """Opens masks; each is read later, on demand.

    Args:
      spec: a file or folder in one of the formats of ``UNDERSTOOD``, a hub id ``org/name`` (or
        ``org/name@revision``), or anything else that :func:`optima_tpu.models.checkpoints.open_model` opens. If a folder or hub
        model holds a mask file, the mask file is taken, not the zeros.

    Raises:
      UserError: the file or model does not exist, or has none of these formats; the message lists them.
    """
    spec = _named(spec)
    path = Path(spec).expanduser()
    refuse_special(path)
    if path.is_dir():
        return _open_folder(path, spec)
    if path.is_file() and path.suffix in _FILES:
        return _FILES[path.suffix](path, spec)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"expected masks in {spec}, got a file of an unknown format; known are {UNDERSTOOD}")
    if not path.exists() and not spec.startswith("wheel:"):
        if path.suffix in _FILES or not is_hub_id(spec):
            raise UserError(f"expected masks to import, but {spec} does not exist: check the path; known are {UNDERSTOOD}")
        if published := _published(spec):
            return open_npz(published, spec)
    return _zeros(spec, spec)


def _named(spec: str | None) -> str:
    if not spec:
        raise UserError(f"expected masks to import, got none; give --selector.path: {UNDERSTOOD}")
    return spec


def open_given(imported: Imported) -> ReadGiven:
    """Opens imported masks, and weights if wanted; reads each on demand.

    Raises:
      UserError: as :func:`open_masks`, or weights are wanted and the masks come without weights.
    """
    spec = _named(imported.path)
    masks = open_masks(spec)
    if not imported.weights:
        return lambda name, shape: Given(masks.read(name, shape))
    tensors = _open_weights(spec)

    def read(name: str, shape: tuple[int, int]) -> Given:
        if name not in tensors.names():
            raise UserError(
                f"{name}: expected its weights in {imported.path}, which has no such tensor; take "
                "--selector.weights false for its masks alone"
            )
        if tuple(tensors.shape(name)) != tuple(shape):
            raise UserError(
                f"{name}: expected weights {tuple(shape)}, got {tuple(tensors.shape(name))} in {imported.path}; "
                "give a pruned model of the same size"
            )
        return Given(masks.read(name, shape), tensors.read(name))

    return read


def _open_weights(spec: str) -> TensorSource:
    path = Path(spec).expanduser()
    if (path / RUN).is_file():
        refuse_damaged_checkpoint(path.absolute())
        return CheckpointTensors(path)
    if (path.is_file() and path.suffix != ".gguf") or (path.is_dir() and not (path / "config.json").is_file()):
        raise UserError(
            f"expected a run directory or a checkpoint where selector.weights is true, got {spec}, which has masks "
            "alone; take --selector.weights false"
        )
    refuse_damaged_model(spec)
    return open_model(spec).tensors


def _open_folder(folder: Path, spec: str) -> MaskSource:
    files = [path for name in (MASKS, MASKLLM) if (path := own(folder, folder / name)).is_file()]
    if len(files) > 1:
        raise UserError(f"{spec} holds {MASKS} and {MASKLLM}: give the path of one of them")
    if files:
        refuse_changed(folder, [files[0].name], "export the run again")
        return open_npz(files[0], spec)
    if (folder / RUN).is_file():
        refuse_damaged_checkpoint(folder.absolute())
        tensors = CheckpointTensors(folder)
        return MaskSource(
            spec, "masks of a run directory", {name: name for name in tensors.pruned()}, lambda name, shape: tensors.mask(name)
        )
    if (folder / "config.json").is_file():
        return _zeros(str(folder), spec)
    if any(folder.glob("*.pt")):
        return open_torch_folder(folder, spec)
    raise UserError(f"expected masks in {spec}, got a folder of an unknown format; known are {UNDERSTOOD}")


def _zeros(model: str, origin: str) -> MaskSource:
    """Masks that keep every nonzero entry of a checkpoint's matrices."""
    refuse_damaged_model(model)
    tensors = open_model(model).tensors
    return MaskSource(
        origin,
        "zeros of a checkpoint",
        {name: name for name in tensors.names() if len(tensors.shape(name)) == 2},
        lambda name, shape: tensors.read(name) != 0,
        from_zeros=True,
    )


def _published(spec: str) -> Path | None:
    """A hub model's mask file, downloaded if needed; None if it has none."""
    name, _, revision = spec.partition("@")
    for file in (MASKS, MASKLLM):
        with hub.asking(spec, (file,)):
            try:
                path = Path(hf_hub_download(name, file, revision=revision or None))
            except EntryNotFoundError:
                continue  # without a connection this means that the cache lacks it
            except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
                return None  # the cache may hold the model; else open_model makes the same request, and its error says what to do
        hub.refuse_damaged([path])
        return path
    return None
