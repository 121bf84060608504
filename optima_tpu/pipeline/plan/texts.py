"""How much text a planned run would measure perplexity on."""

import dataclasses

from optima_tpu import data
from optima_tpu.config.run_config import RunConfig
from optima_tpu.data import TFDS, File, Npy, PyDoc
from optima_tpu.errors import UserError
from optima_tpu.models.checkpoints import load_tokenizer
from optima_tpu.models.checkpoints.tokenizer import VOCABULARIES
from optima_tpu.models.model import window_bos
from optima_tpu.pipeline.plan.model import DeclaredModel

CHARACTERS = 4
"""Characters of English for each token, where the tokenizer is not at hand."""


def counted(config: RunConfig, model: DeclaredModel) -> RunConfig:
    """The run with ``evaluation.windows`` as many as it would measure on, if its text is on this machine; otherwise as it is."""
    source = data.parse_source(config.evaluation.source or config.calibration.source)
    if not isinstance(source, PyDoc | File | Npy | TFDS):
        return config
    try:
        windows = _windows(source, config, model)
    except UserError:  # the text is where the run will be, or the run will refuse it
        return config
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, windows=windows))


def _windows(source: PyDoc | File | Npy | TFDS, config: RunConfig, model: DeclaredModel) -> int:
    length, most = config.evaluation.length or config.calibration.window_length, config.evaluation.windows
    if isinstance(source, Npy):
        vocabulary = model.decoder.config.vocab
        return len(source.tokens("evaluation", vocabulary=vocabulary, windows=most, length=length, seed=0).ids)
    pretrained = model.opened.pretrained
    if not pretrained.assets.keys() & set(VOCABULARIES):
        windows = sum(map(len, source.documents("evaluation"))) // (CHARACTERS * length)
        return max(1, windows if most is None else min(windows, most))
    tokenizer = load_tokenizer(pretrained)
    bos = window_bos(model.opened, tokenizer, config.evaluation.bos)
    return len(data.evaluation_tokens(source, tokenizer, length=length, windows=most, bos=bos).ids)
