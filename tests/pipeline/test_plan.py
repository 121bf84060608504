"""A plan needs config.json alone, and says what a run's programs need."""

import dataclasses
import json
import math
import os
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants
from jax.sharding import AbstractMesh

from benchmarks.compiled import host_transfers, kernels, products
from optima_tpu.config.parse import configure
from optima_tpu.config.run_config import Calibration, CutStructures, Evaluation, RunConfig
from optima_tpu.data import PyDoc, evaluation_tokens
from optima_tpu.errors import UserError
from optima_tpu.method.distillation import KL
from optima_tpu.method.experts import PRICE_STEPS
from optima_tpu.method.layer_rules import parse_layers
from optima_tpu.method.patterns import Unstructured
from optima_tpu.method.prune_group import prune_group
from optima_tpu.method.recipe import Recipe
from optima_tpu.method.selectors import Wanda
from optima_tpu.method.solvers import CG, Solver, Unchanged
from optima_tpu.method.targets import DenseTarget, SelfTarget
from optima_tpu.pipeline import memory_plan
from optima_tpu.pipeline.calibrate import PassProgram, pass_batch, pass_programs
from optima_tpu.pipeline.distill.blocks import Trainer
from optima_tpu.pipeline.inputs import pruned_layers
from optima_tpu.pipeline.layer_groups import linear_groups
from optima_tpu.pipeline.memory_plan import GroupLoad, Kept, block_passes, kept_of_mixture
from optima_tpu.pipeline.plan import topology
from optima_tpu.pipeline.plan.compile import Compiled, compiled, compiler
from optima_tpu.pipeline.plan.counting import Work, counted
from optima_tpu.pipeline.plan.estimate import storage
from optima_tpu.pipeline.plan.hlo import collectives, moved, sent
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.pipeline.plan.plan import make_plan
from optima_tpu.pipeline.plan.program import Program
from optima_tpu.pipeline.plan.table import summary
from optima_tpu.pipeline.plan.texts import CHARACTERS, with_windows
from optima_tpu.pipeline.plan.topology import (
    CHIPS,
    READING,
    Machine,
    fitting_mesh,
    local_machine,
    parse_topology,
    topology_machine,
)
from optima_tpu.pipeline.programs import Call, Entering
from optima_tpu.pipeline.recover.config import as_run
from optima_tpu.pipeline.sums import Capture
from optima_tpu.plan import main
from optima_tpu.report.numbers import number
from tests.support import ROOT
from tests.support.meshes import mesh
from tests.support.plans import config_folder, run_config
from tests.support.pruning import group_arguments
from tests.support.runs import only_error
from tests.support.tiny_models import byte_tokenizer, tiny_folder, tiny_llama

SIZES = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256, head_dim=32)
SLICE = AbstractMesh((4, 2), ("data", "model"))
"""Eight chips that are not here."""


def machine_of(devices, name="there", **chip) -> Machine:
    return Machine(name, CHIPS["v5e"]._replace(**chip), devices, 1, 0.5)


def compiling(machine: Machine, *programs: str):
    """Compiles only the programs whose names begin with one of ``programs``.

    Other tests compile the others.
    """
    compile_call = compiler(machine, lambda line: None)
    return lambda what, call: compile_call(what, call) if what.startswith(programs) else None


@pytest.mark.parametrize("topology, splits", [("v5e:4x4", True), ("v6e:4x4", False), ("v5p:4x4x1", False)])
def test_a_mesh_splits_the_dimensions_of_a_v5e_alone(topology, splits):
    """As ``jax.make_mesh`` does."""
    if splits:
        assert tuple(topology_machine(topology, "8x2", compiling=False).mesh.shape.values()) == (8, 2)
    else:
        text = f"mesh 8x2 splits a dimension of {topology}, which jax.make_mesh does not do there: the nearest that fits is --mesh 4x4"
        with pytest.raises(UserError, match=text):
            topology_machine(topology, "8x2", compiling=False)


