"""Choose which weights of a layer stay. One file per method; a selector is a frozen dataclass with a ``__call__``."""

from optima_tpu.method.selectors.admm import ADMM
from optima_tpu.method.selectors.base import Selector
from optima_tpu.method.selectors.imported import Imported
from optima_tpu.method.selectors.magnitude import Magnitude
from optima_tpu.method.selectors.price import Price
from optima_tpu.method.selectors.sparsegpt import SparseGPT
from optima_tpu.method.selectors.thanos import Thanos
from optima_tpu.method.selectors.wanda import Wanda

__all__ = ["ADMM", "Imported", "Magnitude", "Price", "Selector", "SparseGPT", "Thanos", "Wanda"]
