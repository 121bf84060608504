"""A family for any decoder of ``transformers``, made from its module of torch."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax.sharding import PartitionSpec as P

from optima_tpu.errors import UserError, one_line, some
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.models.family import DecoderConfig, Family, Positions
from optima_tpu.models.general.block import Block, Final, Traced, embed, to_numpy
from optima_tpu.models.general.shell import Shell, computed, layers_of, stored, turned_layers
from optima_tpu.runtime.mesh import MODEL

_LENGTH = 8
"""Tokens of the window by which blocks are told apart."""

NEAR = 1e-4
"""The largest difference between a block here and in torch, relative to the largest output: some roundings of float32."""


class Layers(NamedTuple):
    """The layers of a block.

    Attributes:
      order: those that are pruned, in the order of the forward pass.
      program: what the block computes, as text: blocks with equal ones are alike.
    """

    order: tuple[str, ...]
    program: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralConfig(DecoderConfig):
    """A model of torch as a family reads it.

    Attributes:
      shell: the model.
      alike: for every block, the first one that computes the same.
      checked: for each kind of blocks, the longest window at which it was compared with torch.
    """

    shell: Shell
    alike: tuple[int, ...]
    checked: dict[int, int]

    @property
    def block_layers(self) -> tuple[int, ...]:
        return self.alike

    def positions(self, index: int, length: int) -> Positions:
        return Positions(arguments=arguments_of(self.shell, index, length))

    def check(self, kind: int, length: int) -> None:
        """Compares a block with torch, unless it was compared at this length or a longer one.

        Raises:
          UserError: they differ; names the first layer whose input does.
        """
        if length <= self.checked.get(kind, 0):
            return
        for name, largest in differences(self, kind, length):
            if not largest < NEAR:
                raise self.shell.refusal(
                    f"the {name} of its block {kind} differs from torch by {largest:.2g} of the largest value at {length} tokens, "
                    f"more than {NEAR:g}"
                )
        self.checked[kind] = length


def arguments_of(shell: Shell, index: int, length: int) -> Any:
    """What ``Traced.window`` is given for a block and a window of this length, as numpy arrays."""
    tensors = tuple(to_numpy(each.detach()) for each in shell.catch(length)[index].tensors)
    return tensors, {name: to_numpy(each) for name, each in computed(shell.blocks[index]).items()}


def general_family(config: Any) -> Family:
    """The family of a ``transformers`` configuration, made from the class that config.json names.

    Raises:
      UserError: the model does not fit what a family is; says why.
    """
    shell = Shell(config)
    _refuse_other_names(shell)
    layers = [_layers(shell, index) for index in range(len(shell.blocks))]
    alike = _alike(shell, layers)
    kinds = sorted(set(alike))
    table, head = shell.model.get_parameter(shell.embedding), shell.model.get_parameter(shell.head)
    read = GeneralConfig(
        d_model=shell.width,
        d_embedding=head.shape[1],
        blocks=len(shell.blocks),
        vocab=table.shape[0],
        tied=shell.tied,
        logit_cap=shell.logits.cap,
        logit_scale=shell.logits.scale,
        head_bias=shell.head_bias,
        generates=False,
        shell=shell,
        alike=alike,
        checked={},
    )
    linears = tuple(dict.fromkeys(kind_name(name) for kind in kinds for name in layers[kind].order))
    attended = tuple(dict.fromkeys(_attended(shell, kind, layers[kind].order) for kind in kinds))
    shapes = {name.removeprefix(shell.root): tuple(shell.model.get_parameter(name).shape) for name in shell.before}
    return Family(
        read_config=lambda config: read,
        block=Block,
        linears=linears,
        sharding={f"{name}.weight": P(MODEL, None) for name in linears} | {f"{name}.bias": P(MODEL) for name in linears},
        final=Final,
        roots=tuple(dict.fromkeys((shell.root, ""))),
        layers=shell.path.removeprefix(shell.root) + ".{}.",
        embedding=shell.embedding.removeprefix(shell.root),
        embedding_extras=lambda config: shapes,
        embed=embed,
        head=shell.stored_as(shell.head),
        head_bias=shell.stored_as(shell.head.replace("weight", "bias")),
        attended=attended,
        ignored=_ignored(shell),
        note=_note(shell, linears),
    )


class Difference(NamedTuple):
    """How far a block is from torch.

    Attributes:
      name: "input of" a layer, or "output".
      largest: the largest difference, relative to the largest value.
    """

    name: str
    largest: float


def differences(config: GeneralConfig, kind: int, length: int) -> list[Difference]:
    """Compares a block with torch, on one window of random numbers and with random weights, in float32.

    Returns:
      how far the inputs of its layers are apart, in the order of the forward pass, and its output.
    """
    shell, module = config.shell, config.shell.blocks[kind]
    weights, x = _random_weights(module), _random_window(length, config.d_model)
    expected, inputs = _by_torch(shell, kind, weights, x)
    parameters = {name: array.numpy() for name, array in weights.items()}
    parameters |= {f"{name}.weight": parameters[f"{name}.weight"].T for name in turned_layers(module)}
    order: dict[str, str] = {}
    window = jax.jit(lambda *given: Traced(shell, kind).window(given[0], given[1], order, given[2], {}))
    with jax.default_matmul_precision("highest"):
        output, found = window(parameters, config.positions(kind, length).arguments, x[0].numpy())
    pairs = [(f"input of {name}", found[first], inputs[name]) for name, first in order.items()] + [("output", output, expected)]
    return [Difference(name, _relative(np.asarray(ours), theirs.reshape(ours.shape).numpy())) for name, ours, theirs in pairs]


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))


def _layers(shell: Shell, index: int) -> Layers:
    order: dict[str, str] = {}

    def window(*given: Any) -> Any:
        return Traced(shell, index).window(given[0], given[1], order, given[2], {})

    module = shell.blocks[index]
    parameters = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shell.shapes(module).items()}
    x = jax.ShapeDtypeStruct((_LENGTH, shell.width), np.float32)
    try:
        traced = jax.make_jaxpr(window)(parameters, arguments_of(shell, index, _LENGTH), x)
    except UserError:
        raise
    except Exception as error:  # the code of any model
        raise shell.refusal(f"its block {index} cannot be traced ({type(error).__name__}: {one_line(error)[:200]})") from error
    if silent := [name for name in layers_of(module) if name not in order]:
        raise shell.refusal(f"the layer {silent[0]} of its block {index} shows no input")
    constants = [hashlib.sha256(np.asarray(each).tobytes()).hexdigest() for each in traced.consts]
    return Layers(tuple(order), re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)) + str(constants))


def _alike(shell: Shell, layers: Sequence[Layers]) -> tuple[int, ...]:
    """For every block, the first one that computes the same: the same program at a short length, and the same settings at any."""
    settings: list[dict[tuple[str, str], Any]] = [
        {
            (path, name): value
            for path, module in block.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple)
        }
        for block in shell.blocks
    ]
    numbers = {key for key, value in settings[0].items() if type(value) is int}
    own = {key for key in numbers if all(each.get(key) == settings[0][key] + index for index, each in enumerate(settings))}
    first: dict[Any, int] = {}
    keys = ((each.program, repr({key: of[key] for key in of if key not in own})) for each, of in zip(layers, settings))
    return tuple(first.setdefault(key, index) for index, key in enumerate(keys))


def _attended(shell: Shell, kind: int, order: tuple[str, ...]) -> str:
    """The first layer whose input at one token depends on an earlier token; the last layer if there is none.

    Raises:
      UserError: an output depends on a later token.
    """
    module, x = shell.blocks[kind], _random_window(_LENGTH, shell.width)
    weights = _random_weights(module)
    earlier, later = x.clone(), x.clone()
    earlier[:, -2] += 1
    later[:, -1] += 1
    output, inputs = _by_torch(shell, kind, weights, x)
    if not torch.equal(output[:, :-1], _by_torch(shell, kind, weights, later)[0][:, :-1]):
        raise shell.refusal(f"its block {kind} reads later tokens")
    others = _by_torch(shell, kind, weights, earlier)[1]
    rows = {name: (array.reshape(_LENGTH, -1)[-1], others[name].reshape(_LENGTH, -1)[-1]) for name, array in inputs.items()}
    # What comes behind this layer takes its input as known: layers must stand in the decoder's order as they do in the pass.
    ordered = tuple(sorted(order, key=lambda name: list(map(int, re.findall(r"\d+", name)))))
    return next((name for name in order if ordered == order and not torch.equal(*rows[name])), ordered[-1])


def _by_torch(
    shell: Shell, kind: int, weights: Mapping[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of a block in torch, and the inputs of its layers."""
    module, call, inputs = shell.blocks[kind], shell.catch(x.shape[1])[kind], dict[str, torch.Tensor]()

    def note(name: str, args: Any, given: Any) -> None:
        inputs[name] = args[0] if args else given["input"]

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for name, layer in layers_of(module).items():
            hook = layer.register_forward_pre_hook(lambda _, args, given, name=name: note(name, args, given), with_kwargs=True)
            stack.callback(hook.remove)
        args, kwargs = call.arguments(x, tuple(each.detach() for each in call.tensors))
        output = torch.func.functional_call(module, dict(weights), args, kwargs)
    return output if isinstance(output, torch.Tensor) else output[0], inputs