def test_a_loop_that_does_not_say_how_often_it_runs_is_named(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine(Solver):
        def __call__(self, problem, pruned):
            weight = jax.lax.while_loop(lambda weight: jnp.any(weight > 1), lambda weight: weight / 2, pruned.weight)
            return Unchanged()(problem, pruned._replace(weight=weight))

    for solver, named in ((CG(), 0), (Mine(), 1)):
        config = run_config(config_folder(tmp_path), solver=solver)
        plan = make_plan(config, open_declared(config.model, None, config.batch).on(SLICE), machine_of(SLICE))
        notes = [line for line in plan.to_json()["assumptions"] if "does not say how often it usually runs" in line]
        assert len(notes) == named and all("test_plan.py" in line for line in notes)


def test_products_that_only_choose_take_a_tpu_half_as_long():
    """A TPU's matrix unit takes three passes instead of six."""
    tpu = topology_machine("v5e:1x1", None, compiling=False)
    assert Work(rough=1e12).seconds(tpu) == Work(wide=1e12).seconds(tpu) / 2


@pytest.mark.parametrize("text", ["v5e-8", "v5litepod-8", "v5e:8", "v5e:0x2", "v5e:", "tpu7x:2x2x1", "h100:2x2"])
def test_a_topology_has_one_form(text):
    with pytest.raises(UserError, match="v5e:4x2"):
        parse_topology(text)
    assert parse_topology("V5p:4x4x4") == ("v5p", (4, 4, 4))


@pytest.mark.parametrize(
    ("text", "near"),
    [("v5e:4x3", "v5e:4x2 or v5e:4x4"), ("v6e:3x5", "v6e:2x4 or v6e:4x8"), ("v5p:3x4x3", "v5p:2x4x3 or v5p:4x4x3")],
)
def test_a_slice_has_whole_hosts(text, near):
    with pytest.raises(UserError, match=f"each of 2x2 chips, such as {near}, got '{text}'"):
        parse_topology(text)
    for each in ("v5e:1x1", "v5e:1x2", "v5p:2x2x3", *near.split(" or ")):
        assert parse_topology(each)


def test_a_plan_for_a_slice_that_nobody_lends_says_so():
    assert topology_machine("v5e:4x4", None, compiling=False).notes[1:] == ()
    note = topology_machine("v5e:6x4", None, compiling=False).notes[0]
    assert note == "Google Cloud has v5e slices of 1, 4, 8, 16, 32, 64, 128 and 256 chips, and none of 24"


@pytest.mark.parametrize(
    "mesh, shape, expected",
    [
        (None, (4, 2), (8, 1)),
        ("4x2", (4, 2), (4, 2)),
        ("4x4", (4, 2), (2, 4)),
        ("2x1", (4, 2), (4, 2)),
        ("64x2", (4, 2), (8, 1)),
        ("1x8", (4, 2), (1, 8)),
        ("3x2", (1, 1), (1, 1)),
        ("8x8", (4, 4, 4), (4, 16)),
        ("16x4", (4, 4, 4), (16, 4)),
    ],
)
def test_of_a_mesh_that_does_not_fit_the_nearest_is_named(mesh, shape, expected):
    nearest = f"{expected[0]}x{expected[1]}"
    assert fitting_mesh(nearest, shape, "v5e:4x2") == expected
    if mesh in (None, nearest):
        assert fitting_mesh(mesh, shape, "v5e:4x2") == expected
    else:
        with pytest.raises(UserError, match=f"mesh {mesh} .*: the nearest that fits is --mesh {nearest}$"):
            fitting_mesh(mesh, shape, "v5e:4x2")


def test_a_plan_for_the_devices_here_refuses_the_meshes_that_a_run_refuses():
    count = jax.device_count()
    for compiling in (True, False):
        with pytest.raises(UserError, match=f"mesh 3x{count} needs {3 * count} devices, there are {count}"):
            local_machine(f"3x{count}", np.dtype("float32"), compiling)


def test_times_on_a_busy_machine_are_those_without_the_other_programs(monkeypatch):
    # The clock of the process stands still while it waits for a core.
    rates = {True: (1.0,) * 4, False: (4.0,) * 4}
    monkeypatch.setattr(topology, "_measure", lambda dtype, clock: rates[clock is time.perf_counter])
    cores = os.cpu_count()

    def machine_at(load: float) -> Machine:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
        return local_machine(None, np.dtype("float32"), compiling=False)

    quiet, busy = machine_at(0.5 * cores), machine_at(3.0 * cores)
    assert busy.chip.wide == 4 * quiet.chip.wide
    assert len(quiet.notes) == 1 and "take" not in quiet.notes[0] and "about 4 times as long" in busy.notes[0]


def test_a_model_is_known_by_its_config_alone(tmp_path):
    model = open_declared(config_folder(tmp_path), None, 4)
    _, tensors = tiny_llama()
    declared = model.decoder.tensors
    assert {name: declared.shape(name) for name in declared.names()} == {name: a.shape for name, a in tensors.arrays.items()}
    assert model.dtype == jnp.bfloat16
    assert 3 * model.block_bytes() + model.end_bytes() == 2 * sum(array.size for array in tensors.arrays.values())
    with pytest.raises(UserError, match="config.json alone"):
        declared.read(declared.names()[0])
    assert open_declared(str(tmp_path), "float32", 4).dtype == jnp.float32
    with pytest.raises(UserError, match="no such path"):
        open_declared(str(tmp_path / "nothing"), None, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected a folder with a config.json"):
        open_declared(str(tmp_path / "empty"), None, 4)


def test_offline_a_plan_asks_for_the_one_file_that_it_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="correct the path, or .*`hf download org/name config.json --local-dir DIR`"):
        open_declared("org/name", None, 4)


def test_the_tokens_of_the_evaluation_are_those_of_the_run(tmp_path):
    """Exact with the tokenizer; without it, estimated from the characters.

    A text that would be downloaded is not counted.
    """
    (tmp_path / "bare").mkdir()
    whole, bare = str(tiny_folder(tmp_path / "whole")), config_folder(tmp_path / "bare")

    def windows(folder, source, most=None):
        config = RunConfig(folder, calibration=Calibration("c4", length=32), evaluation=Evaluation(source, windows=most))
        return with_windows(config, open_declared(folder, None, 4)).evaluation.windows

    in_run = len(evaluation_tokens(PyDoc(), byte_tokenizer(), length=32, windows=None).ids)
    assert windows(whole, "pydoc") == in_run and windows(bare, "pydoc") == pytest.approx(in_run / CHARACTERS, rel=0.01)
    assert windows(whole, "pydoc", 9) == windows(bare, "pydoc", 9) == 9
    np.save(tmp_path / "ids.npy", np.ones((5, 32), np.int32))
    assert windows(bare, f"npy:{tmp_path / 'ids.npy'}", 9) == 5
    assert windows(whole, None) is None and windows(whole, "file:elsewhere.txt") is None and windows(bare, "random", 3) == 3


def test_the_plan_of_simulated_devices(tmp_path):
    """Compiled for this mesh, the solver's loop has no collective."""
    config = run_config(config_folder(tmp_path))
    model = open_declared(config.model, None, config.batch).on(mesh(4, 2))
    plan = make_plan(config, model, machine_of(mesh(4, 2), "here"))
    calibration, down = plan.programs
    # 16 windows in steps of 2 on each of 4 slices, the held-out ones in one step, in each of 3 blocks.
    assert (calibration.calls, down.calls, down.rows, plan.batch) == (3 * 3, 3, math.ceil(36 / 8), 2)
    assert down.name == "down [36, 60]" and not plan.too_large
    assert down.compiled.inside == {} and down.compiled.outside["all-gather"] >= 1
    assert calibration.compiled.outside["all-reduce"] >= 1
    assert down.memory > down.compiled.memory - down.compiled.arguments > 0
    assert json.loads(json.dumps(plan.to_json()))["fits"]


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_the_flops_of_every_pass_are_those_that_the_compiler_counts(tmp_path, preset):
    """A pass ends at the last input that it needs.

    It reads the output of attention where an earlier pass keeps that output.
    """
    text = {"source": "random", "windows": 8, "length": 64, "held_out": 0}
    folder = config_folder(tmp_path, **SIZES, num_hidden_layers=1)
    few = (
        {} if preset == "fast" else {"selector": {"name": "wanda"}, "solver": None, "refine": None}
    )  # no calibration knows of them
    config = configure({"model": folder, "preset": preset, "calibration": text, **few})
    model, machine = open_declared(folder, None, config.batch).on(mesh(1, 1)), machine_of(mesh(1, 1), "here")
    plan = make_plan(config, model, machine, compile_call=compiling(machine, "calibration"))
    calibrations = [program for program in plan.programs if program.name.startswith("calibration")]
    assert len(calibrations) == {"fast": 1, "best": 4}[preset]
    ratios = [program.work.flops / program.compiled.flops for program in calibrations]
    assert all(0.85 < ratio < 1.15 for ratio in ratios), ratios


def test_the_plan_of_a_recovery_has_the_programs_of_its_steps(tmp_path):
    """Compiles the programs as training calls them; nothing is pruned.

    FLOPs and bytes are those that the compiler counts.
    """
    folder = config_folder(tmp_path, **SIZES, num_hidden_layers=2, vocab_size=512, max_position_embeddings=256)
    text = Calibration("random", length=129, held_out=4)

    def trainer_on(*shape):
        return Trainer(open_declared(folder, None, 1).on(mesh(*shape)).decoder, KL(batch=4))

    def plan(shape, room=0, compile_call=None):
        memory = (trainer_on(*shape).bytes_on_device() + room) / 2**30
        config = as_run(RunConfig(folder, batch=1, calibration=text, distill=KL(batch=4), device_memory=memory), "10k")
        model = open_declared(folder, None, config.batch).on(mesh(*shape))
        return make_plan(config, model, machine_of(mesh(*shape), "here"), recovering=True, compile_call=compile_call)

    alone, split = plan((1, 1)), plan((4, 2))
    steps = 10_000 // 129 // 4 + KL().trials
    # Steps of 4 windows: one after another on one device, all at once on the mesh.
    assert [program.calls for program in alone.programs] == [4 * steps, 2 * 4 * steps, 2 * 4 * steps, 2 * steps]
    assert [program.calls for program in split.programs] == [steps, 2 * steps, 2 * steps, 2 * steps]
    head, forward, backward, adam = alone.programs
    # The TPU's compiler computes the dense model's logits again for the gradient, the CPU's does not.
    for program, most in ((head, 1.25), (forward, 1.15), (backward, 1.15)):
        assert 0.85 < program.work.flops / program.compiled.flops < most, program.name
    assert 0.5 < adam.work.traffic / adam.compiled.accessed < 3
    assert alone.seconds.keys() >= {"training", "dense model and checks of the training"} and "pruning" not in alone.seconds
    # What training holds is split over the devices. The mesh gathers a block's weights and sums its gradients.
    trainer = trainer_on(4, 2)
    assert adam.memory > split.programs[3].memory > trainer.bytes_on_device()
    assert not any(alone.programs[index].compiled.moved for index in range(4))
    assert split.programs[1].compiled.moved["all-gather"] >= 2 * sum(map(math.prod, trainer.decoder.block_shapes.values())) / 2
    assert split.programs[3].compiled.moved == {}
    communication = "communication of these programs"
    assert split.seconds[communication] > 0 and "GB/s to a neighbour" in split.assumptions[-1]
    assert communication not in alone.seconds and not any("neighbour" in words for words in alone.assumptions)
    block = trainer.struct()
    opened = trainer.open(
        {
            name: jax.device_put(np.zeros(shape, jnp.bfloat16), jax.NamedSharding(mesh(4, 2), trainer.decoder.sharding(name)))
            for name, shape in trainer.decoder.block_shapes.items()
        },
        {name: np.ones(array.shape, bool) for name, array in block.keep.items()},
    )
    for planned, real in zip(jax.tree.leaves(block), jax.tree.leaves(opened), strict=True):
        assert (planned.shape, planned.dtype) == (real.shape, real.dtype)
        assert not real.ndim or real.sharding.is_equivalent_to(planned.sharding, real.ndim)  # the count of steps is anywhere
    assert "or --distill.train norms" in plan((4, 2), room=-1, compile_call=lambda what, call: None).refused
    # On CPU devices each block keeps what its backward pass reads, as long as there is room.
    one = trainer_on(1, 1)
    size = one.bytes_kept(one.struct(), jax.ShapeDtypeStruct((1, 129, 128), jnp.bfloat16), one.decoder.config.positions(0, 129))
    plans = [plan((1, 1), room, lambda what, call: None) for room in (0, 1.5 * size, 9 * size)]
    memory = np.array([[program.memory for program in each.programs] for each in plans])
    assert (np.diff(memory, axis=0) == size).all()


def test_a_setting_of_recover_is_told_by_the_name_that_it_has_in_a_plan(capsys):
    assert main(["--model", "nowhere", "--recover", "50M", "--length=1024"]) == 2
    assert "type --calibration.length" in only_error(capsys.readouterr().err)


def test_the_windows_of_a_planned_recovery_are_those_that_recover_takes(monkeypatch, tmp_path, capsys):
    """Also for the default model, which is pruned with 512-token windows.

    Another model's file stands in for it here.
    """
    monkeypatch.setattr("optima_tpu.pipeline.plan.plan.make_plan", lambda *_, **__: sys.exit())  # the greeting comes before it
    model = config_folder(tmp_path, max_position_embeddings=4096)
    monkeypatch.setattr("optima_tpu.pipeline.plan.model.open_declared", lambda spec, *rest: open_declared(model, *rest))
    for words, length in ([], 2048), ([model], 2048), ([model, "--calibration.length", "512"], 512):
        with pytest.raises(SystemExit):
            main([*words, "--recover", "1M", "--topology", "v5e:1x1", "--no-compile"])
        windows = KL().filled(10**6 // length)
        assert f"{windows} x {length} tokens, and 8 windows held out" in capsys.readouterr().out


def window_flops(model, length, wanted=None, known=()):
    """FLOPs of a window in a block, up to inputs ``wanted`` or the output."""
    decoder, (state, hidden, positions) = model.decoder, Entering.of(model.decoder, length, 1)
    inputs = {name: jax.ShapeDtypeStruct((1, length, decoder.input_width(name)), hidden.dtype) for name in known}
    program = PassProgram(decoder.graph, decoder.mesh, tuple(wanted or ()), output=wanted is None)
    return counted(Call(pass_batch, (program, state, hidden, positions, inputs)), machine_of(decoder.mesh)).work.flops


def test_a_token_counts_at_its_own_experts_alone(tmp_path):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=64)
    length, products = 512, 3 * 2 * 64 * 96  # FLOPs of a token in one expert

    def model(few):
        own = dict(model_type="mixtral", intermediate_size=96, num_local_experts=16, num_experts_per_tok=few)
        config = sizes | own | dict(architectures=["MixtralForCausalLM"], dtype="float32")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return open_declared(str(tmp_path), None, 1)

    two, four = (window_flops(model(few), length) for few in (2, 4))
    assert four - two == pytest.approx(2 * length * products)
    groups = linear_groups(model(4).decoder)
    before, between = (window_flops(model(4), length, groups[at][:1]) for at in (2, 3))
    assert before == two - 2 * length * products and 1 <= (between - before) / (4 * length * products * 2 / 3) < 1.1
    assert [model(4).decoder.config.reach(names[0]) for names in groups[:4]] == [1, 1, 0.25, 0.25]


def test_a_plan_that_removes_experts_is_of_the_smaller_model(tmp_path):
    sizes = dict(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=64, intermediate_size=96
    )
    own = dict(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2, architectures=["MixtralForCausalLM"])
    (tmp_path / "config.json").write_text(json.dumps(sizes | own | dict(dtype="bfloat16")))
    base = run_config(str(tmp_path), layers=parse_layers("self_attn.*=dense,*.w1=dense,*.w3=dense", "row"))
    dense, cut = (
        make_plan(
            config, open_declared(config.model, None, config.batch).on(SLICE), machine_of(SLICE), compile_call=lambda *call: None
        )
        for config in (base, base.changed(cut=CutStructures(experts=0.5, score="price", refit=3)))
    )
    assert cut.serving and not dense.serving
    whole, left = cut.serving
    router = 3 * 4 * 64 * 2  # bytes of the rows that leave, of three blocks
    assert whole.weights - left.weights == 3 * 4 * 3 * 64 * 96 * 2 + router
    assert whole.active - left.active == router and whole.cache == left.cache
    steps, (scores, prices, missed, step, *others) = 2, cut.programs  # 16 windows, 2 on each of 4 slices at a time
    # The last step of a system stands in another program: it takes half of the products.
    assert [each.calls for each in (scores, prices, missed, step)] == [3 * steps * times for times in (1, PRICE_STEPS, 1, 2)]
    tokens = 2 * 32 * 2  # of a device, at 2 experts each; the products of a step are split over 2 devices
    assert step.work.narrow == pytest.approx(2 * 2 * tokens * 64 * 96 / 2, rel=0.1) and not step.work.wide
    assert [each.calls for each in (others[-1], dense.programs[-1])] == [3 * 4, 3 * 8]  # of the solver, for w2 of every expert
    assert cut.seconds["removing experts"] > 0 and "removing experts" not in dense.seconds
    decoder = open_declared(base.model, None, base.batch).on(SLICE).decoder
    # For 6 windows on a slice: the stream and the output of attention, split over 2 devices, two experts' inputs, and a float32
    # output.
    size = 6 * 32 * (2 * (32 + 32 + 2 * 96) + 4 * 32)
    kept = [kept_of_mixture(decoder, decoder.family.experts.down, (16, 32), budget) for budget in (4 * size, 4 * size - 4)]
    assert kept == [size, 0]
    assert any("a token passes through" in line for line in summary(cut))


def test_a_shared_expert_counts_for_every_token_and_blocks_count_as_they_are(tmp_path):
    def model(shared):
        heads = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=3, vocab_size=64)
        experts = dict(n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=shared)
        experts |= dict(intermediate_size=80, moe_intermediate_size=24)
        named = dict(model_type="glm4_moe", architectures=["Glm4MoeForCausalLM"], dtype="float32", first_k_dense_replace=1)
        (tmp_path / "config.json").write_text(json.dumps(heads | experts | named))
        return open_declared(str(tmp_path), None, 1)

    one, three, length = model(1), model(3), 64
    for index, more in ((0, 0), (1, 2 * 3 * 48 * 24)):  # weights of two more experts' widths
        before, after = (window_flops(each.at(index), length) for each in (one, three))
        assert after - before == 2 * length * more
        assert three.at(index).block_bytes() - one.at(index).block_bytes() == 4 * more
    assert one.all_blocks_bytes() == one.at(0).block_bytes() + 2 * one.at(2).block_bytes()
    # The drift of the residual stream at a shared expert's down has the experts' outputs in it: two experts of three matrices.
    down, experts = ("mlp.shared_experts.down_proj",), 2 * length * 2 * 3 * 48 * 24
    read, own = (
        pass_programs(one.at(1).decoder, Capture((down,), target), Kept())[0].names
        for target in (DenseTarget(gamma=0.5), SelfTarget())
    )
    assert read == (*down, "before_shared") and own == down
    without, within = (window_flops(one.at(1), length, names) for names in (down, read))
    assert 1 < (within - without) / experts < 1.25  # beside the experts' products that of the router
    names = linear_groups(one.at(1).decoder)
    assert {(len(group), one.at(1).decoder.config.reach(group[0])) for group in names} == {
        *((size, 1.0) for size in (3, 1, 2)),
        *((size, 2 / 6) for size in (2, 1)),
    }


