"""Checkpoints that store a parameter of all experts as one tensor."""

import numpy as np

from optima_tpu.models import gpt_oss
from optima_tpu.models.checkpoints.stacks import Stacked, stacks_among, stacks_of, unstacked
from optima_tpu.models.family import Stack
from tests.support.tiny_models import MemoryTensors

PREFIX = "model.layers.0.mlp.experts."


def test_parts_of_experts_are_read_one_by_one_and_put_together_again():
    """Gate and up in one tensor, as [d_in, d_out] and as [d_out, d_in]."""
    array = np.random.default_rng(0).standard_normal((11, 4, 6))
    for turned in (True, False):
        stacks = {"experts.both": Stack(("experts.*.gate.weight", "experts.*.up.weight"), turned)}
        parts = unstacked(MemoryTensors({"x.experts.both": array}), stacks)
        each = array[7].T if turned else array[7]
        for name, expected in zip(("gate", "up"), np.split(each, 2)):
            name = f"x.experts.7.{name}.weight"
            assert parts.shape(name) == expected.shape
            np.testing.assert_array_equal(parts.read(name), expected)
            np.testing.assert_array_equal(parts.read(name, (slice(1, 2), slice(0, 3))), expected[1:2, :3])
        stacked = Stacked(parts, stacks_among(parts.stacks, stacks))
        assert stacked.names() == ("x.experts.both",) and stacked.shape("x.experts.both") == array.shape
        members = {name: parts.read(name) for name in stacked.members("x.experts.both")}
        np.testing.assert_array_equal(stacked.joined("x.experts.both", members), array)
        assert all(np.array_equal(members[name], part) for name, part in stacked.split("x.experts.both", array).items())


def test_experts_are_read_one_by_one_and_put_together_again():
    rng, experts = np.random.default_rng(0), 11  # two digits: 10 comes after 2
    arrays = {
        PREFIX + "gate_up_proj": rng.standard_normal((experts, 4, 6)),
        PREFIX + "gate_up_proj_bias": rng.standard_normal((experts, 6)),
        "model.norm.weight": rng.standard_normal(4),
    }
    source = MemoryTensors(arrays)
    parts = unstacked(source, gpt_oss.FAMILY.stacks)
    assert len(parts.names()) == 2 * experts + 1
    for number in range(experts):
        matrix, bias = (f"{PREFIX}{number}.gate_up_proj.{what}" for what in ("weight", "bias"))
        assert (parts.shape(matrix), parts.shape(bias)) == ((6, 4), (6,))
        np.testing.assert_array_equal(parts.read(matrix), arrays[PREFIX + "gate_up_proj"][number].T)
        np.testing.assert_array_equal(parts.read(matrix, (slice(1, 3),)), parts.read(matrix)[1:3])
        np.testing.assert_array_equal(parts.read(matrix, (..., slice(1, 3))), parts.read(matrix)[:, 1:3])
        np.testing.assert_array_equal(parts.read(bias), arrays[PREFIX + "gate_up_proj_bias"][number])

    stacked = Stacked(parts, stacks_among(parts.stacks, gpt_oss.FAMILY.stacks))
    assert stacked.names() == source.names()
    for name, array in arrays.items():
        assert (stacked.shape(name), stacked.dtype(name)) == (array.shape, array.dtype)
        members = {member: parts.read(member) for member in stacked.members(name)}
        np.testing.assert_array_equal(stacked.joined(name, members), array)
        assert all(np.array_equal(members[member], part) for member, part in stacked.split(name, array).items())


def test_only_models_that_stack_have_stacks():
    assert stacks_of(["GptOssForCausalLM"]) == gpt_oss.FAMILY.stacks
    assert not stacks_of(["LlamaForCausalLM"]) and not stacks_of(None)
    gate = "mlp.experts.*.gate_proj.weight"
    assert stacks_of(["Unknown"])["mlp.experts.gate_up_proj"] == Stack((gate, gate.replace("gate", "up")), turned=False)