def _random_window(length: int, width: int) -> torch.Tensor:
    return torch.randn((1, length, width), generator=torch.Generator().manual_seed(0))


def _random_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random parameters that take little memory: each is a window that slides over a row of random numbers."""
    generator = torch.Generator().manual_seed(1)

    def made(shape: Sequence[int]) -> torch.Tensor:
        row = torch.randn(max(1, sum(shape)), generator=generator)
        row = 1 + 0.1 * row if len(shape) < 2 else row / max(shape) ** 0.5
        return row.as_strided(tuple(shape), (1,) * len(shape))

    return {name: made(tensor.shape) for name, tensor in stored(module).items()}


def _refuse_other_names(shell: Shell) -> None:
    """Only the head may have another name in a checkpoint: the rest of the program finds tensors by the names of modules."""
    heads = {shell.head, shell.head.replace("weight", "bias")}
    for name, _ in shell.model.named_parameters():
        if name not in heads and (other := shell.stored_as(name)) != name:
            raise shell.refusal(f"its {name} is called {other} in a checkpoint")


def _note(shell: Shell, linears: Sequence[str]) -> str:
    """What runs the model, and what is not pruned."""
    matrices = {kind_name(name) for block in shell.blocks for name, shape in shell.shapes(block).items() if len(shape) > 1}
    others = sorted(matrices - {f"{name}.weight" for name in linears})
    kept = f", and {some(others)} of the blocks" if others else ""
    return (
        f"the code of transformers' {shell.name}, by torchax: it prunes {', '.join(linears)}; embedding, norms, head{kept} stay as they "
        "are. It cannot write text"
    )


def _ignored(shell: Shell) -> dict[str, str]:
    """What a checkpoint may hold, see ``Family.ignored``."""
    rules = [f"(.*){rule}(.*)" for rule in shell.model._keys_to_ignore_on_load_unexpected or ()]
    rules += [rf"(.*\.)?{re.escape(name)}" for name in computed(shell.model)]
    return dict.fromkeys(rules, "transformers does not read it either: it follows from the configuration")