def test_every_chunk_of_linear_attention_counts_where_its_output_is_needed(tmp_path):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64, intermediate_size=96)
    delta = dict(layer_types=["linear_attention"], linear_num_key_heads=2, linear_num_value_heads=4)
    delta |= dict(linear_key_head_dim=16, linear_value_head_dim=16)
    named = dict(model_type="qwen3_5_text", architectures=["Qwen3_5ForCausalLM"], dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(sizes | delta | named))
    model = open_declared(str(tmp_path), None, 1)
    _, *behind = linear_groups(model.decoder)
    one, eight = (window_flops(model, chunks * 64) for chunks in (1, 8))
    assert eight == pytest.approx(8 * one, rel=1e-4)
    # A block whose output of attention is known computes none of it.
    rest = sum(2 * 512 * math.prod(model.decoder.block_shapes[name + ".weight"]) for group in behind for name in group)
    assert 1 <= window_flops(model, 512, known=behind[0]) / rest < 1.1


def test_the_passes_of_a_block_are_found_in_one_look_at_its_weights_however_many_experts_it_has(tmp_path, monkeypatch):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=64)
    own = dict(model_type="mixtral", intermediate_size=96, num_local_experts=16, num_experts_per_tok=2, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(sizes | own | dict(architectures=["MixtralForCausalLM"])))
    decoder, looks, look = open_declared(str(tmp_path), None, 1).decoder, [], memory_plan.block_bytes
    monkeypatch.setattr(memory_plan, "block_bytes", lambda *given: looks.append(look(*given)) or looks[-1])
    groups = linear_groups(decoder)
    passes = block_passes(decoder, 0, groups, Recipe(Unstructured(0.5), Wanda(), CG()), 5e6)
    assert len(looks) == 1 and len(passes) > 1
    assert tuple(names for part in passes for names in part.groups) == groups
    # A pass takes groups as long as their statistics, of two sets of tokens, fit its share.
    bytes_held = [sum(2 * 4 * decoder.input_width(names[0]) ** 2 for names in part.groups) for part in passes]
    assert max(bytes_held) <= 0.25 * 5e6 < bytes_held[0] + 8 * 96**2


