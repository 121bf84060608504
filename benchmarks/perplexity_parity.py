"""Compares our perplexity with transformers in torch, in float32.

    python -m benchmarks.perplexity_parity
    python -m benchmarks.perplexity_parity --text file:wiki.test.raw.txt --windows 21
    python -m benchmarks.perplexity_parity --model gemma-3-270m.gguf --length 512 --windows 40 --bos text

The protocol is the one of SparseGPT, Wanda and OPTIMA: the whole text is tokenised once and cut into windows that do not overlap;
the negative log-likelihood is averaged over all tokens except the first of each window. The reference uses our weights, but its
own code for tokens and windows.
"""

import argparse
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
import transformers

from optima_tpu import data
from optima_tpu.config.run_config import EMBEDDED, RunConfig
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.models.checkpoints import Pretrained, load_tokenizer
from optima_tpu.models.model import window_bos
from optima_tpu.pipeline.inputs import open_model_on_mesh
from optima_tpu.report.progress import Progress


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.perplexity_parity",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=EMBEDDED.model, help="as in optima_tpu.launch")
    parser.add_argument("--text", default="wikitext2", help="as --evaluation.source of optima_tpu.launch, except npy:")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window")
    parser.add_argument("--windows", type=int, help="number of windows to use, from the start (default: all)")
    parser.add_argument("--bos", choices=["text", "window"], help="as --evaluation.bos of optima_tpu.launch")
    parser.add_argument("--batch", type=int, default=1, help="windows in one step of our forward pass")
    arguments = parser.parse_args(argv)

    model = open_model_on_mesh(RunConfig(arguments.model, dtype="float32", batch=arguments.batch))
    tokenizer, source = load_tokenizer(model.pretrained), data.parse_source(arguments.text)
    bos = window_bos(model, tokenizer, arguments.bos)
    tokens = data.evaluation_tokens(source, tokenizer, length=arguments.length, windows=arguments.windows, bos=bos)
    ids = tokenizer("\n\n".join(source.documents("evaluation")), add_special_tokens=bos is None, verbose=False)["input_ids"]
    with Progress() as progress:
        progress.stage("optima_tpu", model.decoder.config.blocks + 1)
        ours = perplexity(model.decoder, tokens.ids, progress.advance)
        progress.note(f"perplexity {ours:.6f}")
        progress.stage("transformers", len(tokens.ids))
        theirs = published(peer(model.pretrained), ids, arguments.length, arguments.windows, bos, progress.advance)
    print(
        f"\n{model.pretrained.origin}, {tokens.how}, float32. jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.\n"
    )
    print("| optima_tpu | seconds | transformers | seconds | relative difference |\n|---|---|---|---|---|")
    print(
        f"| {ours:.6f} | {progress.seconds['optima_tpu']:.0f} | {theirs:.6f} | {progress.seconds['transformers']:.0f} | "
        f"{abs(ours / theirs - 1):.1e} |"
    )


def peer(pretrained: Pretrained) -> torch.nn.Module:
    """The checkpoint as a transformers model in float32."""
    model = getattr(transformers, pretrained.config.architectures[0])(pretrained.config).float().eval()
    state = {name: torch.from_numpy(pretrained.tensors.read(name).astype(np.float32)) for name in pretrained.tensors.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


@torch.inference_mode()
def published(
    model: torch.nn.Module,
    ids: Sequence[int],
    length: int,
    windows: int | None = None,
    bos: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> float:
    """Returns a text's perplexity as the scripts of SparseGPT and Wanda do.

    Args:
      windows: number of windows to use, from the start; None takes all.
      bos: a token to put before every window, which then has ``length - 1`` tokens of text; None for no token.
    """
    first = [] if bos is None else [bos]
    size = length - len(first)
    count = min(windows or len(ids), len(ids) // size)
    total = 0.0
    for index in range(count):
        window = torch.tensor([*first, *ids[index * size : (index + 1) * size]])
        logits = model(window[None]).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        advance()
    return math.exp(total / (count * (length - 1)))


if __name__ == "__main__":
    main()
