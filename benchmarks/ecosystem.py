"""Checks that pruned models load in MaxText, Tunix and Qwix and stay pruned.

    python -m benchmarks.ecosystem [maxtext] [tunix] [training] [qwix]

The models are tiny, and each program loads them by its own code. Prints for each:

- maxtext, tunix: the largest difference between its logits and ours, relative to the largest logit, in float32; and how many of
  its weights are zero, against the masks
- training: how many zeros are left after some steps of its own trainer, with and without ``optima_tpu.keep_zeros``
- qwix: the zeros of its integers against the masks; with ``--folder`` those of an exported folder, of which it writes a copy with
  the values of the integers, to be evaluated

Its exit status is 1 where a zero is elsewhere, or a difference larger than rounding.

Needs Python 3.12 and an environment of its own, since Tunix asks for an older safetensors; see docs/guides/jax-programs.md.
"""

import argparse
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")  # MaxText then needs none of Google Cloud's packages
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx

import optima_tpu
from optima_tpu.models import llama
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.checkpoints.export import export, read_masks
from optima_tpu.models.checkpoints.forms import Options
from optima_tpu.models.decoder import Decoder
from optima_tpu.runtime.mesh import make_mesh
from tests.support.ecosystem import MODELS, configured
from tests.support.fake_run import pruned_run
from tests.support.oracles import logits_of
from tests.support.tiny_models import random_tensors

LENGTH = 40  # longer than the windows of MODELS
TOKENS = np.random.default_rng(0).integers(1, 64, (1, LENGTH)).astype(np.int32)
MILLION = dict(rope_type="default", rope_theta=1000000.0)
TUNIX: dict[str, dict[str, Any]] = {
    # Tunix 0.1.7 rotates every Llama and Qwen 3 with this base, whatever its configuration says.
    "llama": dict(rope_parameters=MILLION),
    "qwen2": {},
    "qwen3": dict(rope_parameters=MILLION),
    "gemma2": dict(query_pre_attn_scalar=16),  # it scales by the width of a head
    "gemma3": dict(query_pre_attn_scalar=16),
}
"""The models that Tunix knows, and what is changed of them for it."""


class Arrival(NamedTuple):
    """How a model arrived in another program.

    Attributes:
      difference: largest difference of the logits, relative to the largest one.
      zeros: how many of its parameters are zero.
      pruned: how many weights the masks prune.
    """

    difference: float
    zeros: int
    pruned: int

    def right(self, within: float) -> bool:
        """Whether logits agree and as many weights are 0 as masks prune."""
        return self.difference < within and self.zeros == self.pruned


class Left(NamedTuple):
    """What a trainer left of the zeros.

    Attributes:
      zeros: how many pruned weights are still zero.
      pruned: how many weights the masks prune.
      moved: the share of kept weights that changed.
    """

    zeros: int
    pruned: int
    moved: float


class Pruned(NamedTuple):
    """A pruned model, and what another program must reproduce.

    ``folder`` is its plain export. ``logits`` are ours for TOKENS. ``pruned`` counts its pruned weights.
    """

    run: Path
    folder: Path
    logits: np.ndarray
    pruned: int
    config: llama.LlamaConfig


def pruned(root: Path, name: str, **changed: Any) -> Pruned:
    """One of MODELS with half of its weights, in a folder."""
    config = configured(name, **changed)
    run = pruned_run(root / "run", config, random_tensors(config))
    export(run, root / "hf")
    opened = open_model(str(root / "hf"))
    decoder = Decoder.open(opened.config, opened.tensors, make_mesh("1x1"))
    assert isinstance(decoder.config, llama.LlamaConfig)
    count = sum(int(np.sum(~keep)) for keep in read_masks(root / "hf").values())
    return Pruned(run, root / "hf", logits_of(decoder, TOKENS), count, decoder.config)


def _zeros(state: Any) -> int:
    return sum(int(jnp.sum(array == 0)) for array in jax.tree.leaves(state))


def _difference(theirs: Any, ours: np.ndarray) -> float:
    return float(np.abs(np.asarray(theirs, np.float32) - ours).max() / np.abs(ours).max())


