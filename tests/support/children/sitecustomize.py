"""In the processes that tests start there is no torch, as where only the program is installed. Python imports this file first.

transformers would import torch where it is, which takes nearly as long as everything else that a command imports.
"""

from importlib.machinery import PathFinder

_find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else _find(name, *rest)  # type: ignore[method-assign]