def test_what_does_not_fit_is_said_with_numbers(tmp_path):
    config = run_config(config_folder(tmp_path))
    model, small = open_declared(config.model, None, config.batch).on(SLICE), machine_of(SLICE, memory=1000)
    plan = make_plan(config, model, small)
    assert len(plan.too_large) == 2 and not plan.to_json()["fits"]
    assert "and its block with the other Hessians alone takes" in plan.refused and "--device_memory" in plan.refused
    shown = "\n".join(summary(plan))
    assert "does not fit down [36, 60]" in shown and "try --batch 1 and --mesh 2x4, which splits more over the same" in shown

    text = dataclasses.replace(config.calibration, source="self")
    whole = make_plan(dataclasses.replace(config, calibration=text, device_memory=1e-5), model, machine_of(SLICE))
    assert "to write its own calibration text" in whole.refused and not whole.to_json()["fits"]
    assert any("windows that the model writes at once" in words for words in whole.assumptions)

    def refuse():
        needed = "the total memory required for HLO temporaries (37.29G) exceeds available HBM (15.75G)."
        resource_exhausted = 8  # the second argument is the status, as where XLA raises it
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {needed}", resource_exhausted)

    assert compiled(refuse).refused == "needs 37.29GiB of 15.75GiB"
    assert compiled(lambda: jnp.zeros(1 << 50)).refused.startswith("RESOURCE_EXHAUSTED: ")  # XLA's own error
    with pytest.raises(jax.errors.JaxRuntimeError):
        compiled(lambda: jax.jit(jnp.negative).lower(1.0), options={"no_such_option": True})
    full = dataclasses.replace(plan, programs=(plan.programs[0]._replace(compiled=compiled(refuse)),))
    assert "does not fit calibration step: needs 37.29GiB" in "\n".join(summary(full))


