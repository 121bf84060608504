"""A family for any decoder of ``transformers``, made from its torch module."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from optima_tpu.errors import UserError, one_line, some
from optima_tpu.method.layer_rules import kind_name
from optima_tpu.models.experts import Routed
from optima_tpu.models.family import DecoderConfig, Family, Positions
from optima_tpu.models.general.block import Block, Final, embed, expert_layers, to_numpy, windows
from optima_tpu.models.general.modules import computed, experts_of, stored
from optima_tpu.models.general.shell import BY_VALUES, Shell

_LENGTH = 8
"""Tokens of the window by which blocks are told apart."""

NEAR = 1e-4
"""The largest difference between a block here and in torch, relative to the largest output: some roundings of float32."""


class Layers(NamedTuple):
    """The layers of a block.

    Attributes:
      order: those that are pruned, in the order of the forward pass, those of experts last.
      reaches: for those of experts, the share of the tokens that each reads on average.
      narrow: those that end an expert.
      program: what the block computes, as text: blocks with equal ones are alike.
    """

    order: tuple[str, ...]
    reaches: Mapping[str, float]
    narrow: tuple[str, ...]
    program: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralConfig(DecoderConfig):
    """A model of torch as a family reads it.

    Attributes:
      shell: the model.
      alike: for every block, the first one that computes the same.
      checked: for each kind of blocks, the longest window at which it was compared with torch.
      reaches: for the layers of experts, the share of the tokens that each reads on average.
    """

    shell: Shell
    alike: tuple[int, ...]
    checked: dict[int, int]
    reaches: Mapping[str, float]

    @property
    def block_layers(self) -> tuple[int, ...]:
        return self.alike

    def positions(self, index: int, length: int) -> Positions:
        return Positions(arguments=arguments_of(self.shell, index, length))

    def reach(self, name: str) -> float:
        return self.reaches.get(kind_name(name), 1.0)

    def check(self, kind: int, length: int) -> None:
        """Compares a block with torch unless a window as long was compared.

        Raises:
          UserError: they differ; names the first layer whose input does.
        """
        if length <= self.checked.get(kind, 0):
            return
        for name, largest in differences(self, kind, length):
            if not largest < NEAR:
                raise self.shell.refusal(
                    f"the {name} of its block {kind} differs from torch by {largest:.2g} of the largest value at {length} "
                    f"tokens, more than {NEAR:g}"
                )
        self.checked[kind] = length


def arguments_of(shell: Shell, index: int, length: int) -> Any:
    """The ``arguments`` of ``block.windows`` for one window, in numpy."""
    tensors = tuple(to_numpy(each.detach()) for each in shell.catch(length)[index].tensors)
    return tensors, {name: to_numpy(each) for name, each in computed(shell.blocks[index]).items()}


def general_family(config: Any) -> Family:
    """The family of a configuration, made from the class that it names.

    Raises:
      UserError: the model does not fit what a family is; says why.
    """
    shell = Shell(config)
    layers = [_layers(shell, index) for index in range(len(shell.blocks))]
    alike = _alike(shell, layers)
    kinds, read = sorted(set(alike)), _config(shell, layers, alike)
    linears = tuple(dict.fromkeys(kind_name(name) for kind in kinds for name in layers[kind].order))
    attended = tuple(dict.fromkeys(_attended(shell, kind, layers[kind].order) for kind in kinds))
    shapes = {shell.outer(name): tuple(shell.model.get_parameter(name).shape) for name in shell.before}
    narrow = dict.fromkeys(name for kind in kinds for name in layers[kind].narrow)
    return Family(
        read_config=lambda config: read,
        block=Block,
        linears=linears,
        narrow=tuple(narrow),
        final=Final,
        roots=tuple(dict.fromkeys((shell.root, ""))),
        layers=shell.layers.removeprefix(shell.root),
        embedding=shell.outer(shell.embedding),
        embedding_extras=lambda config: shapes,
        embed=embed,
        head=shell.stored_as(shell.head),
        head_bias=shell.stored_as(shell.bias),
        attended=attended,
        experts="whose experts are run by its code in torch" if read.reaches else "which has no experts",
        shared=tuple(name for name in read.reaches if name not in narrow),
        ignored=_ignored(shell),
        # As lm-eval decides it too (lm_eval/models/huggingface.py): no configuration says it.
        needs_bos="gemma" in config.model_type,
        note=_note(shell, kinds, linears),
    )


def _config(shell: Shell, layers: Sequence[Layers], alike: tuple[int, ...]) -> GeneralConfig:
    table, head = shell.model.get_parameter(shell.embedding), shell.model.get_parameter(shell.head)
    if table.shape != head.shape:
        raise shell.refusal(f"its embedding is {list(table.shape)} and its head is {list(head.shape)}")
    return GeneralConfig(
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
        reaches={name: share for each in layers for name, share in each.reaches.items()},
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
    """Compares a block with torch, on a random window with random weights.

    Returns:
      the differences of the inputs of its layers, in the order of the forward pass, and of its output; in float32.
    """
    shell, module = config.shell, config.shell.blocks[kind]
    weights, x = _random_weights(module), _random_window(length, config.d_model)
    expected, inputs = _by_torch(shell, kind, weights, x)
    kept = shell.kept(kind)
    parameters = {name: array for path, weight in weights.items() for name, array in kept[path].split(weight.numpy()).items()}
    order: dict[str, str] = {}
    computed_here = jax.jit(lambda given, arguments, x: windows(shell, kind, None, given, arguments, order, x, {}))
    with jax.default_matmul_precision("highest"):
        output, our_inputs = computed_here(parameters, config.positions(kind, length).arguments, x.numpy())
    pairs = [(f"input of {name}", our_inputs[order[name]], inputs[name]) for name in order if name in inputs]
    mixed = bool(experts_of(module))
    return [
        Difference(name, _relative(np.asarray(ours), theirs.reshape(ours.shape).numpy(), mixed))
        for name, ours, theirs in [*pairs, ("output", output, expected)]
    ]


def _relative(ours: np.ndarray, theirs: np.ndarray, mixed: bool) -> float:
    """The largest difference, relative to the largest value.

    With experts it is the largest one of 98% of the tokens: where two experts fit a token equally well, rounding decides which
    one the token is sent to.
    """
    apart = np.abs(ours - theirs).max(axis=-1)
    return float((np.quantile(apart, 0.98) if mixed else apart.max()) / max(np.abs(theirs).max(), np.finfo(np.float32).tiny))


def _layers(shell: Shell, index: int) -> Layers:
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shell.shapes(index).items()}
    x = jax.ShapeDtypeStruct((1, _LENGTH, shell.width), np.float32)
    arguments = arguments_of(shell, index, _LENGTH)
    chosen: dict[str, int] = {}

    def traced() -> tuple[dict[str, str], Any]:
        order: dict[str, str] = {}

        def inner(parameters: Any, arguments: Any, x: Any) -> Any:
            output, inputs = windows(shell, index, None, parameters, arguments, order, x, {})
            chosen.update({name: read.chosen.shape[-1] for name, read in inputs.items() if isinstance(read, Routed)})
            return output, inputs

        return order, jax.make_jaxpr(inner)(shapes, arguments, x)

    try:
        before = len(shell.dense[index])
        order, program = traced()
        if len(shell.dense[index]) > before:  # now without the layers that were found to run twice
            order, program = traced()
    except UserError:
        raise
    except Exception as error:  # the code of any model
        why = f"cannot be traced ({type(error).__name__}: {one_line(error)[:200]})"
        by_values = isinstance(error, jax.errors.JAXTypeError | jax.errors.JAXIndexError)
        raise shell.refusal(f"its block {index} {BY_VALUES if by_values else why}") from error
    if not order:
        raise shell.refusal(f"no layer of its block {index} shows what it multiplies")
    block = shell.blocks[index]
    mixtures = {path: expert_layers(shell, index, path) for path in experts_of(block)}
    experts = {name: block.get_submodule(path).num_experts for path, names in mixtures.items() for name in names}
    reaches = {name: chosen[order[name.replace("*", "0")]] / count for name, count in experts.items()}
    constants = [hashlib.sha256(np.asarray(each).tobytes()).hexdigest() for each in program.consts]
    text = re.sub(r"0x[0-9a-f]+", "", str(program.jaxpr)) + str(constants)
    plain = tuple(name for name in order if kind_name(name) not in experts)
    return Layers((*plain, *experts), reaches, tuple(names[-1] for names in mixtures.values()), text)


def _alike(shell: Shell, layers: Sequence[Layers]) -> tuple[int, ...]:
    """For every block, the first one that computes the same.

    The two have the same program at a short length, and the same settings at any.
    """
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
    """The first layer whose input at a token depends on an earlier token.

    The last layer if there is none.

    Raises:
      UserError: an output depends on a later token.
    """
    module, x = shell.blocks[kind], _random_window(_LENGTH, shell.width)
    weights = _random_weights(module)
    earlier, later = x.clone(), x.clone()
    # Not by a constant, which the norm of a layer takes away.
    earlier[:, -2] *= -2
    later[:, -1] *= -2
    output, inputs = _by_torch(shell, kind, weights, x)
    if not _same(output[:, :-1], _by_torch(shell, kind, weights, later)[0][:, :-1]):
        raise shell.refusal(f"its block {kind} reads later tokens")
    others = _by_torch(shell, kind, weights, earlier)[1]
    rows = {name: (array.reshape(_LENGTH, -1)[-1], others[name].reshape(_LENGTH, -1)[-1]) for name, array in inputs.items()}
    # What comes behind this layer takes its input as known: layers must stand in the decoder's order as they do in the pass.
    plain = tuple(name for name in order if name in rows)
    ordered = tuple(sorted(plain, key=lambda name: list(map(int, re.findall(r"\d+", name)))))
    return next((name for name in plain if ordered == plain and not _same(*rows[name])), ordered[-1])


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    # Experts compute other numbers of tokens together, so their outputs are rounded differently.
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def _by_torch(
    shell: Shell, kind: int, weights: Mapping[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of a block in torch, and the inputs of its layers."""
    module, call, inputs = shell.blocks[kind], shell.catch(x.shape[1])[kind], dict[str, torch.Tensor]()

    def note(name: str, args: Any, keywords: Any) -> None:
        inputs[name] = args[0] if args else keywords["input"]

    with torch.no_grad(), contextlib.ExitStack() as stack:
        for path, (name, *_) in shell.linears(kind).items():
            layer = module.get_submodule(path)
            hook = layer.register_forward_pre_hook(
                lambda _, args, keywords, name=name: note(name, args, keywords), with_kwargs=True
            )
            stack.callback(hook.remove)
        args, kwargs = call.arguments(x, tuple(each.detach() for each in call.tensors))
        output = torch.func.functional_call(module, dict(weights), args, kwargs)
    return (output if isinstance(output, torch.Tensor) else output[0]).reshape(x.shape), inputs


