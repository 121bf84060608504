"""Every token is what a pass over its own text gives, in any batch."""

import dataclasses

import jax
import numpy as np
import pytest

from optima_tpu.errors import UserError
from optima_tpu.models.decoder import Decoder
from optima_tpu.models.generate import Prompt, Sampling, generate, plan_generation
from optima_tpu.models.whole_model import empty_cache, load, step_structs
from tests.support.meshes import mesh
from tests.support.oracles import logits_of
from tests.support.tiny_models import MemoryTensors, tiny_llama

VOCABULARY = 60  # the embedding has 64 rows

# Shorter and longer than the chunks in which prompts are read, in two batches of caches of 64 tokens, and in one of 96.
SIZES = (1, 6, 3, 31, 34, 40, 66, 5)
PROMPTS = [Prompt(tuple(np.random.default_rng(size).integers(0, 60, size).tolist()), 9) for size in SIZES]


def opened(shape, seed=0):
    return Decoder.open(*tiny_llama(seed), mesh(*shape))


def planned(decoder, prompts=PROMPTS, temperature=0.0, **options):
    return plan_generation(decoder, prompts, Sampling(VOCABULARY, temperature), advice="take more", **options)


@pytest.fixture(scope="module")
def written():
    """What two models write on one device."""
    decoders = [opened((1, 1), seed) for seed in (0, 1)]
    plan = planned(decoders[0])
    return [generate(decoder, plan) for decoder in decoders]


def test_every_token_is_the_likeliest_after_one_pass_over_those_before_it(written):
    assert written[0] != written[1]
    for seed, answers in enumerate(written):
        alone = opened((1, 1), seed)
        for (prompt, new), answer in zip(PROMPTS, answers, strict=True):
            tokens = np.zeros((1, 96), np.int32)
            tokens[0, : len(prompt) + new] = [*prompt, *answer]
            expected = logits_of(alone, tokens)[0, len(prompt) - 1 : len(prompt) + new - 1, :VOCABULARY].argmax(axis=-1)
            assert answer == expected.tolist()


def test_hardly_any_temperature_draws_the_likeliest_tokens(written):
    decoder = opened((1, 1))
    assert generate(decoder, planned(decoder, temperature=1e-6)) == written[0]


def test_neither_the_others_nor_the_mesh_change_an_answer(written):
    decoder = dataclasses.replace(opened((2, 2)), batch=1)
    # A budget for two prompts on each of two slices, and for one with the longer cache.
    plan = planned(decoder, budget=150_000)
    assert [(len(batch.prompts), batch.rows, batch.room) for batch in plan.batches] == [(1, 2, 96), (4, 4, 64), (3, 4, 64)]
    assert generate(decoder, plan) == written[0]


def test_a_plan_of_the_whole_model_serves_the_one_that_lost_blocks_heads_and_neurons():
    """One lost blocks, the other a third of its heads and half its neurons."""
    plan = planned(opened((1, 1)), PROMPTS[:1])
    for sizes in (
        {"num_hidden_layers": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 30},
    ):
        smaller = Decoder.open(*tiny_llama(**sizes), mesh(1, 1))
        assert generate(smaller, plan) == generate(smaller, planned(smaller, PROMPTS[:1]))


def test_a_plan_counts_the_step_of_the_arrays_that_are_loaded():
    """Also where the head is the table of the embedding."""
    for tied in (False, True):
        decoder = Decoder.open(*tiny_llama(tie_word_embeddings=tied), mesh(4, 2))
        structs, real = step_structs(decoder, 8, 64)[:2], (load(decoder, 64), empty_cache(decoder, 8, 64))
        assert jax.tree.structure(structs) == jax.tree.structure(real)
        for struct, array in zip(jax.tree.leaves(structs), jax.tree.leaves(real), strict=True):
            assert (struct.shape, struct.dtype) == (array.shape, array.dtype)
            assert array.sharding.is_equivalent_to(struct.sharding, array.ndim)


def test_a_second_model_of_the_same_shape_compiles_nothing(caplog):
    plan = planned(opened((1, 1)), PROMPTS[:2])
    compiled = []
    for seed in (0, 1):
        decoder = opened((1, 1), seed)
        with jax.log_compiles():
            generate(decoder, plan)
        compiled.append([record.message for record in caplog.records if record.message.startswith("Compiling")])
        caplog.clear()
    first, second = compiled
    assert first and not second


def test_a_batch_ends_when_all_of_its_answers_are_enough(written):
    decoder, calls, numbers = opened((1, 1)), [], []
    prompts = [prompt._replace(new=40) for prompt in PROMPTS[:3]]
    plan = planned(decoder, prompts)

    def enough(number, tokens):
        numbers.append(number)
        return len(tokens) >= 9

    answers = generate(decoder, plan, enough, lambda: calls.append(1))
    assert [answer[:9] for answer in answers] == written[0][:3] and len(calls) == plan.steps == 2
    assert sorted(numbers) == [0, 1, 2] and [len(answer) for answer in answers] == [32, 27, 30]


def test_a_model_that_does_not_fit_and_one_that_overflows_are_told():
    with pytest.raises(UserError, match="GiB of each device, more than the .* GiB that there are for them: take more"):
        planned(opened((1, 1)), budget=1000)
    arrays = dict(opened((1, 1)).tensors.arrays)
    arrays["model.norm.weight"] = np.full(36, 3e38, np.float32)
    broken = dataclasses.replace(opened((1, 1)), tensors=MemoryTensors(arrays))
    with pytest.raises(UserError, match="after a prompt: the model overflows even in float32"):
        generate(broken, planned(broken, PROMPTS[:1]))
