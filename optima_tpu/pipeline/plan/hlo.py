"""What the text of a compiled program says about communication."""

import collections
import re

COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of a program by name, those inside its loops and those outside.

    A TPU's compiler lets a transfer that is started before a loop and awaited after it go on behind the loop's products, and
    then names it in every computation that carries it. It is one collective, outside, known by its channel and its origin.
    """
    loops = text_inside_loops(hlo)
    inside, everywhere = _channels(loops), _channels(hlo)
    beyond = everywhere.keys() - inside.keys() | {key for key, times in everywhere.items() if times > inside.get(key, 0)}
    return (
        dict(collections.Counter(name for name, *_ in inside.keys() - beyond)),
        dict(collections.Counter(name for name, *_ in beyond)),
    )


def _channels(text: str) -> dict[tuple[str, ...], int]:
    """How often each collective, by its name, channel and origin in the traced program, is named."""
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
