"""Compares the speed of one block with transformers in torch.

    python -m benchmarks.forward 10

Times three steps on the same cores in float32, each on the same hidden states, including transfers from and to the host:

- the forward pass alone
- the calibration step: forward pass and Hessians of the four distinct inputs of the block's linear layers. In torch, hooks add
  ``X'X``, as in published pruners, but once for each distinct input instead of once for each of the seven layers.
- the backward pass of a training: gradients of the block's weights and input for the sum of its outputs. Both compute the
  forward pass first; in a training ours does so once more than torch, since it keeps the inputs of the blocks alone.

Runs alternate, so that other load on the machine affects both. Seconds are medians; the ratio is the median over pairs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from optima_tpu.config.run_config import EMBEDDED
from optima_tpu.method.distillation import KL
from optima_tpu.models.checkpoints import open_model
from optima_tpu.models.decoder import Decoder
from optima_tpu.pipeline.calibrate import Stream, accumulate
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.sums import Capture
from optima_tpu.runtime.mesh import make_mesh


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forward",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("block", type=int, help="index of the block")
    parser.add_argument("--model", default=EMBEDDED.model, help="a Llama, as in optima_tpu.launch")
    parser.add_argument("--windows", type=int, default=8, help="windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--batch", type=int, default=4, help="windows in one step")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))

    pretrained = open_model(arguments.model, "float32")
    decoder = Decoder.open(pretrained.config, pretrained.tensors, make_mesh(None), arguments.batch)
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab, (arguments.windows, arguments.length))
    hidden = decoder.embed(tokens)
    for index in range(arguments.block):
        decoder.apply(index, next(decoder.blocks([index])), hidden)
    parameters, groups = next(decoder.blocks([arguments.block])), linear_groups(decoder)
    peer = Peer(
        pretrained.config,
        arguments,
        {name: np.array(value) for name, value in parameters.items()},
        [names[0] for names in groups],
    )

    def forward() -> np.ndarray:
        output = hidden.copy()
        decoder.apply(arguments.block, parameters, output)
        return output.values

    def calibrate() -> list[np.ndarray]:
        statistics = accumulate(decoder, arguments.block, Capture(groups), (Stream(parameters, hidden),))
        return [np.asarray(each.hessian) for each in statistics]

    trainer = Trainer(decoder, KL())
    trained, positions = trainer.open(parameters, {}), decoder.positions(arguments.block, arguments.length)

    def backward() -> list[np.ndarray]:
        gradient, inputs = trainer.zeros(), []
        for part in hidden.batches(arguments.batch):
            ones = jnp.ones_like(part.hidden)
            _, pull = trainer.ahead(trained, part.hidden, positions, keep=True)
            gradient, back = trainer.backward(pull, ones, gradient)
            inputs.append(np.asarray(back))
        return [np.concatenate(inputs), *(np.asarray(gradient[name]) for name in sorted(gradient))]

    differences = [
        largest_difference([forward()], [peer.forward(hidden.values)]),
        largest_difference(calibrate(), peer.calibrate(hidden.values)),
        largest_difference(backward(), peer.backward(hidden.values)),
    ]
    print(
        f"Block {arguments.block} of {pretrained.origin}, {arguments.windows} x {arguments.length} tokens in batches of "
        f"{arguments.batch}, float32. jax {jax.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} cores, load {os.getloadavg()[0]:.1f}.\n"
    )
    print("| step | tokens/s | torch, tokens/s | ratio | largest difference |\n|---|---|---|---|---|")
    for name, ours, theirs, difference in (
        ("forward", forward, peer.forward, differences[0]),
        ("calibration", calibrate, peer.calibrate, differences[1]),
        ("backward", backward, peer.backward, differences[2]),
    ):
        pairs = [(seconds(ours), seconds(theirs, hidden.values)) for _ in range(arguments.repeats)]
        own_rate, torch_rate = (tokens.size / statistics.median(times) for times in zip(*pairs))
        ratio = statistics.median(second / first for first, second in pairs)
        print(f"| {name} | {own_rate:.0f} | {torch_rate:.0f} | {ratio:.2f} | {difference:.1e} |")


def seconds(run: Callable, *inputs) -> float:
    started = time.perf_counter()
    run(*inputs)
    return time.perf_counter() - started


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Returns the largest relative difference over all pairs of arrays."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


class Peer:
    """The block as a transformers module.

    Args:
      inputs: names of linear layers, one for each distinct input.
    """

    def __init__(self, config, arguments, parameters: dict[str, np.ndarray], inputs: list[str]):
        config._attn_implementation = "sdpa"
        self.block = LlamaDecoderLayer(config, arguments.block).float().eval()
        self.block.load_state_dict({name: torch.from_numpy(value) for name, value in parameters.items()})
        self.rope, self.batch = LlamaRotaryEmbedding(config), arguments.batch
        self.layers = [self.block.get_submodule(name) for name in inputs]

    @torch.inference_mode()
    def forward(self, hidden: np.ndarray) -> np.ndarray:
        positions = torch.arange(hidden.shape[1])[None]
        outputs = []
        for part in torch.from_numpy(hidden).split(self.batch):
            output = self.block(part, position_embeddings=self.rope(part, positions), position_ids=positions)
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])
        return torch.cat(outputs).numpy()

    def calibrate(self, hidden: np.ndarray) -> list[np.ndarray]:
        sums = [torch.zeros(layer.in_features, layer.in_features) for layer in self.layers]

        def add(total: torch.Tensor) -> Callable:
            def hook(layer, inputs):
                rows = inputs[0].reshape(-1, total.shape[0])
                total.addmm_(rows.T, rows)

            return hook

        hooks = [layer.register_forward_pre_hook(add(total)) for layer, total in zip(self.layers, sums)]
        self.forward(hidden)
        for hook in hooks:
            hook.remove()
        return [(total / (hidden.shape[0] * hidden.shape[1])).numpy() for total in sums]

    def backward(self, hidden: np.ndarray) -> list[np.ndarray]:
        positions, inputs = torch.arange(hidden.shape[1])[None], []
        self.block.zero_grad()
        for part in torch.from_numpy(hidden).split(self.batch):
            part = part.clone().requires_grad_()
            output = self.block(part, position_embeddings=self.rope(part, positions), position_ids=positions)
            (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
            inputs.append(part.grad.numpy())
        weights = dict(sorted(self.block.named_parameters()))
        return [np.concatenate(inputs), *(weight.grad.numpy() for weight in weights.values())]


if __name__ == "__main__":
    main()
