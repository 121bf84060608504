"""A ``transformers`` model without weights, its blocks and their modules."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from optima_tpu.errors import UserError, refusing

LAYERS = (torch.nn.Linear, Conv1D)
"""The classes of the layers that are pruned. The weight of a Conv1D is [d_in, d_out]."""


def multiplies(layer: Any) -> bool:
    """Whether a module is a ``Conv1D`` or computes what a ``Linear`` does."""
    if not isinstance(layer, LAYERS) or type(layer) in LAYERS:
        return isinstance(layer, LAYERS)
    weights = {name: torch.rand(parameter.shape) for name, parameter in layer.named_parameters()}
    x = torch.rand((1, layer.weight.shape[1]))
    try:
        output = torch.func.functional_call(layer, weights, (x,))
    except Exception:  # the code of any model
        return False
    expected = torch.nn.functional.linear(x, weights["weight"], weights.get("bias"))
    return isinstance(output, torch.Tensor) and output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-4)


def experts_of(block: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of a block that hold all experts of a mixture, by path."""
    # Modules of transformers' experts interface have this attribute.
    return {name: module for name, module in block.named_modules() if hasattr(module, "is_concatenated")}


def stored(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module that a checkpoint holds, by name."""
    return {
        **dict(module.named_parameters()),
        **{name: each for name, each in module.named_buffers() if name not in computed(module)},
    }


def computed(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a module that follow from the configuration, by name."""
    owned = ((path, name, inner) for path, inner in module.named_modules() for name in inner._non_persistent_buffers_set)
    return {f"{path}.{name}".lstrip("."): inner._buffers[name] for path, name, inner in owned if inner._buffers[name] is not None}


def refusal(name: str, why: str) -> UserError:
    """The error for a model that the general way cannot run."""
    return UserError(f"the general way cannot run a {name}: {why}; give a model of another architecture")


def without_weights(name: str, config: Any) -> Any:
    """Makes the model of a class without its weights.

    Its blocks are on the meta device, the other parameters are zeros that take no memory.
    """
    made = getattr(transformers, name, None)
    if not (isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)):
        raise UserError(
            f"expected an architecture of the installed transformers {transformers.__version__}, got {name}: install the release "
            "that has it"
        )
    # The code of any model raises anything.
    with refusing(Exception, f"transformers cannot make a {name} of this config.json", "check the file"):
        with torch.device("meta"):
            model = made._from_config(
                copy.deepcopy(config), attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
            ).eval()
        for full, buffer in [*model.named_buffers()]:
            owner, _, leaf = full.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = torch.zeros_like(buffer, device="cpu")
        model.initialize_weights()  # fills the buffers, as from_pretrained does
    path, _ = blocks_of(name, model)
    for full, parameter in [*model.named_parameters(remove_duplicate=False)]:
        owner, _, leaf = full.rpartition(".")
        if not full.startswith(f"{path}."):
            # They have a gradient: what depends on them is seen by its own.
            model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(torch.zeros(()).expand(parameter.shape))
    return model


def blocks_of(name: str, model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """The longest list of modules that is in no other list, and its name."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    outer = {path: module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise refusal(name, "it has no list of blocks")
    return max(outer.items(), key=lambda item: (len(item[1]), sum(parameter.numel() for parameter in item[1].parameters())))


@contextlib.contextmanager
def replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
