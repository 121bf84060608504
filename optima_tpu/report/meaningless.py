"""Texts and dense models that make every number of a run meaningless.

Two criteria, both against what the frequencies of a text's tokens give (:func:`optima_tpu.data.unigram_perplexity`):

- A text whose unigram perplexity is below :data:`LEAST` says as little as one of so few tokens in equal shares. C4 has some
  1,000, a text of bytes 20.
- A dense model whose perplexity is not below the text's unigram perplexity predicts it no better than a table of frequencies
  does, which reads no context at all. Random weights end here.
"""

from optima_tpu.report.contents import RunFacts
from optima_tpu.report.numbers import number

LEAST = 4.0


def poor_text(which: str, unigram: float, option: str = "") -> str:
    """What is wrong with a calibration or evaluation text; empty if nothing.

    Args:
      option: names another text; by default ``which`` with .source.
    """
    if unigram >= LEAST:
        return ""
    return (
        f"the {which} text is hardly more than one token again and again (its frequencies alone predict it with a perplexity of "
        f"{number(unigram)}), so no number behind it means anything: give another text by {option or f'--{which}.source'}"
    )


def unpredicted(dense: float, unigram: float, which: str = "dense model") -> str:
    """What is wrong with a dense model's perplexity; empty if nothing is."""
    if dense < unigram or poor_text("evaluation", unigram):
        return ""
    return (
        f"the {which} does not predict the evaluation text (perplexity {number(dense, 4)}; the frequencies of the text's tokens "
        f"alone give {number(unigram, 4)}), so no number behind it means anything: check that it is the right, undamaged model "
        "for this text"
    )


def meaningless_lines(report: RunFacts) -> list[str]:
    """Why a report's numbers mean nothing, a sentence for each reason."""
    calibration, evaluation = report.calibration.unigram_perplexity, report.evaluation.unigram_perplexity
    reasons = poor_text("calibration", calibration), poor_text("evaluation", evaluation)
    return list(filter(None, (*reasons, unpredicted(report.perplexity.dense, evaluation))))