def test_each_token_that_the_model_writes_reads_weights_and_cache_of_a_device(tmp_path):
    config = run_config(config_folder(tmp_path, **SIZES, vocab_size=512))
    machine = machine_of(SLICE)
    model = open_declared(config.model, None, config.batch).on(machine.mesh)

    def plan(written: int):
        text = dataclasses.replace(config.calibration, written=written)
        return make_plan(dataclasses.replace(config, calibration=text), model, machine)

    # Of the embedding's table the tokens' rows alone; of 8 windows' keys and values an eighth.
    table = math.prod(model.decoder.end_shapes["model.embed_tokens.weight"]) * model.dtype.itemsize
    weights, cache = model.bytes - table, model.serving(config.calibration.window_length).cache
    without, beside = plan(0), plan(8)
    seconds = (config.calibration.window_length - 1) * (weights / 2 + cache) / (0.5 * machine.chip.bandwidth)
    assert 1 < beside.seconds["text that the model writes"] / seconds < 1.5
    assert beside.seconds["reading weights"] - without.seconds["reading weights"] == pytest.approx(model.bytes / READING)
    assert "text that the model writes" not in without.seconds
    fitted = config.calibration.windows
    grown = (fitted + 8 + config.calibration.held_out) / (fitted + config.calibration.held_out)
    assert beside.storage.hidden == pytest.approx(grown * without.storage.hidden)


