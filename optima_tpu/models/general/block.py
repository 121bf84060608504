"""A block of torch as a module of flax: the same names, and a function of JAX arrays, by torchax."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
import torchax
from flax import nnx
from jax import Array
from torchax import interop

from optima_tpu.models.family import Positions, ReadTensor, Shape
from optima_tpu.models.general.shell import Shell, layers_of, replaced
from optima_tpu.models.layers import project

_TRACING = threading.RLock()
"""Held while a module of torch is traced, since its layers are replaced meanwhile: programs are compiled in several threads."""


@functools.cache
def _environment() -> Any:
    """What torchax computes in. A trace that made it would hold its random key, which differs from process to process."""
    with jax.ensure_compile_time_eval():
        return torchax.default_env()


@contextlib.contextmanager
def on_jax() -> Iterator[None]:
    """What torch computes here runs on JAX; tensors that are made without a device too. Dtypes meet as they do in torch."""
    with _TRACING, torch.no_grad(), _environment(), torch.device("jax"), jax.numpy_dtype_promotion("standard"):
        yield


class TorchParameters(nnx.Module):
    """Parameters by the names that torch has for them, "attn.c_attn.weight"; they are zeros.

    Args:
      shapes: by these names.
    """

    def __init__(self, shapes: Mapping[str, Shape]):
        inner: dict[str, dict[str, Shape]] = {}
        for name, shape in shapes.items():
            first, _, rest = name.partition(".")
            if rest:
                inner.setdefault(first, {})[rest] = shape
            else:
                setattr(self, first, nnx.Param(jnp.zeros(shape)))
        for first, those in inner.items():
            setattr(self, first, TorchParameters(those))

    def arrays(self) -> dict[str, Array]:
        """The parameters by their names."""
        return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param))}


@dataclasses.dataclass(frozen=True)
class Traced:
    """The computation of a block of a shell."""

    shell: Shell
    index: int

    @property
    def module(self) -> torch.nn.Module:
        return self.shell.blocks[self.index]

    def window(
        self,
        parameters: Mapping[str, Array],
        arguments: tuple[Sequence[Array], Mapping[str, Array]],
        shared: dict[str, str],
        x: Array,
        known: Mapping[str, Array],
    ) -> tuple[Array, dict[str, Array]]:
        """The block of one window [length, d_model]: its output, and the inputs [length, d_in] of its layers.

        Args:
          arguments: the other tensors that the model gives to the block, and the block's buffers.
          shared: gets for every layer, in their order, the first one that reads the same array. That one's name has the input.
          known: inputs of layers, which are read instead of those that are computed.
        """
        call, follows = self.shell.catch(x.shape[0])[self.index], self.shell.follows[self.index]
        inputs: dict[str, Array] = {}

        def run(name: str, layer: Any, given: torch.Tensor) -> torch.Tensor:
            array = interop.jax_view(given)
            if name in shared:
                raise self.shell.refusal(f"the layer {name} of its block {self.index} runs twice")
            if name in known:
                array = known[name].reshape(array.shape)
            shared[name] = next((first for first in inputs if inputs[first] is array), name)
            inputs.setdefault(shared[name], array)
            product = project(array, interop.jax_view(layer.weight))
            bias = getattr(layer, "bias", None)
            return interop.torch_view(product if bias is None else product + interop.jax_view(bias).astype(product.dtype))

        tensors, buffers = arguments
        cast = (_cast(array, x.dtype) if follow else array for array, follow in zip(tensors, follows, strict=True))
        with on_jax(), contextlib.ExitStack() as stack:
            for name, layer in layers_of(self.module).items():
                stack.enter_context(replaced(layer, functools.partial(run, name, layer)))
            args, kwargs = call.arguments(interop.torch_view(x[None]), tuple(map(interop.torch_view, cast)))
            held = interop.torch_view({**parameters, **buffers})
            output = torch.func.functional_call(self.module, held, args, kwargs)
            output = interop.jax_view(output if isinstance(output, torch.Tensor) else output[0])
        return output[0], {name: array.reshape(x.shape[0], -1) for name, array in inputs.items()}


def _cast(array: Array, dtype: Any) -> Array:
    """Masks hold the smallest float32, which other dtypes round to infinity: then a row that is masked as a whole has no softmax."""
    limit = jnp.finfo(dtype)
    return jnp.clip(array, limit.min, limit.max).astype(dtype)


class Block(TorchParameters):
    """The block ``config.kind`` of a shell: x [batch, length, d_model] to the same.

    ``vmap`` makes a batch of one window. So what the model gives to a block is what it gives for one window, in any shape.
    """

    def __init__(self, config: Any):
        self.traced = Traced(config.shell, config.kind)
        super().__init__(config.shell.shapes(self.traced.module))

    def __call__(self, x: Array, positions: Positions) -> Array:
        layers = {name: functools.reduce(getattr, name.split("."), self) for name in layers_of(self.traced.module)}
        known = {name: layer.known[...] for name, layer in layers.items() if hasattr(layer, "known")}
        shared: dict[str, str] = {}
        window = functools.partial(self.traced.window, self.arrays(), positions.arguments, shared)
        output, inputs = jax.vmap(window)(x, known)
        for name, first in shared.items():
            layers[name].sow(nnx.Intermediate, "x", inputs[first])
        return output


class Final(TorchParameters):
    """What stands between the last block of a shell and its head."""

    def __init__(self, config: Any):
        self.shell = config.shell
        inside = {name: self.shell.model.get_submodule(name) for name in self.shell.behind}
        named = {
            f"{name}.{inner}": shape for name, module in inside.items() for inner, shape in self.shell.shapes(module).items()
        }
        super().__init__({name.removeprefix(self.shell.root): shape for name, shape in named.items()})

    def __call__(self, x: Array) -> Array:
        arrays, output = self.arrays(), interop.torch_view(x)
        with on_jax():
            for name in self.shell.behind:
                prefix = f"{name.removeprefix(self.shell.root)}."
                own = {each.removeprefix(prefix): array for each, array in arrays.items() if each.startswith(prefix)}
                output = torch.func.functional_call(self.shell.model.get_submodule(name), interop.torch_view(own), (output,))
        return interop.jax_view(output)


def embed(config: Any, read: ReadTensor, tokens: Array | np.ndarray, places: Array | np.ndarray) -> Array | np.ndarray:
    """The hidden states before the first block, see ``Family.embed``: by torch on the host, by torchax in a traced program."""
    shell: Shell = config.shell
    held = {name: read(name.removeprefix(shell.root)) for name in (shell.embedding, *shell.before)}
    if isinstance(tokens, np.ndarray):
        parameters = {name: to_torch(np.asarray(array)) for name, array in held.items()}
        with torch.no_grad():
            # Window by window: the model makes a mask for each.
            windows = [shell.entering(torch.from_numpy(each[None].astype(np.int64)), parameters) for each in tokens]
        empty = np.zeros((0, tokens.shape[1], config.d_model), held[shell.embedding].dtype)
        return np.concatenate([empty, *map(to_numpy, windows)])

    def window(ids: Array) -> Array:
        with on_jax():
            return interop.jax_view(shell.entering(interop.torch_view(ids[None]), interop.torch_view(held)))[0]

    return jax.vmap(window)(tokens)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same values; torch takes no bfloat16 of numpy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same values."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
