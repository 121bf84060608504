"""Our perplexity against torch by the published protocol.

One text is cut into windows that do not overlap, and the mean is over tokens.
"""

import functools

import pytest

from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.evaluate.perplexity import perplexity
from optima_tpu.pipeline.inputs import read_texts
from tests.support.references import BY_MODEL, SIZES, tiny
from tests.support.runs import opened
from tests.support.texts import save
from tests.support.tiny_models import byte_tokenizer, with_bos

torch = pytest.importorskip("torch")

from benchmarks.perplexity_parity import published  # noqa: E402

DOCUMENTS = ["The windows of a text see nothing before them.", "", "Only the first begins where the text does. " * 4]
BOS, LENGTH = 256, 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a family's (folder, transformers' model); texts begin with BOS."""
    root = tmp_path_factory.mktemp("perplexity")

    @functools.cache
    def saved_family(family: str):
        reference = BY_MODEL[family]
        _, model, _ = tiny(reference, SIZES)
        model.save_pretrained(root / family)
        save(with_bos(root / family) / "text.jsonl", DOCUMENTS)
        return root / family, model

    return saved_family


@pytest.mark.parametrize("family", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_perplexity_is_that_of_torch_with_bos_before_the_text_or_every_window(saved, family):
    folder, reference = saved(family)
    measured = {}
    for bos in ("text", "window", None):
        config = RunConfig(
            str(folder),
            calibration=Calibration("random", windows=1, length=LENGTH, held_out=0),
            evaluation=Evaluation(f"file:{folder}/text.jsonl", bos=bos),
        )
        model = opened(config, (1, 1))
        tokens = read_texts(config, model).evaluation
        assert ("BOS" in tokens.how) == (bos == "window" or (bos is None and "Gemma" in family))
        measured[bos] = perplexity(model.decoder, tokens.ids)
    ids = byte_tokenizer()("\n\n".join(DOCUMENTS))["input_ids"]
    assert measured["text"] == pytest.approx(published(reference, [BOS, *ids], LENGTH), rel=1e-5)
    assert measured["window"] == pytest.approx(published(reference, ids, LENGTH, bos=BOS), rel=1e-5)
    assert measured[None] == measured["window" if "Gemma" in family else "text"]
    assert measured["text"] != pytest.approx(measured["window"], rel=1e-3)
