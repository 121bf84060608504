"""Writes digests of many runs' weights, to compare two commits bit for bit.

    python -m benchmarks.weight_digests MODELS OUT.json [--mesh 4x2] [--only TEXT] [--against OTHER.json]

Prunes every model folder in MODELS with every recipe below and writes the SHA-256 of each run's weights to OUT.json. With
``make-models FOLDER`` instead of the arguments, writes tiny models of four families to prune. Run it at two commits, the second
time with ``--against``.
"""

import argparse
import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path

SMALL = [
    "--calibration.source",
    "random",
    "--calibration.windows",
    "8",
    "--calibration.length",
    "32",
    "--calibration.held_out",
    "4",
    "--evaluation.source",
    "random",
    "--evaluation.windows",
    "2",
    "--token_cache",
    "false",
]

_DENSE = "--target dense --target.alpha 0.5"
RECIPES = {
    name: (text if "--preset" in text or "--selector" in text else f"--preset fast {text}").split()
    for name, text in {
        "magnitude": "--selector magnitude --pattern 0.5/layer --solver null",
        "wanda": "--selector wanda --pattern 0.5 --solver null",
        "imported": "--selector imported --selector.path WANDAS_RUN --solver cg --pattern 0.5/row",
        "wanda shifted 2:4": "--selector wanda --selector.shift_zero true --pattern 2:4 --solver cg",
        "sparsegpt": "--selector sparsegpt --pattern 0.5 --solver null",
        "sparsegpt 2:4": "--selector sparsegpt --pattern 2:4 --solver cg",
        "thanos": "--selector thanos --pattern 0.6/row --solver cg",
        "admm": "--selector admm --pattern 0.5 --solver cg --solver.damping 0.1",
        "cg": "--solver cg --pattern 0.5/row",
        "cg undamped": "--solver cg --solver.damping 0 --pattern 0.6/row --layers self_attn.*=0.3",
        "mpax": "--preset paper --pattern 0.5/row --solver.iteration_limit 300",
        "mpax unit": "--solver mpax --solver.unit_diagonal true --solver.damping 0.01 --solver.iteration_limit 300",
        "exact": "--solver exact --solver.damping 0.05 --pattern 0.5/row",
        "adam": "--solver adam --pattern 0.5/row",
        "per layer": "--solver cg --accept per_layer",
        "recapture": "--solver cg --recapture true",
        "dense": f"--solver cg {_DENSE}",
        "dense recapture": f"--solver cg {_DENSE} --recapture true",
        "stream": f"--solver cg {_DENSE} --target.gamma 0.5 --recapture true",
        "weighed": f"--solver cg {_DENSE} --target.gamma 0.5 --target.weigh_tokens true --recapture true",
        "swaps": "--solver cg --refine swaps --pattern 0.5/row",
        "swaps 2:4": "--solver cg --refine swaps --refine.rounds 2 --pattern 2:4 --layers mlp.*=0.5/row",
        "swaps exact": "--solver exact --solver.damping 0.1 --refine swaps --refine.rounds 1",
        "owl": "--solver cg --allocation owl --allocation.limit 0.1 --pattern 0.5/row",
        "measured": "--solver cg --allocation measured --allocation.limit 0.3 --pattern 0.5/row",
        "few rows": "--solver cg --device_memory 0.0006 --batch 1",
        "best": "--preset best --pattern 0.5",
        "paper": "--preset paper --pattern 0.5/row",
        "fast": "--preset fast --pattern 0.5/row",
        "best 2:4": "--preset best --pattern 2:4",
        "bfloat16": "--preset best --pattern 0.5/row --dtype bfloat16",
    }.items()
}


def make_models(root: Path) -> None:
    """Writes tiny random models of four families, by ``transformers``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    common = dict(vocab_size=258, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=128)
    gated = common | dict(intermediate_size=48, num_key_value_heads=2, head_dim=8)
    families = {
        "llama": transformers.LlamaConfig(**gated),
        "opt": transformers.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32),
        "gemma3": transformers.Gemma3TextConfig(**gated, sliding_window=16),
        "qwen3_moe": transformers.Qwen3MoeConfig(**gated, moe_intermediate_size=32, num_experts=3, num_experts_per_tok=2),
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    for name, config in families.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>").save_pretrained(
            root / name
        )


def digest(run: Path) -> dict[str, object]:
    """Returns digests of weights and layer reports, and the perplexity.

    Reports may differ by rounding alone.
    """
    hasher = hashlib.sha256()
    for file in sorted((run / "hf").glob("*.safetensors")):
        hasher.update(file.read_bytes())
    report = json.loads((run / "report.json").read_text())
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    numbers = json.dumps([[layer[key] for key in sorted(layer) if key != "name"] for layer in layers])
    return {
        "weights": hasher.hexdigest()[:24],
        "layers": hashlib.sha256(numbers.encode()).hexdigest()[:24],
        "perplexity": report["perplexity"]["pruned"],
    }


def recipe_masks(chosen: argparse.Namespace, folder: Path) -> Path:
    """Path of the copied model of "wanda", for the masks of "imported"."""
    return Path(f"{chosen.out}.{folder.name}.{chosen.mesh}")


def main() -> int:
    if sys.argv[1:2] == ["make-models"]:
        make_models(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mesh", default="1x1")
    parser.add_argument("--only", default="")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--recipes", default="", help="comma-separated names of recipes (default: all)")
    chosen, rest = parser.parse_known_args()
    import jax

    from optima_tpu.launch import main as launch

    data, model = map(int, chosen.mesh.split("x"))
    digests: dict[str, object] = {}
    other = json.loads(chosen.against.read_text()) if chosen.against else {}
    different = 0
    names = chosen.recipes.split(",") if chosen.recipes else list(RECIPES)
    for folder in sorted(path for path in chosen.models.iterdir() if path.is_dir()):
        for name in names:
            key = f"{chosen.mesh} {folder.name} {name}"
            if chosen.only not in key:
                continue
            with tempfile.TemporaryDirectory() as directory:
                printed = io.StringIO()
                recipe = [word.replace("WANDAS_RUN", str(recipe_masks(chosen, folder))) for word in RECIPES[name]]
                arguments = [
                    "--model",
                    str(folder),
                    "--mesh",
                    chosen.mesh,
                    "--cpu-devices",
                    str(data * model),
                    *SMALL,
                    *recipe,
                    *rest,
                    "--output",
                    f"{directory}/run",
                ]
                with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                    try:
                        status: object = launch(arguments)
                    except Exception as error:  # an error is a result too: both versions must fail in the same way
                        status = f"{type(error).__name__}: {error}"[:200]
                jax.clear_caches()  # hundreds of compiled programs would exceed the system's limit of memory maps
                digests[key] = digest(Path(directory) / "run") if status == 0 else {"failed": str(status)}
                if name == "wanda" and status == 0:
                    shutil.copytree(Path(directory) / "run" / "hf", recipe_masks(chosen, folder), dirs_exist_ok=True)
            verdict = "" if key not in other else "same" if other[key] == digests[key] else f"DIFFERENT from {other[key]}"
            if verdict == "same" or key not in other:
                pass
            elif other[key].get("weights") == digests[key].get("weights"):  # type: ignore[union-attr]
                verdict = "same weights, other reported numbers"
            else:
                different += 1
            print(key, json.dumps(digests[key]), verdict, flush=True)
            chosen.out.write_text(json.dumps(digests, indent=1))
    print(f"{len(digests)} runs" + (f", {different} with other weights" if chosen.against else ""))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