def _random_window(length: int, width: int) -> torch.Tensor:
    return torch.randn((1, length, width), generator=torch.Generator().manual_seed(0))


def _random_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random parameters that take little memory.

    Each is a window that slides over a row of random numbers. Buffers stay as they are where the configuration gave them
    values: a block may rely on their order.
    """
    generator = torch.Generator().manual_seed(1)

    def made(shape: Sequence[int]) -> torch.Tensor:
        row = torch.randn(max(1, sum(shape)), generator=generator)
        row = 1 + 0.1 * row if len(shape) < 2 else row / max(shape) ** 0.5
        return row.as_strided(tuple(shape), (1,) * len(shape))

    buffers = {name: tensor for name, tensor in module.named_buffers() if tensor.any()}
    return {name: buffers[name] if name in buffers else made(tensor.shape) for name, tensor in stored(module).items()}


def _note(shell: Shell, kinds: Sequence[int], linears: Sequence[str]) -> str:
    """What runs the model, and what is not pruned."""
    matrices = {kind_name(name) for kind in kinds for name, shape in shell.shapes(kind).items() if len(shape) > 1}
    others = sorted(matrices - {f"{name}.weight" for name in linears})
    kept = f", and {some(others)} of the blocks" if others else ""
    return (
        f"the code of transformers' {shell.name}, by torchax: it prunes {', '.join(linears)}; embedding, norms, head{kept} stay "
        "as they are. It cannot write text"
    )


def _ignored(shell: Shell) -> dict[str, str]:
    """What a checkpoint may hold, see ``Family.ignored``."""
    rules = [f"(.*){rule}(.*)" for rule in shell.model._keys_to_ignore_on_load_unexpected or ()]
    rules += [rf"(.*\.)?{re.escape(name)}" for name in computed(shell.model)]
    reasons = dict.fromkeys(rules, "transformers does not read it either: it follows from the configuration")
    copies = [name for name in shell.model.all_tied_weights_keys if not name.startswith(f"{shell.path}.")]
    return reasons | {
        re.escape(shell.stored_as(name)): "a stored copy of a tied tensor, which the model reads instead" for name in copies
    }
