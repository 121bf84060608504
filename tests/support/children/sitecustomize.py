"""Hides torch from the processes that tests start.

Python imports this file first. Such a process sees what an installation of the program alone has. transformers would import
torch, which takes nearly as long as everything else that a command imports.
"""

from importlib.machinery import PathFinder

_find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "torch" else _find(name, *rest)  # type: ignore[method-assign]
