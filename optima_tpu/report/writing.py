"""Page sections on changed tokens, and on what both models write."""

from collections.abc import Sequence

from markupsafe import Markup, escape

from optima_tpu.report.numbers import number, percent
from optima_tpu.report.runs import FinishedRun
from optima_tpu.report.view import Section, Table

_BAR = Markup('<span class="bar" style="width: {:.2f}rem"></span>')


def tokens(runs: Sequence[FinishedRun]) -> list[Section]:
    """Section on the tokens that got worse; empty without token losses."""
    text = []
    tables: list[Table] = []
    folded: list[Table] = []
    recorded = [(run, changes) for run in runs if (changes := run.report.tokens)]
    if not recorded:
        return []
    for run, changes in recorded:
        shares, middle = changes.shares, len(changes.edges) // 2
        # Where the mean is within its noise of zero, worse and better tokens cancel, and the share is of next to nothing.
        share = changes.rise_share if changes.mean > max(0.01, 2 * (changes.mean_stderr or 0)) else None
        remark = f" The worst 1% of the tokens cause {percent(share)} of the total rise." if share is not None else ""
        text.append(
            f"{run.before}The pruned model predicts {percent(sum(shares[middle + 1 :]))} of {changes.tokens:,} tokens worse than "
            f"the dense model, {percent(sum(shares[:middle]))} better, and the others equally well, within "
            f"{changes.edges[middle]:g} nats. The loss {_moved(changes.mean)} on average; "
            f"its median {_moved(changes.median)}.{remark}"
        )
        bars = [
            [name, percent(share), _BAR.format(20 * share)] for name, share in zip(_classes(changes.edges), shares, strict=True)
        ]
        tables.append(Table(f"Tokens by the change of their loss{run.behind}", ["change, in nats", "tokens", ""], bars))
        worst = [
            [_marked(each.before, each.token, each.after), _chance(each.dense), _chance(each.pruned)] for each in changes.worst
        ]
        if worst:
            table = Table(
                f"Tokens with the largest rise of the loss{run.behind}",
                ["token, in its text", "dense", "pruned"],
                worst,
                words=True,
                names=0,
                note="Probability of the marked token in each model, given all earlier tokens of its window. ⏎ is a line break.",
            )
            (folded if run.label else tables).append(table)
    text.append(
        "The loss of a token is −ln of the probability that the model gives it; the perplexity is e to the power of the mean "
        "loss. A rise of 0.1 nats multiplies the probability by 0.90, a rise of 2 nats by 0.14."
    )
    return [Section("tokens", "Which tokens got worse", text, tables=tables, folded=folded)]


def continuations(runs: Sequence[FinishedRun]) -> list[Section]:
    """Section on the texts that both models write; empty without any."""
    text, tables = [], []
    for run in runs:
        recorded = run.report.continuations
        if not recorded:
            continue
        if recorded.reason:
            text.append(f"{run.before}{recorded.reason}")
            continue
        rows = [[each.prompt, _parted(each.dense), _parted(each.pruned)] for each in recorded.texts]
        tables.append(Table(f"After a prompt{run.behind}", ["prompt", "dense", "pruned"], rows, words=True))
    if not (text or tables):
        return []
    if tables:
        text.insert(
            0,
            "Both models continue each prompt, always with their most likely token. The first token that differs is marked. A "
            "model that is not tuned to answer often repeats itself. Four prompts show what changed, not how good a model is.",
        )
    return [Section("continuations", "What the models write", text, tables=tables)]


def _classes(edges: Sequence[float]) -> list[str]:
    """ "more than 2 better", "0.5 to 2 better", ..., "more than 2 worse"."""
    worse = [f"{low:g} to {high:g}" for low, high in zip(edges[len(edges) // 2 :], edges[len(edges) // 2 + 1 :])]
    worse.append(f"more than {edges[-1]:g}")
    better = [f"{each} better" for each in reversed(worse)]
    return [*better, f"alike, within {edges[len(edges) // 2]:g}", *(f"{each} worse" for each in worse)]


def _moved(change: float) -> str:
    """ "rises by 0.28 nats", "falls by 0.0075 nats", "does not change"."""
    if not number(abs(change)).strip("0."):
        return "does not change"
    return f"{'rises' if change > 0 else 'falls'} by {number(abs(change))} nats"


def _chance(probability: float) -> str:
    return percent(probability) if probability >= 0.001 else "< 0.1%"


def _marked(before: str, token: str, after: str) -> Markup:
    return escape(before) + Markup("<mark>{}</mark>").format(token) + escape(after)


def _parted(parts: Sequence[str]) -> Markup:
    """A continuation as markup, with the first differing token marked."""
    common, token, rest = parts
    return _marked(common, token, rest) if token else escape(common)