def test_the_plan_of_fewer_blocks_is_that_of_the_shallower_model_and_of_the_choice(tmp_path):
    """The dense model keeps its depth, and is read again for each choice."""

    def plan(depth, left_out=0):
        config = run_config(config_folder(tmp_path, num_hidden_layers=depth), cut=CutStructures(left_out))
        return make_plan(config, open_declared(config.model, None, config.batch).on(SLICE), machine_of(SLICE))

    deep, cut, shallow = plan(4), plan(4, left_out=2), plan(2)
    assert cut.programs == shallow.programs and cut.storage.disk == shallow.storage.disk
    assert cut.serving[1].weights == sum(shallow.model.serving(32)[:1]) < cut.serving[0].weights == deep.model.serving(32).weights
    for stage in ("calibration", "pruning", "pruned blocks forward"):
        assert cut.seconds[stage] == shallow.seconds[stage], stage
    for stage in ("perplexity, dense and pruned", "reading weights"):
        assert shallow.seconds[stage] < cut.seconds[stage], stage
    assert cut.seconds["perplexity, dense and pruned"] < deep.seconds["perplexity, dense and pruned"]
    assert cut.seconds["blocks that are left out"] > 0 and "blocks that are left out" not in deep.seconds
    assert cut.to_json()["blocks"] == 4


def test_a_plan_that_fits_closely_says_so(tmp_path):
    config = run_config(config_folder(tmp_path))
    plan = make_plan(config, open_declared(config.model, None, config.batch).on(SLICE), machine_of(SLICE))
    for share, warned in (0.5, False), (0.9, True):
        memory = int(max(program.memory for program in plan.programs) / share)
        lines = summary(dataclasses.replace(plan, machine=machine_of(SLICE, memory=memory)))
        assert any("leave a quarter free" in line for line in lines) == warned
        assert lines[0].startswith("fits closely" if warned else "fits  ")
    # The programs of a CPU's devices and what a host holds are in one memory.
    taken = sum(plan.storage.host.values()) + SLICE.size * max(program.memory for program in plan.programs)
    here = dataclasses.replace(plan, machine=machine_of(SLICE, memory=2**40)._replace(here=True))
    assert f"in all about {number(taken / 2**30)} of {number(8 * 2**10)} GiB" in "\n".join(summary(here))
    small = dataclasses.replace(plan, machine=machine_of(SLICE, memory=1))
    assert "--mesh 2x4, which splits more over the same devices, or more devices" in "\n".join(summary(small))