def _maxtext_config(folder: Path, *settings: str) -> Any:
    from maxtext.configs import pyconfig

    return pyconfig.initialize(
        [
            "",
            str(folder / "maxtext.yml"),
            f"load_parameters_path={folder}/0/items",
            f"base_output_directory={folder}/out",
            *["run_name=tiny", "dataset_type=synthetic", "attention=dot_product", "dtype=float32", "matmul_precision=highest"],
            # Experts by dense matmuls: no token is dropped, and megablox is a kernel for TPUs.
            *["megablox=false", "sparse_matmul=false"],
            *["per_device_batch_size=1", "enable_checkpointing=false", "skip_jax_distributed_system=true", "log_config=false"],
            *settings,
        ]
    )


def _in_maxtext(root: Path, name: str, scan: bool) -> tuple[Pruned, Any]:
    """A pruned model, and MaxText's configuration of its export."""
    model, out = pruned(root, name), root / f"maxtext-{scan}"
    export(model.run, out, options=Options(scan_layers=scan), form="maxtext")
    # A Mistral's own length is its window.
    return model, _maxtext_config(out, *([] if name == "mistral" else [f"max_target_length={LENGTH}"]))


def arrives_in_maxtext(name: str, scan: bool) -> Arrival:
    """Loads the export of one of MODELS with MaxText, and compares."""
    from maxtext.layers import nnx_decoders
    from maxtext.utils import model_creation_utils

    def attend(query: jax.Array, table: jax.Array, *_: Any) -> jax.Array:
        # MaxText rounds the table of a tied head to bfloat16 in any dtype, which would hide smaller differences.
        return jnp.dot(query, table.T, precision="highest")

    with tempfile.TemporaryDirectory() as folder, _replaced(nnx_decoders, "attend_on_embedding", attend):
        model, config = _in_maxtext(Path(folder), name, scan)
        theirs, mesh = model_creation_utils.from_pretrained(config)
        with mesh:
            logits = theirs(TOKENS, np.arange(LENGTH)[None], np.ones((1, LENGTH), np.int32), enable_dropout=False)
        return Arrival(_difference(logits, model.logits), _zeros(nnx.state(theirs, nnx.Param)), model.pruned)


def trained_by_maxtext(steps: int, keep: bool, name: str = "llama") -> Left:
    """Trains one of MODELS on synthetic text with MaxText's own loop."""
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
    from maxtext.utils import model_creation_utils

    made = optimizers.get_optimizer
    wrapped = (lambda *given, **named: optima_tpu.keep_zeros(made(*given, **named))) if keep else made
    with tempfile.TemporaryDirectory() as folder, _replaced(optimizers, "get_optimizer", wrapped):
        _, config = _in_maxtext(Path(folder), name, True)
        before = nnx.state(model_creation_utils.from_pretrained(config)[0], nnx.Param)
        config = _maxtext_config(Path(config.load_parameters_path).parents[1], *_TRAINING, f"steps={steps}")
        after = nnx.split_state(train.train_loop(config, None)["model"], nnx.Param, ...)[0]
        return _left(before, after)


_TRAINING = (
    f"max_target_length={LENGTH} learning_rate=0.001 warmup_steps_fraction=0.1 adam_weight_decay=0.1 enable_tensorboard=false"
).split()


def _left(before: Any, after: Any) -> Left:
    masks = optima_tpu.masks_of(before)
    flat = list(zip(*map(jax.tree.leaves, (before, after, masks)), strict=True))
    still = sum(int(jnp.sum((new == 0) & ~keep)) for _, new, keep in flat)
    changed = sum(int(jnp.sum((new != old) & keep)) for old, new, keep in flat)
    return Left(still, sum(int(jnp.sum(~keep)) for *_, keep in flat), changed / sum(int(jnp.sum(keep)) for *_, keep in flat))


