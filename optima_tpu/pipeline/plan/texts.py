"""The texts of a plan: the perplexity text, and what the model writes."""

import dataclasses
import functools

import jax

from optima_tpu import data
from optima_tpu.config.run_config import RunConfig
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.models.checkpoints.tokenizer import VOCABULARIES
from optima_tpu.models.model import window_bos
from optima_tpu.models.whole_model import step, step_structs, windows_at_once
from optima_tpu.pipeline.plan.counting import counted
from optima_tpu.pipeline.plan.estimate import evaluation_tokens
from optima_tpu.pipeline.plan.model import DeclaredModel
from optima_tpu.pipeline.plan.share import Planned, Share, TextPass
from optima_tpu.pipeline.programs import Call
from optima_tpu.pipeline.self_calibration import ADVICE, written_windows

CHARACTERS = 4
"""Characters of English for each token, where the tokenizer is not at hand."""

_WRITTEN = "text that the model writes"


def with_windows(config: RunConfig, model: DeclaredModel) -> RunConfig:
    """The run with its number of evaluation windows, if its text is here.

    If the text is not on this machine, returns the run as it is.
    """
    source = data.parse_source(config.evaluation.source or config.calibration.source)
    if not source.here:
        return config
    try:
        windows = _windows(source, config, model)
    except UserError:  # the text is where the run will be, or the run will refuse it
        return config
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, windows=windows))


def _windows(source: data.Source, config: RunConfig, model: DeclaredModel) -> int:
    length, most = config.evaluation.length or config.calibration.window_length, config.evaluation.windows
    if isinstance(source, data.TokenSource):
        vocabulary = model.decoder.config.vocab
        return len(source.tokens("evaluation", vocabulary=vocabulary, windows=most, length=length, seed=0).ids)
    pretrained = model.opened.pretrained
    if not pretrained.assets.keys() & set(VOCABULARIES):
        windows = sum(map(len, source.documents("evaluation"))) // (CHARACTERS * length)
        return max(1, windows if most is None else min(windows, most))
    tokenizer = load_tokenizer(pretrained)
    bos = window_bos(model.opened, tokenizer, config.evaluation.bos)
    return len(data.evaluation_tokens(source, tokenizer, length=length, windows=most, bos=bos).ids)


def perplexity(run: Planned) -> Share:
    """The perplexities of the dense and the pruned model."""
    evaluated, deeper = evaluation_tokens(run.config), run.dense_blocks / run.blocks
    return Share(passes=(TextPass("perplexity, dense and pruned", (1 + deeper) * evaluated, 2 * evaluated, dense=1),))


def writing(run: Planned) -> Share:
    """The windows that the dense model writes.

    Several windows are written at once. Each next token of all of them is a step of the whole model.
    """
    count, length, model = written_windows(run.config), run.config.calibration.window_length, run.dense
    if not count:
        return Share()
    assumed = "each token of the windows that the model writes at once attends to a whole window"
    try:
        at_once = windows_at_once(model.decoder, count, length, run.budget, ADVICE)
    except UserError as error:
        return Share(assumptions=(assumed,), refused=str(error))
    call = Call(jax.jit(functools.partial(step, model.decoder)), step_structs(model.decoder, at_once, length))
    seconds = -(-count // at_once) * (length - 1) * counted(call, run.machine).work.seconds(run.machine)
    return Share(passes=(TextPass(_WRITTEN, 0.0, dense=1),), seconds={_WRITTEN: seconds}, assumptions=(assumed,))