def test_collectives_are_told_apart_by_loops():
    def program(x):
        total = jax.lax.psum(x, "data")
        return jax.lax.fori_loop(0, 3, lambda _, y: y + jax.lax.psum(y, "model"), total)

    sharded = jax.jit(jax.shard_map(program, mesh=mesh(4, 2), in_specs=jax.P("data"), out_specs=jax.P(), check_vma=False))
    text = sharded.lower(jnp.ones((8, 4))).compile().as_text()
    assert collectives(text) == ({"all-reduce": 1}, {"all-reduce": 1})
    assert moved(text) == {"all-reduce": 2 * 2 * 4 * 4}  # [2, 4] float32 each; the loop's counts once


def test_what_a_tpu_sums_and_slices_is_a_reduce_scatter():
    """In TPU programs a computation has this name, but no instruction has."""
    text = """
%all-reduce-scatter.3 (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0} all-reduce(%input), channel_id=17, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %part = f32[2,16]{1,0} dynamic-slice(%all-reduce.1, %place, %zero), dynamic_slice_sizes={2,16}
}

ENTRY %main (input: f32[8,16]) -> (f32[2,16], bf16[4]) {
  %scattered = f32[2,16]{1,0} fusion(%input), kind=kCustom, calls=%all-reduce-scatter.3
  %all-reduce.2 = bf16[4]{0} all-reduce(%small), channel_id=18, replica_groups={{0,1}}, to_apply=%add
}
"""
    assert collectives(text) == ({}, {"reduce-scatter": 1, "all-reduce": 1})
    assert moved(text) == {"reduce-scatter": 4 * 8 * 16, "all-reduce": 2 * 4}
    assert sent(moved(text)) == 4 * 8 * 16 + 2 * 2 * 4


def test_the_collectives_of_a_plan_take_their_bytes_over_a_link():
    compilation = Compiled(1.0, moved={"all-gather": 1_000, "all-reduce": 500})
    program = Program("step", "training", 10, None, None, Work(), 0, compilation)
    machine = machine_of(mesh(4, 2))
    assert CHIPS["v5e"].link == 50e9  # of 400 GB/s, by four links in two directions
    assert program.communication(machine) == pytest.approx(10 * 2_000 / 50e9)
    assert program._replace(compiled=None).communication(machine) == 0
    assert program.communication(machine._replace(chip=CHIPS["v4"])) == 0


def test_products_kernels_and_transfers_are_read_from_the_text():
    """Lines as the TPU's compiler writes them."""
    text = """
  %fusion.62 = bf16[256,512]{1,0:T(8,128)(2,1)} fusion(%p.1), kind=kLoop
  %p.2 = f32[512,512]{1,0:T(8,128)} parameter(1)
  %convolution.49 = f32[256,512]{0,1:T(8,128)} convolution(%fusion.62, %fusion.62), dim_labels=bf_oi->bf, operand_precision={highest,highest}
  ROOT %convolution.50 = f32[256,512]{0,1} convolution(%fusion.62, %p.2), dim_labels=bf_oi->bf, operand_precision={high,high}
  %convolution.51 = f32[512,512]{0,1} convolution(%p.2, /*index=1*/%p.2), dim_labels=bf_oi->bf
  %splash_mha_fwd.1 = bf16[2,8,512,64]{3,2,1,0} custom-call(%fusion.62), custom_call_target="tpu_custom_call"
  %send.1 = (f32[8], u32[], token[]) send(%p.2, %token), channel_id=1, is_host_transfer=true
  %send.2 = (f32[8], u32[], token[]) send(%p.2, %token), channel_id=2
  %custom-call.3 = f32[] custom-call(%p.2), custom_call_target="xla_python_cpu_callback"
"""
    assert products(text) == {("bf16", 1): 1, ("f32", 3): 1, ("f32", 1): 1}
    assert kernels(text) == {"splash_mha_fwd": 1} and host_transfers(text) == ["send", "xla_python_cpu_callback"]


def test_counted_products_and_memory_agree_with_the_compiler():
    """Without a solver nothing loops, so the compiler counts everything."""
    rows, size = 64, 256
    problem = jax.ShapeDtypeStruct((rows, size), jnp.float32)
    hessian = jax.ShapeDtypeStruct((size, size), jnp.float32)
    recipe = Recipe(Unstructured(0.5), Wanda(), None)
    shapes, grid = ((problem,), hessian), mesh(1, 1)
    without_solver = compiled(lambda: prune_group.lower(*group_arguments(*shapes, recipe, grid, held_out=hessian)))
    call = Call(prune_group, group_arguments(*shapes, recipe, grid, held_out=hessian))
    work, _ = counted(call, machine_of(grid, "here")._replace(here=True))
    assert 0.95 < work.flops / without_solver.flops < 1.05
    recipe = Recipe(Unstructured(0.5), Wanda(), CG())
    with_solver = compiled(lambda: prune_group.lower(*group_arguments(*shapes, recipe, grid)))
    assert 0.5 < GroupLoad(size, rows, recipe.footprint()).bytes(grid, False, rows) / with_solver.memory < 2


