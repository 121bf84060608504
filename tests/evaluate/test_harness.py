"""Log-likelihoods on a mesh against the harness with torch, on tiny Llamas."""

import dataclasses
import itertools

import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.evaluate.harness import DecoderLM
from optima_tpu.evaluate.likelihood import LENGTHS, Request, _next_tokens, likelihoods, make_plan
from optima_tpu.evaluate.model import open_evaluated
from optima_tpu.models.decoder import run_block
from optima_tpu.report.progress import Progress
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.refusals import refusal
from tests.support.tiny_models import MemoryTensors, tiny_folder, tiny_llama, with_bos

CONTEXT, SHORT = 128, 64
SENTENCE = "It was a bright cold day in April, and the clocks were striking thirteen."


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, entry, 0, ("a_task", number, 1)) for number, entry in enumerate(arguments)]


PAIRS = instances(
    "loglikelihood",
    [
        *((SENTENCE, ending) for ending in (" a", " b", " c", " Winston Smith")),
        ("", " nothing before it"),
        ("", "<s>after it"),
        ("ends with two spaces  ", "then goes on"),
        ("<s>with BOS", " itself"),
        (SENTENCE * 3, " a context that loses its beginning"),
        ("x", SENTENCE),
        ("Größe", " ändert sich"),
        *((SENTENCE[:size], SENTENCE[size : size + 9]) for size in range(1, 60, 7)),
    ],
)
DOCUMENTS = instances("loglikelihood_rolling", [(SENTENCE * 5,), ("a",), (SENTENCE,), ("<s>" + SENTENCE * 2,)])


@pytest.fixture(scope="module", params=["without BOS", "with BOS"])
def folder(request, tmp_path_factory):
    """A model's folder whose tokenizer does or does not put a BOS first."""
    path = tiny_folder(tmp_path_factory.mktemp("harness") / "model", max_position_embeddings=CONTEXT)
    return with_bos(path) if request.param == "with BOS" else path


@pytest.fixture(scope="module")
def reference(folder):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def opened(folder, shape=(1, 1), context=None):
    model, tokenizer, _ = open_evaluated(str(folder), mesh(*shape))
    return DecoderLM(model, tokenizer, Progress(), context=context)


def assert_close(actual, expected):
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([value for value, _ in actual], [value for value, _ in expected], rtol=1e-5)


def test_likelihoods_are_those_of_transformers(folder, reference):
    lm = opened(folder)
    assert lm.max_length == reference.max_length == CONTEXT and lm.prefix_token_id == reference.prefix_token_id
    assert [lm.tok_encode(text) for text in ("a", "<s>a", "")] == [reference.tok_encode(text) for text in ("a", "<s>a", "")]
    assert_close(lm.loglikelihood(PAIRS), reference.loglikelihood(PAIRS, disable_tqdm=True))
    np.testing.assert_allclose(
        lm.loglikelihood_rolling(DOCUMENTS), reference.loglikelihood_rolling(DOCUMENTS, disable_tqdm=True), rtol=1e-5
    )


def test_the_likeliest_continuation_is_called_greedy(folder, reference):
    lm, rng, requests = opened(folder), np.random.default_rng(0), []

    def likeliest(tokens):
        padded = np.pad(np.asarray([tokens], np.int32), ((0, 0), (0, 48 - len(tokens))))
        return int(logits_of(lm._decoder, padded)[0, len(tokens) - 1].argmax())

    for size in (1, 5, 20, 40):
        context, greedy = rng.integers(0, 256, size).tolist(), []
        for _ in range(3):
            greedy.append(likeliest(context + greedy))
        other = [greedy[0], (greedy[1] + 1) % 256]
        other.append(likeliest(context + other))  # after another token in the middle
        requests += [(("", ""), context, tokens) for tokens in (greedy, greedy[:1], [*greedy[:2], (greedy[2] + 1) % 256], other)]
    answers = lm._loglikelihood_tokens(requests)
    assert_close(answers, reference._loglikelihood_tokens(requests, disable_tqdm=True))
    assert [greedy for _, greedy in answers] == [True, True, False, False] * 4


def test_the_mesh_does_not_change_likelihoods(tmp_path):
    folder = tiny_folder(tmp_path / "model", max_position_embeddings=CONTEXT)
    one, eight = (opened(folder, shape) for shape in ((1, 1), (4, 2)))
    assert_close(eight.loglikelihood(PAIRS), one.loglikelihood(PAIRS))
    np.testing.assert_allclose(eight.loglikelihood_rolling(DOCUMENTS), one.loglikelihood_rolling(DOCUMENTS), rtol=1e-5)