def _tunix(name: str, model: Pruned) -> Any:
    """The model as Tunix loads it from the plain export."""
    config = model.config
    sizes = dict(
        num_layers=config.blocks,
        embed_dim=config.d_model,
        hidden_dim=config.d_ff,
        num_heads=config.heads,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )
    window = next((width for width in config.windows if width), None)
    with jax.default_matmul_precision("highest"):
        if name.startswith("gemma2"):
            from tunix.models.gemma import model as gemma
            from tunix.models.gemma import params_safetensors as gemma_files

            kinds = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL) * (config.blocks // 2)
            theirs = gemma.ModelConfig(
                **sizes, num_embed=config.vocab, sliding_window_size=window, attention_types=kinds, use_post_attn_norm=True,
                use_post_ffw_norm=True, final_logit_softcap=config.logit_cap, attn_logits_soft_cap=config.score_cap,
            )  # fmt: skip
            return gemma_files.create_model_from_safe_tensors(str(model.folder), theirs, dtype=jnp.float32)
        if name.startswith("gemma3"):
            from tunix.models.gemma3 import model as gemma3
            from tunix.models.gemma3 import params_safetensors as gemma3_files

            local, everywhere = config.rope.of(0), config.rope.of(5)
            theirs = gemma3.ModelConfig(
                **sizes, num_embed=config.vocab, sliding_window_size=window, local_base_frequency=int(local.theta),
                global_base_frequency=int(everywhere.theta), global_scale_factor=everywhere.factor, param_dtype=jnp.float32,
            )  # fmt: skip
            return gemma3_files.create_model_from_safe_tensors(str(model.folder), theirs, dtype=jnp.float32)
        common = dict(vocab_size=config.vocab, rope_theta=int(config.rope.of(0).theta), norm_eps=config.eps)
        if name.startswith("llama"):
            from tunix.models.llama3 import model as llama3
            from tunix.models.llama3 import params as llama3_files

            own = llama3.ModelConfig(**sizes, **common, weight_tying=config.tied)
            return llama3_files.create_model_from_safe_tensors(str(model.folder), own)
        import importlib

        family, files = (importlib.import_module(f"tunix.models.{name}.{part}") for part in ("model", "params"))
        return files.create_model_from_safe_tensors(
            str(model.folder), family.ModelConfig(**sizes, **common, use_tied_embedding=config.tied)
        )


def _tunix_logits(theirs: Any) -> jax.Array:
    causal = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
    with jax.default_matmul_precision("highest"):
        return theirs(jnp.asarray(TOKENS), jnp.arange(LENGTH)[None], None, causal)[0]


def arrives_in_tunix(name: str, **changed: Any) -> Arrival:
    """Loads the plain export of one of TUNIX with Tunix, and compares."""
    with tempfile.TemporaryDirectory() as folder:
        model = pruned(Path(folder), name, **(TUNIX[name] | changed))
        theirs = _tunix(name, model)
        return Arrival(_difference(_tunix_logits(theirs), model.logits), _zeros(nnx.state(theirs, nnx.Param)), model.pruned)


def trained_by_tunix(steps: int, keep: bool, name: str = "qwen3") -> Left:
    """Trains all weights of one of TUNIX with Tunix's PeftTrainer."""
    from tunix.sft import peft_trainer, utils

    with tempfile.TemporaryDirectory() as folder:
        theirs = _tunix(name, pruned(Path(folder), name, **TUNIX[name]))
        before = jax.tree.map(jnp.copy, nnx.state(theirs, nnx.Param))
        optimizer = optax.adamw(1e-3, weight_decay=0.1)
        if keep:
            optimizer = optima_tpu.keep_zeros(optimizer, optima_tpu.masks_of(nnx.state(theirs, nnx.Param)))
        settings = peft_trainer.TrainingConfig(max_steps=steps, eval_every_n_steps=steps + 1)
        trainer = peft_trainer.PeftTrainer(theirs, optimizer, settings).with_gen_model_input_fn(
            lambda given: {
                "input_tokens": given.input_tokens,
                "input_mask": given.input_mask,
                "positions": utils.build_positions_from_mask(given.input_mask),
                "attention_mask": utils.make_causal_attn_mask(given.input_mask),
            }
        )
        draw = np.random.default_rng(1)
        texts = [
            peft_trainer.TrainingInput(
                input_tokens=draw.integers(1, 64, (4, LENGTH)).astype(np.int32), input_mask=np.ones((4, LENGTH), bool)
            )
            for _ in range(steps)
        ]
        trainer.train(texts)
        return _left(before, nnx.state(theirs, nnx.Param))


def quantized_by_qwix(name: str = "llama") -> Arrival:
    """Quantises one of TUNIX to int8 with Qwix, as Tunix loaded it.

    The zeros are the integers that are 0 where the masks prune.
    """
    import qwix

    with tempfile.TemporaryDirectory() as folder:
        model = pruned(Path(folder), name, **TUNIX[name])
        theirs = _tunix(name, model)
        masks = dict(nnx.to_flat_state(optima_tpu.masks_of(nnx.state(theirs, nnx.Param))))
        rules = [qwix.QuantizationRule(module_path=".*(proj|mlp).*", weight_qtype="int8")]
        causal = jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))
        small = qwix.quantize_model(theirs, qwix.PtqProvider(rules), jnp.asarray(TOKENS), jnp.arange(LENGTH)[None], None, causal)
        integers = {path[:-2]: value[...] for path, value in nnx.to_flat_state(nnx.state(small)) if path[-1] == "qvalue"}
        zeros = sum(int(jnp.sum((value == 0) & ~masks[path][...].reshape(value.shape))) for path, value in integers.items())
        return Arrival(_difference(_tunix_logits(small), model.logits), zeros, model.pruned)