def test_without_libtpu_the_plan_is_counted_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    folder, file = config_folder(tmp_path), tmp_path / "plan.json"
    arguments = ["--model", folder, "--topology", "v5e:4x2", "--mesh", "2x4", "--preset", "fast"]
    arguments += ["--calibration.source", "random"]
    assert main([*arguments, "--json", str(file)]) == 0
    printed, plan = capsys.readouterr().out, json.loads(file.read_text())
    assert "no --calibration.length was given: windows of 128 tokens, the model's context\n" in printed
    assert "random, 128 x 128 tokens" in printed
    assert "libtpu is not installed, so nothing was compiled" in printed and "pip install '.[tpu]'" in printed
    assert plan["mesh"] == {"data": 2, "model": 4} and plan["programs"][0]["compiled"] is None
    # q, k, v; o; gate and up; down, in each of three blocks.
    assert [program["calls"] for program in plan["programs"]][1:] == [3, 3, 3, 3]
    assert all(stage in printed for stage in plan["seconds"]) and plan["assumptions"][0] in printed
    assert f"in all it writes {plan['storage']['written']:.2f} times the model's own bytes" in printed
    assert main([*arguments, "--device_memory", "0.000001"]) == 1
    printed = capsys.readouterr().out
    assert "and its block with the other Hessians alone takes" in " ".join(printed.split())
    assert printed.index("the run would be refused: ") < printed.index("TFLOP") and "fits  " not in printed
    assert main([*arguments, "--json", str(tmp_path / "no" / "plan.json")]) == 2
    assert "expected --json in an existing folder" in capsys.readouterr().err
    assert main([*arguments, "--json", str(file), "--calibration.length", "129"]) == 2  # a plan may be replaced by a plan
    assert "expected --calibration.length of at most 128, the model's context, got 129" in capsys.readouterr().err
    for words, message in (
        (["--topology", "v5e-8"], "a topology KIND:AxB or KIND:AxBxC, such as v5e:4x2 or v5p:4x4x4, got 'v5e-8'; type v5e:2x4\n"),
        (["--topology", "v5litepod-16"], "type v5e:4x4"),
        (["--topology", "v5e:4x2", "--mesh", "4x4"], "error: mesh 4x4 needs 16 devices, v5e:4x2 has 8: the nearest that fits"),
        (["--topolgy", "v5e:4x2"], "there is no setting --topolgy; did you mean --topology?"),
        (["--recover", "2kk"], "expected --recover as a number such as 200k, 50M or 1000000, got 2kk"),
    ):
        assert main([*arguments[:2], *words]) == 2
        assert message in capsys.readouterr().err


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""What a plan reads of Llama-3.1-8B's config.json."""


def test_the_readmes_plan_is_that_of_its_page_and_has_its_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    readme, page = (ROOT / name for name in ("README.md", "docs/guides/plans.md"))
    (line,) = re.findall(r"^optima plan (.*)$", readme.read_text(), re.M)
    command, _, comment = line.partition("  # ")
    assert f"\noptima plan {command}\n" in page.read_text()
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert main(command.replace("meta-llama/Llama-3.1-8B", str(tmp_path)).split()) == 0
    printed = capsys.readouterr().out
    memory = re.search(r"at most ([\d.]+) of 16.0 GiB, counted, in", printed)[1]
    time = re.search(r"Time, about ([\d:]+ min) in all", printed)[1]
    assert f"{memory} of 16 GiB" in comment and time in comment and "counted" in comment
    (row,) = re.findall(r"^\| Llama-3.1-8B .*$", page.read_text(), re.M)
    assert f"| {memory} of 16 GiB |" in row and f"| {time} |" in row
    assert "All numbers are counted by a simple model, and none is compiled." in printed


def test_the_export_is_as_large_as_planned(finished):
    """Exported files are the only ones of a run that nothing compresses."""
    config = RunConfig(str(finished.model), calibration=Calibration("random", windows=8, length=32))
    model = open_declared(config.model, None, config.batch)
    planned = storage(model, config, machine_of(SLICE), pruned_layers(config, model.decoder)).disk["export for transformers"]
    written = sum(path.stat().st_size for path in (finished.directory / "hf").glob("*.safetensors"))
    assert 0.9 < planned / written < 1.1


@pytest.mark.skipif(not topology.has_libtpu(), reason="needs libtpu: pip install '.[tpu]'")
def test_a_slice_that_is_not_here(tmp_path):
    """With replicated Hessians, the TPU's solver loop has no collective."""
    config = run_config(config_folder(tmp_path), solver=CG(cycle=1), mesh="2x2")
    target = topology_machine("v5e:2x2", config.mesh)
    assert (target.hosts, target.notes) == (1, ())
    assert topology_machine("v5e:1x1", None).mesh.size == 1
    model, texts = open_declared(config.model, None, config.batch).on(target.mesh), []

    def read(what, call):
        texts.append(call.lower().compile().as_text())
        return Compiled(0.0, inside=collectives(texts[-1])[0])

    plan = make_plan(config, model, target, compile_call=read)
    assert [program.compiled.inside for program in plan.programs] == [{}, {}] and not plan.too_large
    # The calibration of a model in bfloat16 has no float32 product; a solver's products either count or only choose.
    assert [{dtype for dtype, _ in products(text)} for text in texts] == [{"bf16"}, {"bf16"}, {"f32"}]
    assert {passes for _, passes in products(texts[2])} == {3, 6} and not any(map(host_transfers, texts))
    with pytest.raises(UserError, match="a TPU slice that exists"):
        topology._describe("v5e:3x5", "v5e", (3, 5))


def test_the_least_effort_is_an_option_of_this_compiler():
    jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile(dict(topology.QUICK))
