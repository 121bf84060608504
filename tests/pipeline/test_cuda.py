"""Every program that a run starts is lowered for GPUs that are not here."""

import functools
import importlib
import pkgutil

import jax
import pytest
from jax import export

import optima_tpu
from optima_tpu.launch import main
from optima_tpu.pipeline import memory_plan
from optima_tpu.pipeline.plan.compile import Compiled
from optima_tpu.pipeline.plan.model import open_declared
from optima_tpu.pipeline.plan.plan import make_plan
from optima_tpu.pipeline.plan.topology import CHIPS, Machine
from tests.support.meshes import mesh
from tests.support.plans import run_config
from tests.support.runs import SMALL
from tests.support.tiny_models import tiny_folder

JITTED = type(jax.jit(lambda x: x))


class Exporter:
    """Exports each program that jitted functions of the package run, once.

    Attributes:
      programs: the exported programs, by the function's name and by what it was called with.
    """

    def __init__(self):
        self.programs = {}
        self._wrapped = {}

    def wrap(self, jitted):
        """The same function, which exports first."""
        if id(jitted) not in self._wrapped:

            @functools.wraps(jitted)
            def exported(*arguments, **named):
                leaves, tree = jax.tree.flatten((arguments, named))
                # Inside of another program it is a part of that one.
                if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
                    kinds = [(leaf.shape, str(leaf.dtype)) if hasattr(leaf, "dtype") else repr(leaf) for leaf in leaves]
                    key = (jitted.__name__, str(tree), str(kinds))
                    if key not in self.programs:  # before the call, which may take its arguments' memory
                        self.programs[key] = export.export(jitted, platforms=("cuda",))(*arguments, **named)
                return jitted(*arguments, **named)

            self._wrapped[id(jitted)] = exported
        return self._wrapped[id(jitted)]


@pytest.fixture
def exporter(monkeypatch):
    exporting, jit = Exporter(), jax.jit

    def jit_here(function, **options):
        inner = function.func if isinstance(function, functools.partial) else function
        jitted = jit(function, **options)
        return exporting.wrap(jitted) if inner.__module__.startswith("optima_tpu") else jitted

    names = [module_info.name for module_info in pkgutil.walk_packages(optima_tpu.__path__, "optima_tpu.")]
    # All of them first: what is imported later would take the wrapped functions for its own.
    for module in [importlib.import_module(name) for name in names if not name.endswith("__main__")]:
        for attribute, value in list(vars(module).items()):
            if isinstance(value, JITTED):
                monkeypatch.setattr(module, attribute, exporting.wrap(value))
    monkeypatch.setattr(jax, "jit", jit_here)
    monkeypatch.setattr(memory_plan, "on_cpu", lambda mesh: False)  # passes as on accelerators
    return exporting


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, expected",
    [
        (["--preset", "distilled"], {"add_batch", "prune_group", "run_block", "backward", "update", "head_gradient"}),
        (["--preset", "fast", "--calibration.source", "self", "--allocation", "owl"], {"add_batch", "prune_group", "_write"}),
        (["--preset", "best"], {"add_batch", "prune_group"}),
        (["--preset", "paper"], {"add_batch", "prune_group", "run_block"}),
        (["--selector", "thanos", "--solver", "exact"], {"prune_group"}),
        (["--selector", "sparsegpt", "--solver", "adam"], {"prune_group"}),
        (["--selector", "admm", "--quantize", "int8", "--quantize.group", "null"], {"prune_group"}),
    ],
)
def test_every_program_of_a_run_is_lowered_for_gpus(exporter, tmp_path, settings, expected):
    model = tiny_folder(tmp_path / "model", dtype="bfloat16")
    assert main(["--model", str(model), "--output", str(tmp_path / "run"), *SMALL, "--mesh", "4x2", *settings]) == 0
    names = {name for name, *_ in exporter.programs}
    print(len(exporter.programs), "programs:", *sorted(names))
    assert expected <= names
    assert all(program.platforms == ("cuda",) for program in exporter.programs.values())


@pytest.mark.slow
def test_the_forward_pass_of_every_family_is_lowered_for_gpus(tmp_path):
    """Each kind of block is lowered with the Hessians of its layers.

    The kinds include mixtures, linear attention and latent attention.
    """
    pytest.importorskip("torch")  # which the references of the families import
    from tests.support.references import REFERENCES

    machine, exported = Machine("", CHIPS["v5e"], mesh(4, 2), 1, 0.5, here=True), []

    def read(what, call):
        if what.startswith("calibration"):
            exported.append(export.export(call.function, platforms=["cuda"])(*call.arguments))
        return Compiled(0.0)

    for reference in REFERENCES:
        config = reference.configuration(next(iter(reference.variants.values()), {}))
        config.architectures, before = [reference.model], len(exported)
        config.save_pretrained(tmp_path / reference.model)
        settings = run_config(str(tmp_path / reference.model), layers=(), dtype="bfloat16")
        make_plan(settings, open_declared(settings.model, settings.dtype, 2).on(machine.mesh), machine, compile_call=read)
        assert len(exported) > before, reference.model
    print(len(exported), "programs of", len(REFERENCES), "families")