def with_qwix_integers(folder: Path, output: Path) -> Arrival:
    """Writes a copy of an exported folder with the values of Qwix's int8.

    Each row of a pruned matrix has one scale. The difference is the largest one of a weight, relative to the largest weight of
    its matrix.
    """
    import qwix

    masks = read_masks(folder)
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("*.safetensors", "*.npz", "sha256*", "optima_tpu.json"))
    zeros, largest = 0, 0.0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = safetensors.numpy.load_file(file)
        for name in masks.keys() & tensors.keys():
            weight = tensors[name]
            values = np.asarray(qwix.dequantize(qwix.quantize(jnp.asarray(weight), "int8", channelwise_axes=(0,))))
            zeros += int(np.sum((values == 0) & ~masks[name]))
            largest = max(largest, float(np.abs(values - weight).max() / np.abs(weight).max()))
            tensors[name] = values.astype(weight.dtype)
        safetensors.numpy.save_file(tensors, output / file.name, {"format": "pt"})
    return Arrival(largest, zeros, sum(int(np.sum(~keep)) for keep in masks.values()))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ecosystem", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="*", help="maxtext, tunix, training, qwix (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="steps of training (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="qwix: an exported folder, in the place of a tiny model")
    parser.add_argument("--output", type=Path, help="qwix: where the copy of this folder goes")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    what = arguments.what or ["maxtext", "tunix", "training", "qwix"]
    right = []
    if "maxtext" in what:
        for name in MODELS:
            for scan in (True, False):
                arrival = arrives_in_maxtext(name, scan)
                right.append(_print(f"maxtext {name} {'scanned' if scan else 'unscanned'}", arrival, arrival.right(2e-5)))
    if "tunix" in what:
        for name in TUNIX:
            arrival = arrives_in_tunix(name)
            right.append(_print(f"tunix {name}", arrival, arrival.right(2e-5)))
    if "qwix" in what:
        arrival = with_qwix_integers(arguments.folder, arguments.output) if arguments.folder else quantized_by_qwix()
        right.append(_print(f"qwix int8 {arguments.folder or 'llama'}", arrival, arrival.right(0.1)))
    if "training" in what:
        for program, train in {"tunix": trained_by_tunix, "maxtext": trained_by_maxtext}.items():
            for keep in (True, False):
                left = train(arguments.steps, keep)
                title = f"{arguments.steps} steps of {program} {'with' if keep else 'without'} keep_zeros"
                stayed = left.zeros == left.pruned and left.moved > 0.9
                right.append(_print(title, left, stayed if keep else left.zeros < 0.01 * left.pruned))
    return 0 if all(right) else 1


def _print(what: str, result: Arrival | Left, right: bool) -> bool:
    numbers = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in result._asdict().items()
    )
    print(what, *numbers, *([] if right else ["WRONG"]), flush=True)
    return right


if __name__ == "__main__":
    sys.exit(main())
