"""A model of ``transformers`` without its weights.

It says where its blocks stand, what surrounds them, and what it gives to each. All parameters of the blocks stay on the meta
device. The other parameters are zeros that take no memory.
"""

import collections
import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree

from optima_tpu.errors import UserError, one_line, some
from optima_tpu.models.family import Shape, Stack
from optima_tpu.models.general.kept import Joined, Names
from optima_tpu.models.general.modules import blocks_of, experts_of, multiplies, refusal, replaced, stored, without_weights


class BlockCall(NamedTuple):
    """What a model gives to a block for one window.

    Attributes:
      tensors: the arguments that are tensors, apart from the hidden states.
      indices: their indices among ``leaves``.
      hidden: the index of the hidden states.
      leaves: all arguments, flat, with None in the place of a tensor.
      spec: how the leaves become arguments again.
      inner: the shape of the hidden states of one token.
    """

    tensors: tuple[torch.Tensor, ...]
    indices: tuple[int, ...]
    hidden: int
    leaves: tuple[Any, ...]
    spec: Any
    inner: tuple[int, ...]

    def arguments(self, hidden: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, Any]:
        """(args, kwargs) of the block for [windows, length, width] states."""
        leaves, hidden = list(self.leaves), hidden.reshape(*hidden.shape[:2], *self.inner)
        for index, tensor in zip((self.hidden, *self.indices), (hidden, *tensors), strict=True):
            leaves[index] = tensor
        return _pytree.tree_unflatten(leaves, self.spec)


class Logits(NamedTuple):
    """The logits of products x with the head: ``cap tanh(scale x / cap)``.

    They are ``scale x`` where the cap is None.
    """

    scale: float
    cap: float | None


