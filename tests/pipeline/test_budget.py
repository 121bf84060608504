"""A share of weights to keep becomes the most neurons or heads it allows."""

import pytest
from transformers import LlamaConfig

from optima_tpu.config.run_config import CutStructures, RunConfig
from optima_tpu.errors import UserError
from optima_tpu.method.layer_rules import layers_text, parse_layers
from optima_tpu.method.patterns import parse_pattern
from optima_tpu.pipeline.inputs import on_model
from tests.support.references import BY_MODEL

WIDTH, NEURONS, HEADS, BLOCKS, VOCABULARY = 576, 1536, 3, 4, 6553
LIKE_SMOLLM2 = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=WIDTH,
    intermediate_size=NEURONS,
    num_hidden_layers=BLOCKS,
    num_attention_heads=3 * HEADS,
    num_key_value_heads=HEADS,
    vocab_size=VOCABULARY,
    tie_word_embeddings=True,
)
"""SmolLM2-135M with 4 blocks of 30, and as much less of its vocabulary."""


def weights(neurons=NEURONS, heads=HEADS, blocks=BLOCKS):
    """Number of the model's weights, with heads of width 64.

    Counts the embedding, the last norm, and in every block the norms, q, k, v, o and three matrices of the MLP.
    """
    return (VOCABULARY + 1) * WIDTH + blocks * WIDTH * (2 + heads * 64 * (3 + 1 + 1 + 3) + 3 * neurons)


def asked(to, pattern="dense", layers="", **cut):
    config = RunConfig("here", cut=CutStructures(to=to, **cut))
    return config.changed(pattern=parse_pattern(pattern), layers=parse_layers(layers))


@pytest.mark.parametrize(
    "to, settings, rule, stays, one_more",
    [
        (0.75, {}, "*=0.5/neuron", weights(768), weights(896)),
        (0.75, {"by": "neuron@64"}, "*=0.46/neuron@64", weights(832), weights(896)),
        (0.6, {"blocks": 1, "pattern": "2:4"}, "*=0.5/neuron", weights(768, blocks=3), weights(896, blocks=3)),
        (0.6, {"layers": "*=0.33/head"}, "*=0.59/neuron", weights(640, heads=2), weights(768, heads=2)),
        (0.95, {"by": "head"}, "*=0.34/head", weights(heads=2), weights()),
    ],
)
def test_as_many_stay_as_the_share_allows(to, settings, rule, stays, one_more):
    """Other cuts count too, and a second ``on_model`` changes nothing."""
    config = on_model(asked(to, **settings), LIKE_SMOLLM2)
    assert layers_text(config.recipe.layers[-1:]) == rule
    assert stays <= to * weights() < one_more
    assert config.cut.to is None and on_model(config, LIKE_SMOLLM2) == config
    assert config.run_directory == asked(to, **settings).run_directory


@pytest.mark.parametrize(
    "to, settings, said",
    [
        (
            0.2,
            {},
            "expected cut.to of at least 0.458, which 128 of 1,536 neurons leave, got 0.2; take it, or leave out more blocks",
        ),
        (
            0.9,
            {"blocks": 1},
            "expected cut.to below 0.803, the share that stays with what else is cut, got 0.9; leave out cut.to",
        ),
        (
            0.9,
            {"pattern": "0.25/neuron"},
            "expected no other share of neurons where cut.to is 0.9, got 0.25/neuron; leave out one",
        ),
        (0.9, {"by": "neuron@1536"}, "expected cut.by with a multiple below 1,536, .*; take --cut.by neuron@192"),
        (
            0.9,
            {"by": "heads"},
            "expected cut.by to be neuron or head, or with a multiple such as neuron@64, got 'heads'; did you mean",
        ),
        (1.0, {}, "expected cut.to above 0 and below 1, got 1.0; 0.75 keeps three quarters of the weights"),
        (
            0.9,
            {"experts": 2},
            "expected cut.to or cut.experts, got 0.9 and 2: cut one in a run, and the other in a run of its exported",
        ),
    ],
)
def test_a_share_that_cannot_be_is_one_line(to, settings, said):
    with pytest.raises(UserError, match=f"^{said}"):
        on_model(asked(to, **settings), LIKE_SMOLLM2)


@pytest.mark.parametrize("to, left", [(0.93, 4), (0.87, 2), (0.8, 1)])
def test_a_number_of_heads_that_transformers_does_not_read_is_no_choice(to, left):
    """Of 8 heads, 7, 6, 5 and 3 do not divide the width of the model."""
    model = LlamaConfig(**LIKE_SMOLLM2.to_dict() | dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=8))
    assert on_model(asked(to, by="head"), model).recipe.layers[-1].pattern.kept(8) == left


def test_parts_that_a_family_cannot_lose_are_refused_with_others():
    model = BY_MODEL["Olmo2ForCausalLM"].configuration({})
    expected = (
        "expected a model whose heads can be cut where cut.by is head, got Olmo2.*, whose heads are .*; take --cut.by neuron$"
    )
    with pytest.raises(UserError, match=expected):
        on_model(asked(0.9, by="head"), model)


def test_the_least_share_that_is_named_works():
    assert on_model(asked(0.458), LIKE_SMOLLM2).recipe.layers[-1].pattern.kept(NEURONS) == 128
