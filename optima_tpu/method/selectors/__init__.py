"""Selectors, which choose the weights of a layer that stay. One file each."""

from collections.abc import Mapping
from types import MappingProxyType

from optima_tpu.method.selectors.admm import ADMM
from optima_tpu.method.selectors.base import Selector
from optima_tpu.method.selectors.imported import Imported
from optima_tpu.method.selectors.magnitude import Magnitude
from optima_tpu.method.selectors.price import Price
from optima_tpu.method.selectors.sparsegpt import SparseGPT
from optima_tpu.method.selectors.thanos import Thanos
from optima_tpu.method.selectors.wanda import Wanda

SELECTORS: Mapping[str, type[Selector]] = MappingProxyType(
    {
        "wanda": Wanda,
        "sparsegpt": SparseGPT,
        "thanos": Thanos,
        "admm": ADMM,
        "price": Price,
        "magnitude": Magnitude,
        "imported": Imported,
    }
)
"""The selectors by their names in YAML files and on the command line."""

__all__ = ["ADMM", "SELECTORS", "Imported", "Magnitude", "Price", "Selector", "SparseGPT", "Thanos", "Wanda"]
