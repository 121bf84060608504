"""Trains a small mixture of experts on a text file. Needs torch.

    python -m benchmarks.mixture c4.jsonl mixture

It serves measurements that need a trained router. Of every ten documents, eight train, one is for calibration and one is held
out. Writes FOLDER/model, which ``transformers`` and ``optima prune`` load, FOLDER/calibration.jsonl and FOLDER/held_out.jsonl.
Prints the loss on the held-out documents beside the loss of counted unigrams and bigrams, and how the held-out tokens are
divided among the experts. One thread and fixed seeds: the same weights each time.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
LENGTH = 128
"""Tokens of a training window; all of a text's windows are joined documents."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixture",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("text", type=Path, help='a file with {"text": ...} on each line')
    parser.add_argument("folder", type=Path, help="where model and texts are written")
    parser.add_argument("--steps", type=int, default=2600, help="training steps")
    parser.add_argument("--windows", type=int, default=8, help=f"windows of {LENGTH} tokens in a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--vocab", type=int, default=4096, help="tokens that byte-pair encoding learns")
    parser.add_argument("--width", type=int, default=192, help="d_model")
    parser.add_argument("--blocks", type=int, default=4, help="number of blocks")
    parser.add_argument("--experts", type=int, default=32, help="experts of a block")
    parser.add_argument("--chosen", type=int, default=4, help="experts of a token")
    parser.add_argument("--inner", type=int, default=128, help="width of an expert")
    parser.add_argument("--seed", type=int, default=0, help="draws the first weights and the order of the windows")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(arguments.seed)
    documents = [json.loads(line)["text"] for line in arguments.text.read_text("utf-8").splitlines()]
    training = [text for number, text in enumerate(documents) if number % 10 < 8]
    tokenizer = learn_tokenizer(training, arguments.vocab)
    tokens, held_out = (joined(tokenizer, texts) for texts in (training, documents[9::10]))
    model = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.width,
            num_hidden_layers=arguments.blocks,
            num_attention_heads=arguments.width // 48,
            num_experts=arguments.experts,
            num_experts_per_tok=arguments.chosen,
            intermediate_size=arguments.inner,
            initializer_range=0.05,
            norm_topk_prob=True,
            output_router_logits=True,  # adds the loss of an uneven router, at OLMoE's weight of 0.01
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    train(model, tokens, arguments)
    model.save_pretrained(arguments.folder / "model")
    tokenizer.save_pretrained(arguments.folder / "model")
    for name, texts in (("calibration", documents[8::10]), ("held_out", documents[9::10])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (arguments.folder / f"{name}.jsonl").write_text(lines, "utf-8")
    describe(model, tokens, held_out)


def learn_tokenizer(texts: Sequence[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-pair encoding of bytes, learnt from some texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)


def joined(tokenizer: transformers.PreTrainedTokenizerFast, texts: Sequence[str]) -> np.ndarray:
    """Returns all texts' tokens, each with an end token, [windows, LENGTH]."""
    ids = np.concatenate([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    return ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)


def train(model: torch.nn.Module, windows: np.ndarray, arguments: argparse.Namespace) -> None:
    """Trains with AdamW, over the windows in a new order in every pass.

    The learning rate has a warm-up and a linear decline to zero.
    """
    rng, steps, started = np.random.default_rng(arguments.seed), arguments.steps, time.process_time()
    passes = math.ceil(steps * arguments.windows / len(windows))
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(passes)])
    matrices = [each for each in model.parameters() if each.ndim > 1]
    others = [each for each in model.parameters() if each.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, 1 - step / steps))
    for step in range(steps):
        batch = torch.from_numpy(windows[order[step * arguments.windows : (step + 1) * arguments.windows]])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.process_time() - started:.0f} CPU s", flush=True)


@torch.inference_mode()
def describe(model: torch.nn.Module, training: np.ndarray, held_out: np.ndarray) -> None:
    """Prints the held-out loss and the shares of tokens that reach experts."""
    model.eval()
    config, losses, reached = model.config, [], 0
    for batch in torch.from_numpy(held_out).split(16):
        output = model(input_ids=batch, output_router_logits=True)
        losses.append(
            torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        )
        chosen = torch.stack(output.router_logits).topk(config.num_experts_per_tok).indices
        reached += torch.nn.functional.one_hot(chosen, config.num_experts).sum((1, 2)).numpy()
    loss = float(sum(losses)) / held_out[:, 1:].size
    unigrams, bigrams = counted_losses(training, held_out, config.vocab_size)
    print(f"\n{training.size} training tokens, {held_out.size} held-out tokens, {model.num_parameters() / 1e6:.1f} M parameters")
    print(f"held-out loss {loss:.3f}; unigrams {unigrams:.3f}, bigrams {bigrams:.3f}")
    even = held_out.size * config.num_experts_per_tok / config.num_experts
    for index, counts in enumerate(np.sort(reached / even, axis=1)):
        print(f"block {index}: tokens of an expert over an even share: {' '.join(f'{each:.2f}' for each in counts)}")


def counted_losses(training: np.ndarray, held_out: np.ndarray, vocab: int) -> tuple[float, float]:
    """Returns the losses of unigrams and of bigrams on held-out windows.

    Unigrams have one added to each count. Bigrams have 0.75 taken from each count for the unigrams.
    """
    once = np.bincount(training.ravel(), minlength=vocab) + 1.0
    once /= once.sum()
    pairs, counts = np.unique(training[:, :-1].astype(np.int64) * vocab + training[:, 1:], return_counts=True)
    totals, kinds = (np.bincount(pairs // vocab, weights, minlength=vocab) for weights in (counts, None))
    before, after = held_out[:, :-1].ravel().astype(np.int64), held_out[:, 1:].ravel()
    wanted = before * vocab + after
    indices = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    seen = np.where(pairs[indices] == wanted, counts[indices] - 0.75, 0.0)
    total = np.maximum(totals[before], 1)
    left = np.where(totals[before] > 0, 0.75 * kinds[before] / total, 1.0)
    return -float(np.log(once[after]).mean()), -float(np.log(seen / total + left * once[after]).mean())


if __name__ == "__main__":
    main()
