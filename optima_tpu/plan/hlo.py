"""What the text of a compiled program says about communication."""

import collections
import re

COLLECTIVE = re.compile(r"\b(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(hlo: str) -> tuple[dict[str, int], dict[str, int]]:
    """The collectives of a program by name, those inside its loops and those outside."""
    inside, everywhere = (collections.Counter(re.sub(r"(-start)?\($", "", found) for found in COLLECTIVE.findall(text))
                          for text in (text_inside_loops(hlo), hlo))
    return dict(inside), dict(everywhere - inside)


def text_inside_loops(hlo: str) -> str:
    """The lines of every computation that a while loop of the program runs, directly or through calls."""
    computations = re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n.*?^\}", hlo, re.M | re.S)
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
