"""Reads the collectives from the text of a compiled program."""

import collections
import re

COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """Counts the collectives of a program by name: inside its loops, and outside.

    The TPU compiler can start a transfer before a loop and await it after the loop, so that it overlaps the loop's products. It
    then names the transfer in every computation that carries it. Such a transfer counts as one collective outside the loops: its
    channel and its origin identify it.
    """
    loops = text_inside_loops(hlo)
    inside, everywhere = _channels(loops), _channels(hlo)
    beyond = everywhere.keys() - inside.keys() | {key for key, times in everywhere.items() if times > inside.get(key, 0)}
    return (
        dict(collections.Counter(name for name, *_ in inside.keys() - beyond)),
        dict(collections.Counter(name for name, *_ in beyond)),
    )


def _channels(text: str) -> dict[tuple[str, ...], int]:
    """How often the text names each collective, by its name, channel and origin in the traced program."""
    found = ((COLLECTIVE.search(line), line) for line in text.splitlines())
    return collections.Counter(
        (re.sub(r"(-start)?\($", "", match[0]), *re.findall(r'channel_id=\d+|op_name="[^"]*"', line))
        for match, line in found
        if match
    )


def text_inside_loops(hlo: str) -> str:
    """The lines of every computation that a while loop of the program runs, directly or through calls."""
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
