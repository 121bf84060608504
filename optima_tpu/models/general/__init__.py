"""The general way: runs the torch code of a decoder on JAX, by torchax.

It runs any decoder that the installed ``transformers`` has, and is taken where an architecture has no file here. Only classes
of ``transformers`` run, no code from a model's folder.
"""

import collections
import importlib.util
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optima_tpu.errors import UserError
from optima_tpu.models.experts import MixtureNames
from optima_tpu.models.family import Family, Stack

if TYPE_CHECKING:
    from optima_tpu.models.general.against_torch import Agreement

_GPT2 = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MLP = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def _experts(path: str, wide: str, narrow: str, turned: bool = False) -> dict[str, Stack]:
    gate, up, down = (f"{path}.experts.*.{name}_proj.weight" for name in ("gate", "up", "down"))
    return {f"{path}.{wide}": Stack((gate, up), turned), f"{path}.{narrow}": Stack((down,), turned)}


_PATHS = "mlp", "feed_forward", "mixer", "moe", "block_sparse_moe"
_USUAL: Mapping[str, Stack] = {
    **{name: stack for path in _PATHS for name, stack in MixtureNames(path).stacks(turned=False).items()},
    **_experts("block_sparse_moe", "input_linear.weight", "output_linear.weight"),
}
_OWN: Mapping[str, Mapping[str, Stack]] = {
    **{name: {weight: Stack((weight,)) for weight in _GPT2} for name in ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")},
    "AriaTextForCausalLM": _experts("mlp", "experts.fc1.weight", "experts.fc2.weight", turned=True),
    # Its MLPs are published as mlp, its mixtures as block_sparse_moe. transformers reads both, and calls both by the latter name.
    "KimiLinearForCausalLM": {**_USUAL, **{f"mlp.{name}": Stack((f"block_sparse_moe.{name}",), turned=False) for name in _MLP}},
}


def stacks(name: str) -> Mapping[str, Stack]:
    """Tensors that a checkpoint may hold otherwise than matrix by matrix.

    The architecture ``name`` has no family; see ``Family.stacks``. These are the matrices of a ``Conv1D``, which are
    [d_in, d_out], the matrices of all experts of a block, and matrices with two names.
    """
    return _OWN.get(name, _USUAL)


NEEDED = "torch", "torchax"


def family(config: Any) -> Family:
    """Makes a family from the torch class of a ``transformers`` configuration.

    The last few families are kept.

    Raises:
      UserError: torch or torchax is not installed, or the model does not fit: says why.
    """
    name = (config.architectures or [type(config).__name__])[0]
    _need(f"a {name} without a family of its own here is run by its code in transformers")
    from optima_tpu.models.general.build import general_family

    stored = {key: value for key, value in config.to_dict().items() if key not in _NOT_COMPUTED}
    key = json.dumps([type(config).__name__, stored], sort_keys=True, default=str)
    if key not in _KEPT:
        _KEPT[key] = general_family(config)
        while len(_KEPT) > _MOST:
            _KEPT.popitem(last=False)
    return _KEPT[key]


def checked(model: str, length: int) -> "Agreement":
    """Compares a model here with torch, see ``against_torch.compared``."""
    _need("a model is compared with its code in transformers")
    from optima_tpu.models.general.against_torch import compared

    return compared(model, length)


def _need(what: str) -> None:
    if missing := [each for each in NEEDED if importlib.util.find_spec(each) is None]:
        raise UserError(f"{what}, which needs {' and '.join(missing)}: pip install '.[any]' in the directory of the repository")


_NOT_COMPUTED = {"dtype", "torch_dtype", "_name_or_path", "transformers_version"}
_KEPT: collections.OrderedDict[str, Family] = collections.OrderedDict()
_MOST = 4
