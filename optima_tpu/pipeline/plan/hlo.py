"""Reads collectives from the text of a compiled program."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """Counts the collectives of a program by name, in loops and outside.

    The TPU compiler can start a transfer before a loop and await it after the loop, so that it overlaps the loop's products. It
    then names the transfer in every computation that carries it. Such a transfer counts as one collective outside the loops:
    its channel and its origin identify it.
    """
    inside, everywhere = (collections.Counter(each.key for each in _named(text)) for text in (text_inside_loops(hlo), hlo))
    beyond = everywhere.keys() - inside.keys() | {key for key, times in everywhere.items() if times > inside[key]}
    return (
        dict(collections.Counter(name for name, *_ in inside.keys() - beyond)),
        dict(collections.Counter(name for name, *_ in beyond)),
    )


class _Named(NamedTuple):
    """A line of a program that names a collective.

    Attributes:
      key: name, channel and origin of the collective, which identify it.
      results: the line's shapes before the instruction.
      instruction: as the compiler writes it.
      line: the whole line.
    """

    key: tuple[str, ...]
    results: str
    instruction: str
    line: str


def _named(text: str) -> Iterator[_Named]:
    """The lines that name collectives, in their order."""
    scatters = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            # The TPU's compiler writes a reduce-scatter as a computation of an all-reduce and a slice of it.
            scatters = line.lstrip("%").startswith("all-reduce-scatter")
        if match := COLLECTIVE.search(line):
            name = "reduce-scatter" if scatters else re.sub(r"(-start)?\($", "", match[0])
            key = (name, *re.findall(r'channel_id=\d+|op_name="[^"]*"', line))
            yield _Named(key, line[: match.start()].partition("=")[2], match[0].rstrip("("), line)


def moved(hlo: str) -> dict[str, int]:
    """Bytes of the collectives' results on one device, by name.

    Each collective of :func:`collectives` counts once. A reduce-scatter counts as large as the array that it sums.
    """
    sizes = {}
    for key, results, instruction, line in _named(hlo):
        if key not in sizes:
            shapes = [_bytes(*shape) for shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", results)]
            # A transfer that is only started names its operands before its results, and then what it waits for.
            if instruction in ("all-gather-start", "collective-permute-start"):
                shapes = shapes[: len(shapes) // 2 * 2]
                shapes = shapes[1:2] if key[0] == "collective-permute" else shapes[len(shapes) // 2 :]
            sizes[key] = sum(shapes) * (_group(line) if instruction.startswith("reduce-scatter") else 1)
    totals: collections.Counter[str] = collections.Counter()
    for (name, *_), size in sizes.items():
        totals[name] += size
    return dict(totals)


def sent(moved: Mapping[str, int]) -> int:
    """The bytes that a device sends, at most, from the sizes of :func:`moved`.

    An all-reduce counts twice: it scatters its sums and gathers them again.
    """
    return sum(moved.values()) + moved.get("all-reduce", 0)


def _bytes(dtype: str, dimensions: str) -> int:
    """Bytes of an array, by its dtype in the text, such as ``bf16``."""
    bits = re.search(r"\d+", dtype)
    return math.prod(map(int, filter(None, dimensions.split(",")))) * max(1, int(bits[0]) // 8 if bits else 1)


def _group(line: str) -> int:
    """The number of devices that take part in a collective together."""
    listed = re.search(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\})", line)
    return 1 if listed is None else int(listed[1]) if listed[1] else len(listed[2].split(","))


def text_inside_loops(hlo: str) -> str:
    """The computations that while loops run, directly or through calls."""
    computations = re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n.*?^\}", hlo, re.MULTILINE | re.DOTALL)
    bodies = {match[1]: match[0] for match in computations}

    def named(text: str, keys: str) -> set[str]:
        branches = " ".join(re.findall(r"branch_computations=\{(.*?)\}", text))
        return set(re.findall(rf"(?:{keys})=%?([\w.\-]+)", text)) | set(re.findall(r"[\w.\-]+", branches))

    inside, waiting = set(), named(hlo, "body|condition")
    while waiting:
        name = waiting.pop()
        inside.add(name)
        waiting |= named(bodies[name], "calls|to_apply|body|condition|true_computation|false_computation") - inside
    return "\n".join(bodies[name] for name in inside)
