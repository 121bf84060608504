"""A block of torch as a flax module with the same names, by torchax."""

import contextlib
import dataclasses
import functools
import re
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
from jax.sharding import Mesh
from torchax import interop

from optima_tpu.errors import some
from optima_tpu.models.decoder import layer_of
from optima_tpu.models.experts import Routed, Sending, Way, mixed
from optima_tpu.models.family import Positions, ReadTensor, Shape
from optima_tpu.models.general.modules import experts_of, replaced
from optima_tpu.models.general.shell import TRACING, Shell
from optima_tpu.models.layers import project


@functools.cache
def _environment() -> Any:
    """The environment in which torchax computes."""
    # A trace that made it would hold its random key, which differs from process to process.
    with jax.ensure_compile_time_eval():
        return torchax.default_env()


@contextlib.contextmanager
def on_jax() -> Iterator[None]:
    """Runs what torch computes here on JAX, with torch's dtype promotion.

    Tensors that are made without a device are on JAX too.
    """
    with TRACING, torch.no_grad(), _environment(), torch.device("jax"), jax.numpy_dtype_promotion("standard"):
        yield


class TorchParameters(nnx.Module):
    """Zero parameters by the names in torch, "attn.c_attn.weight".

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


def windows(
    shell: Shell,
    index: int,
    mesh: Mesh | None,
    parameters: Mapping[str, Array],
    arguments: tuple[Sequence[Array], Mapping[str, Array]],
    shared: dict[str, str],
    x: Array,
    known: Mapping[str, Array],
) -> tuple[Array, dict[str, Any]]:
    """Runs a block of a shell; returns its output and its layers' inputs.

    Windows x are [batch, length, d_model]. An input is [batch, length, d_in], or :class:`~optima_tpu.models.experts.Routed`.

    Args:
      mesh: the mesh that the block runs on; None for one device.
      parameters: by their names in a checkpoint.
      arguments: the other tensors that the model gives to the block for one window, and the block's buffers.
      shared: gets for every layer, in their order, the first one that reads the same array. The input has that one's name.
      known: inputs of layers, which are read instead of those that are computed.
    """
    program = _program(shell, index, mesh, frozenset(shell.dense[index]))
    output, inputs = program.run(parameters, arguments, x, known)
    shared.update(program.shared[frozenset(known)])
    return output, inputs


class _Program:
    """The computation of a block; all programs with the block share its trace.

    Attributes:
      run: the parameters, arguments, windows and known inputs of :func:`windows` -> what it returns.
      shared: by the names of the known inputs, the ``shared`` of :func:`windows`.
    """

    def __init__(self, shell: Shell, index: int, mesh: Mesh | None):
        self.shell, self.index, self.mesh, self.module = shell, index, mesh, shell.blocks[index]
        self.shared = dict[frozenset[str], dict[str, str]]()
        self.run = jax.jit(self._trace, inline=True)  # torch's code is slow to trace

    def _trace(self, parameters: Any, arguments: Any, x: Array, known: Mapping[str, Array]) -> tuple[Array, dict[str, Any]]:
        shared: dict[str, str] = {}

        def window(x: Array, known: Mapping[str, Array]) -> tuple[Array, dict[str, Array], dict[str, Routed]]:
            run = _Pass(self, parameters, shared, known)
            output = run.output(arguments, x)
            return output, {name: array.reshape(x.shape[0], -1) for name, array in run.inputs.items()}, run.routed

        output, inputs, routed = jax.vmap(window, axis_name=_WINDOWS, out_axes=(0, 0, None))(x, known)
        self.shared[frozenset(known)] = shared  # at last: another thread may trace the same at another length
        return output, inputs | routed


@functools.lru_cache(32)
def _program(shell: Shell, index: int, mesh: Mesh | None, dense: frozenset[str]) -> _Program:
    """The program of a block in which ``dense`` layers run more than once."""
    return _Program(shell, index, mesh)


class _Pass:
    """One pass of a window [length, d_model]; arguments as in :func:`windows`.

    Attributes:
      inputs: what its layers read.
      routed: what its experts read, of all windows.
    """

    def __init__(self, program: _Program, parameters: Mapping[str, Array], shared: dict[str, str], known: Mapping[str, Array]):
        self.program, self.parameters, self.shared, self.known = program, parameters, shared, known
        self.inputs, self.routed = dict[str, Array](), dict[str, Routed]()

    def output(self, arguments: tuple[Sequence[Array], Mapping[str, Array]], x: Array) -> Array:
        """The output of the block."""
        (tensors, buffers), shell, index = arguments, self.program.shell, self.program.index
        call, follows, mixtures = shell.catch(x.shape[0])[index], shell.follows[index], experts_of(self.program.module)
        cast = (_cast(array, x.dtype) if follow else array for array, follow in zip(tensors, follows, strict=True))
        joined_parameters = {
            name: kept.joined(self.parameters)
            for name, kept in shell.kept(index).items()
            if not any(name.startswith(f"{path}.") for path in mixtures)
        }
        with on_jax(), contextlib.ExitStack() as stack:
            for path, names in shell.linears(index).items():
                layer = self.program.module.get_submodule(path)
                stack.enter_context(replaced(layer, functools.partial(self._linear, path, names, layer)))
            for path, mixture in mixtures.items():
                stack.enter_context(replaced(mixture, functools.partial(self._experts, path, mixture, x.shape[0])))
            args, kwargs = call.arguments(interop.torch_view(x[None]), tuple(map(interop.torch_view, cast)))
            output = torch.func.functional_call(
                self.program.module, interop.torch_view({**joined_parameters, **buffers}), args, kwargs
            )
            output = interop.jax_view(output if isinstance(output, torch.Tensor) else output[0])
        return output.reshape(x.shape)

    def _linear(self, path: str, names: tuple[str, ...], layer: Any, input: torch.Tensor) -> torch.Tensor:
        array = interop.jax_view(input)
        if names[0] in self.shared:
            self.program.shell.dense[self.program.index].add(path)
        if names[0] in self.known:
            array = self.known[names[0]].reshape(array.shape)
        first = next((first for first in self.inputs if self.inputs[first] is array), names[0])
        self.shared.update(dict.fromkeys(names, first))
        self.inputs.setdefault(first, array)
        matrices = [self.parameters[f"{name}.weight"] for name in names]
        product = project(array, matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices))
        bias = getattr(layer, "bias", None)
        return interop.torch_view(product if bias is None else product + interop.jax_view(bias).astype(product.dtype))

    def _experts(
        self, path: str, module: Any, length: int, hidden_states: torch.Tensor, top_k_index: Any, top_k_weights: Any
    ) -> torch.Tensor:
        """Runs a module of experts on all windows, sorted together."""
        shell, size = self.program.shell, hidden_states.shape[-1]
        x, chosen, shares = map(interop.jax_view, (hidden_states, top_k_index, top_k_weights))
        x, experts = x.reshape(-1, size), int(module.num_experts)
        if len(x) != length or module.has_post_expert_norm:
            raise shell.refusal(f"its {path} compute other rows than tokens, or normalise them")
        shares = jnp.where(chosen < experts, shares, 0)  # a token may be sent to nobody
        x, chosen, shares = (jax.lax.all_gather(array, _WINDOWS) for array in (x, chosen.astype(jnp.int32), shares))
        layers = expert_layers(shell, self.program.index, path)
        weights = [self._stacked(f"{name}.weight", experts) for name in layers]
        biases = [self._stacked(f"{name}.bias", experts) for name in layers if module.has_bias]
        way, sent = Way(_Neurons(module)), Sending(chosen, shares)
        outputs, wide, narrow = mixed(self.program.mesh, way, x, sent, weights, biases)
        for name in layers:
            first, read = (layers[-1], narrow) if name == layers[-1] else (layers[0], wide)
            first = first.replace("*", "0")
            self.routed[first] = read
            self.shared.update((name.replace("*", str(number)), first) for number in range(experts))
        own_output = jax.lax.dynamic_index_in_dim(outputs, jax.lax.axis_index(_WINDOWS), keepdims=False)
        return interop.torch_view(own_output.reshape(tuple(hidden_states.shape)))

    def _stacked(self, name: str, experts: int) -> Array:
        """A parameter of all experts."""
        return jnp.stack([self.parameters[name.replace("*", str(number))] for number in range(experts)])


@dataclasses.dataclass(frozen=True)
class _Neurons:
    """What a module of experts computes between its layers."""

    module: Any

    def __call__(self, *outputs: Array) -> Array:
        joined = interop.torch_view(jnp.concatenate(outputs, axis=-1))
        return interop.jax_view(self.module._apply_gate(joined) if self.module.has_gate else self.module.act_fn(joined))


def expert_layers(shell: Shell, index: int, path: str) -> tuple[str, ...]:
    """The layers of a block's experts, with ``*`` for their numbers.

    The layer that ends an expert is the last one.

    Args:
      path: of the module that holds them.
    """
    kept, module = shell.kept(index), shell.blocks[index].get_submodule(path)
    joined = [kept[f"{path}.{name}"] for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")]
    wide, narrow = ([part.removesuffix(".weight") for part in each.stack.parts] for each in joined)
    expected = 1 + (module.has_gate and module.is_concatenated), 1
    if (len(wide), len(narrow)) != expected or not all(re.search(r"(^|\.)experts\.\*\.\w+$", name) for name in (*wide, *narrow)):
        raise shell.refusal(f"a checkpoint holds its {path} otherwise than expert by expert: {some([*wide, *narrow])}")
    return (*wide, *narrow)


_WINDOWS = "windows"
"""The axis of the windows that a block computes together."""


def _cast(array: Array, dtype: Any) -> Array:
    """Casts an array, clipped to the finite range of the dtype."""
    # Masks hold the smallest float32. If that were rounded to infinity, a row that is masked as a whole would have no softmax.
    limit = jnp.finfo(dtype)
    return jnp.clip(array, limit.min, limit.max).astype(dtype)


class Block(TorchParameters):
    """The block ``config.kind`` of a shell, for x [batch, length, d_model].

    ``vmap`` makes a batch of one window. So what the model gives to a block is what it gives for one window, in any shape.
    """

    def __init__(self, config: Any):
        self.shell, self.kind, self.mesh = config.shell, config.kind, None
        super().__init__(config.shell.shapes(config.kind))

    def __call__(self, x: Array, positions: Positions) -> Array:
        names = [name for names in self.shell.linears(self.kind).values() for name in names]
        known = {name: layer.known[...] for name in names if hasattr(layer := layer_of(self, name), "known")}
        shared: dict[str, str] = {}
        output, inputs = windows(self.shell, self.kind, self.mesh, self.arrays(), positions.arguments, shared, x, known)
        for name, first in shared.items():
            layer_of(self, name).sow(nnx.Intermediate, "x", inputs[first])
        return output


class Final(TorchParameters):
    """What stands between the last block of a shell and its head."""

    def __init__(self, config: Any):
        self.shell = config.shell
        super().__init__({self.shell.outer(name): self.shell.model.get_parameter(name).shape for name in self.shell.final})

    def __call__(self, x: Array) -> Array:
        # The idle ones may be computed with: an unused summary of the text. The compiler drops that.
        parameters = {name: jnp.zeros(self.shell.model.get_parameter(name).shape) for name in self.shell.idle}
        parameters |= {name: self.arrays()[self.shell.outer(name)] for name in self.shell.final}
        tokens = interop.torch_view(x.reshape(-1, x.shape[-1]))
        output = interop.jax_view(self.shell.leaving(tokens, interop.torch_view(parameters), on_jax))
        return output.reshape(*x.shape[:-1], -1)


def embed(config: Any, read: ReadTensor, tokens: Array | np.ndarray, positions: Array | np.ndarray) -> Array | np.ndarray:
    """The hidden states before the first block, see ``Family.embed``.

    Torch computes them on the host, torchax in a traced program.
    """
    shell: Shell = config.shell
    arrays = {name: read(shell.outer(name)) for name in (shell.embedding, *shell.before)}
    if isinstance(tokens, np.ndarray):
        parameters = {name: to_torch(np.asarray(array)) for name, array in arrays.items()}
        with torch.no_grad():
            # Window by window: the model makes a mask for each.
            windows = [shell.entering(torch.from_numpy(each[None].astype(np.int64)), parameters) for each in tokens]
        empty = np.zeros((0, tokens.shape[1], config.d_model), arrays[shell.embedding].dtype)
        return np.concatenate([empty, *(to_numpy(each.flatten(2)) for each in windows)])

    def window(ids: Array) -> Array:
        with on_jax():
            return interop.jax_view(shell.entering(interop.torch_view(ids[None]), interop.torch_view(arrays))[0].flatten(1))

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