def random_requests(rng, count):
    sizes = rng.integers(1, SHORT + 1, count)
    return [
        Request(tuple(rng.integers(0, 64, size).tolist()), tuple(rng.integers(0, 64, rng.integers(1, size + 1)).tolist()))
        for size in sizes
    ]


@pytest.fixture(scope="module")
def decoder():
    from optima_tpu.models.decoder import Decoder

    config, tensors = tiny_llama()
    return Decoder.open(config, tensors, mesh(4, 2), batch=1)


def test_programs_are_compiled_once_for_each_length(decoder):
    rng = np.random.default_rng(0)
    lengths = sum(length <= SHORT for length in LENGTHS)
    likelihoods(decoder, make_plan(decoder, random_requests(rng, 200), SHORT))
    blocks, heads = run_block._cache_size(), _next_tokens._cache_size()
    for count in (200, 70):
        likelihoods(decoder, make_plan(decoder, random_requests(rng, count), SHORT))
    # Of another number of requests only the last, smaller batch is new.
    assert run_block._cache_size() <= blocks + 2 and _next_tokens._cache_size() == heads
    shapes = {group[2:] for wave in make_plan(decoder, random_requests(rng, 1000), SHORT).waves for group in wave}
    assert 1 < len(shapes) <= lengths + 1 == 4


@pytest.mark.parametrize("count", [1, 3, 50, 1000])
def test_a_plan_has_every_text_once_and_keeps_to_its_bytes(decoder, count):
    requests = random_requests(np.random.default_rng(count), count)
    requests += requests[:5]
    wave = 128 * SHORT * decoder.config.d_model * 4
    plan = make_plan(decoder, requests, SHORT, wave)
    assert all(plan.texts[owner] == request.inputs for owner, request in zip(plan.owners, requests))
    groups = [group for wave in plan.waves for group in wave]
    assert [group.first for group in groups] == [0, *(group.last for group in groups[:-1])] and groups[-1].last == len(plan.texts)
    assert all(len(plan.texts[group.first]) <= group.length for group in groups)
    assert all(group.batch % decoder.mesh.shape["data"] == 0 for group in groups)
    sizes = [sum(plan.tokens(group).size for group in part) * decoder.config.d_model * 4 for part in plan.waves]
    assert max(sizes) <= wave
    places = [plan.places(group) for group in groups]
    pairs = sorted((int(request), int(target)) for part in places for request, target in zip(part.request, part.target))
    assert pairs == sorted((number, target) for number, request in enumerate(requests) for target in request.targets)


def test_waves_do_not_change_likelihoods(decoder):
    requests = random_requests(np.random.default_rng(1), 300)
    whole, cut = make_plan(decoder, requests, SHORT), make_plan(decoder, requests, SHORT, 128 * SHORT * 36 * 4)
    assert len(whole.waves) == 1 < len(cut.waves)
    steps = itertools.count()
    assert_close(likelihoods(decoder, cut, lambda: next(steps)), likelihoods(decoder, whole))
    assert next(steps) == len(cut.waves) * (decoder.config.blocks + 1)


def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path):
    folder = tiny_folder(tmp_path / "model", max_position_embeddings=CONTEXT)
    lm = opened(folder)

    assert "document 0 of task a_task: expected a text to score, got an empty document" in refusal(
        lm.loglikelihood_rolling, instances("loglikelihood_rolling", [("",)])
    )
    assert "document 1 of task a_task: expected a text to score, got an empty one" in refusal(
        lm.loglikelihood, instances("loglikelihood", [("a", "b"), ("a", "")])
    )
    assert "expected a context of at least one token before 'b', got '  '; correct the data set" in refusal(
        lm.loglikelihood, instances("loglikelihood", [("  ", "b")])
    )
    assert "of at most 128 tokens, the context (--context, at most the model's limit), got 'yyyy" in refusal(
        lm.loglikelihood, instances("loglikelihood", [("x", "y" * 129)])
    )
    assert "expected --context of at most 128, the model's context, got 129" in refusal(opened, folder, (1, 1), 129)


def test_an_overflow_names_its_layer(decoder):
    arrays = dict(decoder.tensors.arrays)
    arrays["model.layers.1.post_attention_layernorm.weight"] = np.full(36, 1e37, np.float32)
    broken = dataclasses.replace(decoder, tensors=MemoryTensors(arrays))
    with pytest.raises(UserError, match="the input of model.layers.1.mlp.down_proj holds NaN or infinite values"):
        likelihoods(broken, make_plan(broken, random_requests(np.random.default_rng(0), 70), SHORT))