class Shell:
    """A causal language model of ``transformers`` without its weights.

    Attributes:
      name: its class.
      model: the module; attention is eager, since other implementations may drop the mask where they mask by themselves.
      path: the name of the list of its blocks.
      blocks: the blocks.
      embedding, head, bias: names of the embedding's and the head's weight, and of the head's bias.
      before: the parameters that the hidden states of the first block come from, and the idle ones.
      final: the parameters between the last block and the head.
      idle: those that neither the hidden states of the first block nor the logits come from.
      logits: what becomes of the products with the head.
      inner: the shape of the hidden states of one token: more than one number where a model has several streams.
      width: the numbers of the hidden states of one token.
      tied: whether the head is the embedding.
      names: the names of a checkpoint's tensors.
      layers: what their names in block i begin with is ``layers.format(i)``.
      dense: for each block, the layers that run more than once, which are not pruned.
    """

    def __init__(self, config: Any):
        self.name = (config.architectures or [type(config).__name__])[0]
        self.model = without_weights(self.name, config)
        self.names, self._kept = Names(self.model), dict[int, dict[str, Joined]]()
        self.dense: dict[int, set[str]] = collections.defaultdict(set)
        self.path, self.blocks = blocks_of(self.name, self.model)
        self._multiply = {
            kind for kind, layer in {type(each): each for each in self.blocks.modules()}.items() if multiplies(layer)
        }
        table, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if not isinstance(table, torch.nn.Embedding) or not isinstance(head, torch.nn.Linear):
            raise self.refusal("it has no table of embeddings, or no layer that makes logits")
        names = {id(module): name for name, module in self.model.named_modules()}
        self.embedding, self.head, self._head = f"{names[id(table)]}.weight", f"{names[id(head)]}.weight", head
        self._returned: list[Any] = []
        self._caught: dict[int, tuple[BlockCall, ...]] = {}
        if not (calls := self.catch(2)):  # also finds what each block returns
            raise self.refusal(f"the longest list of its modules, {self.path}, does not run for text")
        self.inner = calls[0].inner
        self.width = math.prod(self.inner)
        self.tied = self.head in self.model.all_tied_weights_keys
        bias = self.head.replace("weight", "bias")
        self.bias = self.model.all_tied_weights_keys.get(bias, bias)
        outer = {name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.path}.")}
        outer -= {self.head, self.bias, *self.model.all_tied_weights_keys}
        self.final, self.idle = self._behind_and_nowhere(sorted(outer))
        self.before = tuple(sorted(outer - {*self.final, self.embedding}))
        self.logits = self._logits()
        self.layers = self._layers()

    def refusal(self, why: str) -> UserError:
        """The error for a model that the general way cannot run."""
        return refusal(self.name, why)

    def stored_as(self, name: str) -> str:
        """The name of a parameter behind or before the blocks in a checkpoint.

        Raises:
          UserError: transformers makes the parameter of several tensors.
        """
        (stored_name, *others) = self._stack(name).parts
        if others or "*" in stored_name:
            raise self.refusal(f"its {name} is made of several tensors of a checkpoint")
        return stored_name

    def _stack(self, name: str) -> Stack:
        try:
            return self.names.of(name)
        except ValueError as error:
            raise self.refusal(f"a checkpoint holds its {name} as a part of a tensor, or in another order") from error

    def _layers(self) -> str:
        """The prefix of a block's stored names, with ``{}`` for its number."""
        first = self._stack(f"{self.path}.0.{next(iter(stored(self.blocks[0])))}").parts[0]
        before, separator, _ = first.partition(".0.")
        if not separator:
            raise self.refusal(f"the names of its blocks have no number in a checkpoint: {first}")
        return before + ".{}."

    def kept(self, index: int) -> dict[str, Joined]:
        """What a checkpoint holds for each parameter of a block, by name.

        Keys are names in the block; stored names come without the block's prefix.

        The names are those in the block, and in the checkpoint those behind the block's prefix.

        Raises:
          UserError: the checkpoint holds something else than this program knows.
        """
        if index not in self._kept:
            self._kept[index] = self._find_kept(index)
        return self._kept[index]

    def _find_kept(self, index: int) -> dict[str, Joined]:
        prefix, kept = self.layers.format(index), dict[str, Joined]()
        for name, tensor in stored(self.blocks[index]).items():
            stack = self._stack(f"{self.path}.{index}.{name}")
            if strange := next((part for part in stack.parts if not part.startswith(prefix)), None):
                raise self.refusal(f"its {self.path}.{index}.{name} is called {strange} in a checkpoint")
            kept[name] = Joined(
                Stack(tuple(part.removeprefix(prefix) for part in stack.parts), stack.turned), tuple(tensor.shape)
            )
        return kept

    def linears(self, index: int) -> dict[str, tuple[str, ...]]:
        """A block's pruned layers: path in the module -> names as stored.

        A module may be several matrices of a checkpoint, one behind the other along the outputs.
        """
        kept = self.kept(index)
        layers: dict[str, tuple[str, ...]] = {}
        for path, layer in self.blocks[index].named_modules():
            if type(layer) not in self._multiply:
                continue
            weight = kept[f"{path}.weight"]
            names = tuple(part.removesuffix(".weight") for part in weight.stack.parts)
            matrices = [f"{name}.weight" for name in names] == weight.members()
            if matrices and path not in self.dense[index] and not self._routes(index, path):
                layers[path] = names
        return layers

    def _routes(self, index: int, path: str) -> bool:
        """Whether a layer is a router of experts, or a gate of one output."""
        outputs = sum(first for first, _ in self.kept(index)[f"{path}.weight"].shapes().values())
        mixtures = {name.rpartition(".")[0]: module.num_experts for name, module in experts_of(self.blocks[index]).items()}
        inside = (experts for name, experts in mixtures.items() if "router" in path or (name and path.startswith(f"{name}.")))
        return outputs == 1 or outputs in inside

    @property
    def head_bias(self) -> bool:
        """Whether the head has a bias."""
        return self._head.bias is not None

    @functools.cached_property
    def root(self) -> str:
        """The prefix of all names in a checkpoint but the head's."""
        prefix = f"{self.model.base_model_prefix}."
        names = [self.layers, *(self.stored_as(name) for name in (self.embedding, *self.before, *self.final))]
        return prefix if all(name.startswith(prefix) for name in names) else ""

    def outer(self, name: str) -> str:
        """The stored name, after the root, of a parameter outside blocks."""
        return self.stored_as(name).removeprefix(self.root)

    def catch(self, length: int) -> tuple[BlockCall, ...]:
        """What each block gets for a window of ``length``; no block runs."""
        if length not in self._caught:
            if len(self._caught) == _LENGTHS:
                del self._caught[next(iter(self._caught))]
            self._caught[length] = self._catch(length)
        return self._caught[length]

    @functools.cached_property
    def follows(self) -> tuple[tuple[bool, ...], ...]:
        """For each block, which call tensors follow the states' dtype."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        narrow = {name: each.to(torch.bfloat16) for name, each in parameters if not name.startswith(f"{self.path}.")}
        calls = zip(self.catch(2), self._catch(2, narrow), strict=True)
        return tuple(tuple(a.dtype != b.dtype for a, b in zip(wide.tensors, other.tensors, strict=True)) for wide, other in calls)

    def shapes(self, index: int) -> dict[str, Shape]:
        """Stored shapes of a block's parameters; layers are [d_out, d_in]."""
        return {name: shape for kept in self.kept(index).values() for name, shape in kept.shapes().items()}

    def _catch(self, length: int, parameters: Mapping[str, torch.Tensor] = {}) -> tuple[BlockCall, ...]:
        """As :meth:`catch`.

        Raises:
          UserError: a block reads something that depends on the tokens beside the hidden states.
        """
        calls: list[BlockCall] = []
        hidden: list[torch.Tensor] = []

        def instead(index: int, args: Any, kwargs: Any) -> Any:
            entering = _entering(args, kwargs)
            if entering.ndim < 3 or entering.shape[:2] != (1, length):
                raise self.refusal(f"its block {index} reads hidden states of the shape {tuple(entering.shape)} for one window")
            if hidden and entering is not hidden[0]:
                raise self.refusal(f"it changes the hidden states between the blocks {index - 1} and {index}")
            hidden[:] = [entering]
            calls.append(self._call(index, args, kwargs, entering))
            if len(self._returned) == index:
                self._returned.append(self._returns(index, args, kwargs))
            if index == len(self.blocks) - 1:
                raise _Stop
            return self._output(index, entering)

        self.run(torch.arange(length)[None] % self.model.get_input_embeddings().num_embeddings, instead, parameters)
        return tuple(calls)

    def entering(self, tokens: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The hidden states that the first block gets for ``tokens``."""
        caught: list[torch.Tensor] = []

        def instead(index: int, args: Any, kwargs: Any) -> Any:
            caught.append(_entering(args, kwargs))
            raise _Stop

        self.run(tokens, instead, parameters)
        return caught[0]

    def run(
        self, tokens: torch.Tensor, instead: Callable[[int, Any, Any], Any], parameters: Mapping[str, torch.Tensor] = {}
    ) -> Any:
        """The model's output, with ``instead`` in the place of each block.

        Tokens are [windows, length]. Calls ``instead(index, args, kwargs)``; returns None if that raised ``_Stop``.
        """
        following = itertools.count()

        def once(index: int, args: Any, kwargs: Any) -> Any:
            if index != next(following):
                raise self.refusal("it runs its blocks in another order than they stand in, or more than once")
            return instead(index, args, kwargs)

        with TRACING, contextlib.ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced(block, lambda *args, index=index, **kwargs: once(index, args, kwargs)))
            # With its buffers, which then are afterwards what they were: a model may turn them into the dtype of its weights.
            tensors = {**dict(self.model.named_buffers()), **parameters}
            try:
                return torch.func.functional_call(self.model, tensors, (), {"input_ids": tokens, "use_cache": False})
            except _Stop:
                return None
            except UserError:
                raise
            except Exception as error:  # the code of any model
                raise self.refusal(f"what surrounds its blocks does not run ({one_line(error)[:200]})") from error

    def _call(self, index: int, args: Any, kwargs: Any, hidden: torch.Tensor) -> BlockCall:
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        hidden_index = next(at for at, leaf in enumerate(leaves) if leaf is hidden)
        indices = tuple(at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and at != hidden_index)
        for at in indices:
            if leaves[at].is_meta:
                raise self.refusal(f"its block {index} reads what an earlier block returned beside the hidden states")
            if leaves[at].requires_grad:
                raise self.refusal(f"its block {index} reads weights or embeddings of the model beside the hidden states")
        rest = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        return BlockCall(tuple(leaves[at] for at in indices), indices, hidden_index, rest, spec, tuple(hidden.shape[2:]))

    def _returns(self, index: int, args: Any, kwargs: Any) -> Any:
        """What a block returns behind the hidden states, on meta, or None."""
        block = self.blocks[index]
        buffers = {name: buffer.to("meta") for name, buffer in block.named_buffers()}
        args, kwargs = _pytree.tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        forward = block.__dict__.pop("forward")
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for module in experts_of(block).values():
                    # Which expert has tokens depends on their values, but the shape of the output does not.
                    stack.enter_context(replaced(module, lambda hidden, *args, **kwargs: torch.empty_like(hidden)))
                output = torch.func.functional_call(block, buffers, args, kwargs)
        except Exception as error:  # the code of any model
            by_values = isinstance(error, NotImplementedError)  # what is not computed without values, but for Tensor.item
            why = f"does not run without values ({one_line(error)[:200]})"
            raise self.refusal(f"its block {index} {BY_VALUES if by_values else why}") from error
        finally:
            block.forward = forward
        return None if isinstance(output, torch.Tensor) else tuple(output[1:])

    def _output(self, index: int, hidden: torch.Tensor) -> Any:
        """What a block would return, with these hidden states."""
        return hidden if self._returned[index] is None else (hidden, *self._returned[index])

    def leaving(
        self,
        hidden: torch.Tensor,
        parameters: Mapping[str, torch.Tensor] = {},
        computing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> torch.Tensor:
        """What the head reads of states [tokens, width] behind the last block.

        Args:
          parameters: those that stand behind the last block.
          computing: what to enter before they are used; what comes before the last block runs outside of it.
        """
        caught: list[torch.Tensor] = []

        def head(x: torch.Tensor) -> torch.Tensor:
            caught.append(x.reshape(-1, x.shape[-1]))
            raise _Stop

        with replaced(self._head, head):
            self._behind(hidden, parameters, computing)
        if not caught or len(caught[0]) != len(hidden):
            raise self.refusal("its head does not read the hidden states of each token")
        return caught[0]

    def _behind(
        self,
        hidden: torch.Tensor,
        parameters: Mapping[str, torch.Tensor] = {},
        computing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Any:
        """The model's output for hidden states behind the last block.

        They are [tokens, width]; each token is a window of its own.
        """
        with contextlib.ExitStack() as stack:

            def instead(index: int, args: Any, kwargs: Any) -> Any:
                if index < len(self.blocks) - 1:
                    return self._output(index, _entering(args, kwargs))
                stack.enter_context(computing())
                return self._output(index, hidden.reshape(-1, 1, *self.inner))

            return self.run(torch.zeros((len(hidden), 1), dtype=torch.long), instead, parameters)

    def _behind_and_nowhere(self, outer: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Which parameters stand behind the last block, and which are idle."""
        parameters = [self.model.get_parameter(name) for name in outer]
        hidden = self.leaving(torch.randn((2, self.width), requires_grad=True)), self.entering(torch.arange(2)[None], {})
        if not all(each.requires_grad for each in hidden):
            raise self.refusal("its first block does not read its embedding, or its head does not read its last block")
        behind, before = (
            {
                name
                for name, grad in zip(outer, torch.autograd.grad(each.sum(), parameters, allow_unused=True))
                if grad is not None
            }
            for each in hidden
        )
        if both := sorted(behind & before):
            raise self.refusal(f"it reads {some(both)} before its blocks and behind them")
        return tuple(sorted(behind)), tuple(sorted({*outer} - behind - before))

    def _logits(self) -> Logits:
        """Measures the scale and cap of logits with a few values."""
        values = torch.tensor([1e-3, -1e-3, 0.5, -2.0, 30.0, 1e3, 1e30, -1e30])

        def head(x: torch.Tensor) -> torch.Tensor:
            return values.repeat(*x.shape[:2], self._head.out_features)[..., : self._head.out_features]

        with replaced(self._head, head):
            made = self._behind(torch.zeros((1, self.width)))
        outputs = made.logits[0, -1, : len(values)].detach().float()
        scale = float(outputs[0] / values[0])
        capped = bool(outputs[6].abs() < 1e6)
        cap = float(outputs[6].abs()) if capped else None
        expected = cap * torch.tanh(scale * values / cap) if cap else scale * values
        if made.logits.shape[-1] != self._head.out_features or not torch.allclose(outputs, expected, rtol=1e-4):
            raise self.refusal("it computes something else behind its head than a factor and a soft cap")
        return Logits(1.0 if abs(scale - 1) < 1e-4 else scale, cap)


TRACING = threading.RLock()
"""Held while layers or blocks of a model are replaced: programs are compiled in several threads."""

BY_VALUES = "looks at values to choose what it computes, which no compiled program can"
"""What is wrong with a block, behind its number."""

_LENGTHS = 4
"""Lengths of windows whose arguments are kept: a run has two, and a trace one of its own."""


class _Stop(Exception):
    """Ends a pass of the model when all that is wanted of it is known."""


def _entering(args: Any, kwargs: Any) -> Any:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]
