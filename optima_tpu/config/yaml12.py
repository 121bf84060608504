"""YAML 1.2, in which 2:4 and no are text.

In YAML 1.1, which PyYAML reads, they are 124 and False. ruamel.yaml's reading is kept, with one exception: a date stays text,
because a run directory may be named by one. A file that begins with ``%YAML 1.1`` is read as that version.
"""

import io
from typing import Any

from ruamel.yaml import YAML, SafeConstructor
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from optima_tpu.errors import UserError, one_line

MOST_LETTERS, MOST_VALUES = 1 << 18, 100_000
"""Bounds of a document: its text, and its values with every alias written out."""


class _Constructor(SafeConstructor):
    """Keeps dates as text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def load(text: str, origin: str = "the text") -> Any:
    """Reads one document.

    Args:
      origin: the source of the text, for messages.

    Raises:
      UserError: the text is not YAML, or a key is given twice.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    if len(text) > MOST_LETTERS:
        raise UserError(f"{origin}: expected YAML of at most {MOST_LETTERS} characters, got more: take another file")
    try:
        value = yaml.load(text)
        _size(value, {})
        return value
    except DuplicateKeyError as error:
        key = str(error.problem).partition('"')[2].partition('"')[0]
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{origin} line {line}: expected every setting once, got {key!r:.60} twice; remove one of them") from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{origin}{line}: expected YAML, got something else: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{origin}: expected YAML, got brackets that are nested too deeply, or an alias of itself") from None
    except (YAMLError, ValueError, LookupError) as error:  # the last two for a value that its tag does not fit: !!int x
        raise UserError(f"{origin}: expected YAML, got something else: {one_line(error)}") from None


def _size(value: Any, sizes: dict[int, int]) -> int:
    """The number of values in a document whose aliases are written out.

    ``sizes`` has the sizes of the parts that were counted.

    Raises:
      ValueError: there are more than :data:`MOST_VALUES`.
    """
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in sizes:
        size = 1 + sum(_size(each, sizes) for each in (value.values() if isinstance(value, dict) else value))
        if size > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
        sizes[id(value)] = size
    return sizes[id(value)]


def dump(value: Any) -> str:
    """JSON types as YAML that :func:`load` reads back, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel.yaml declares it None
    yaml.width = 1000  # long values stay on one line
    text = io.StringIO()
    yaml.dump(value, text)
    return text.getvalue()
