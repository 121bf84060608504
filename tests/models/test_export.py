import collections
import json
import os
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from optima_tpu.errors import UserError
from optima_tpu.export import main
from optima_tpu.method.patterns import NM, Unstructured
from optima_tpu.models.checkpoints.export import export, is_export_of
from optima_tpu.models.checkpoints.forms import Options
from optima_tpu.models.checkpoints.orbax import CheckpointTensors
from optima_tpu.pipeline.journal import open_journal
from optima_tpu.report.contents import Perplexities
from optima_tpu.report.file import write_report
from optima_tpu.runtime import checksums
from optima_tpu.unpack import unpack
from tests.support.fake_reports import ENTRIES
from tests.support.fake_run import (
    ASSETS,
    BLOCKS,
    MANIFEST,
    assert_same,
    begun,
    block_report,
    finished_run,
    on_host,
    pruned_block,
    small_model,
    write_checkpoint,
)
from tests.support.meshes import mesh
from tests.support.runs import folder_tensors, only_error, snapshot
from tests.support.tiny_models import MemoryTensors


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished") / "run"
    finished_run(directory, small_model(), model="owner/small@v1.0", secret="/home/me")
    write_report(directory / "report.json", ENTRIES | {"perplexity": Perplexities(12.5, 14.25)}, ())
    return directory


@pytest.fixture
def card(run, tmp_path):
    """Exports a copy of the run with other assets. Returns its model card."""

    def exported(assets: dict[str, bytes]) -> str:
        copy = shutil.copytree(run, tmp_path / "run")
        checksums.keep(copy, {f"assets/{name}": data for name, data in assets.items()})
        export(copy, tmp_path / "out")
        return (tmp_path / "out" / "README.md").read_text()

    return exported


@pytest.mark.parametrize("limit", ["5GB", 900])
def test_every_tensor_is_exported_in_its_dtype_bit_for_bit(run, tmp_path, limit):
    source = small_model()
    export(run, tmp_path / "out", Options(limit))
    tensors = folder_tensors(tmp_path / "out")
    assert set(tensors) == set(source.names())
    pruned = {}
    for block in range(BLOCKS):
        pruned |= pruned_block(source, block)[0]
    for name in source.names():
        if name not in pruned:
            assert_same(tensors[name], source.arrays[name])
            continue
        assert tensors[name].dtype == source.dtype(name)
        np.testing.assert_array_equal(tensors[name], pruned[name])
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if limit == "5GB":
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files and len(files) > 2
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "out" / file, framework="np") as opened:
                assert opened.metadata() == {"format": "pt"} and name in opened.keys()


def test_pruned_entries_are_positive_zeros_and_kept_ones_keep_their_sign(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = np.array([[-0.0, -0.0, -1, 2]], ml_dtypes.bfloat16)
    keep = np.array([[False, True, True, False]])
    source = MemoryTensors({name: weight})
    journal, report = begun(tmp_path / "run"), block_report(0, {"self_attn.q_proj": keep})
    journal.save(0, {name: np.where(keep, weight, -0 * weight)}, {name: keep}, report, on_host(np.zeros((1, 1, 1))))
    write_checkpoint(journal, source, mesh(1, 1))
    export(tmp_path / "run", tmp_path / "out")
    assert_same(folder_tensors(tmp_path / "out")[name], np.array([[0.0, -0.0, -1, 0.0]], ml_dtypes.bfloat16))
    (layer,) = json.loads((tmp_path / "out" / "optima_tpu.json").read_text())["layers"]
    assert (layer["pruned"], layer["sparsity"]) == (3, 0.75)  # zeros of the file, a kept one too


def test_a_transposed_view_is_exported_as_it_looks(run, tmp_path, monkeypatch):
    expected = small_model().arrays["model.embed_tokens.weight"]
    load = CheckpointTensors.load
    monkeypatch.setattr(
        CheckpointTensors,
        "load",
        lambda self, names: {name: np.asfortranarray(array) for name, array in load(self, names).items()},
    )
    export(run, tmp_path / "out")
    assert_same(folder_tensors(tmp_path / "out")["model.embed_tokens.weight"], expected)


def test_the_folder_describes_itself(run, tmp_path):
    export(run, tmp_path / "out")
    for name, data in ASSETS.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    sidecar = json.loads((tmp_path / "out" / "optima_tpu.json").read_text())
    assert sidecar["manifest"] == MANIFEST and sidecar["model"] == "owner/small@v1.0"
    assert len(sidecar["layers"]) == 2 * BLOCKS
    layer = next(layer for layer in sidecar["layers"] if layer["name"] == "model.layers.2.mlp.down_proj.weight")
    assert layer["shape"] == [12, 20] and layer["pruned"] == 120 and layer["sparsity"] == 0.5
    assert layer["error_after"] == pytest.approx(0.12)
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1]
    for line in ("base_model: owner/small", "library_name: transformers", "- pruned", "- sparse", "- optima-tpu"):
        assert line in front.splitlines()
    assert "12.500" in card and "14.250" in card and "50.00%" in card and "| pattern | 0.5 |" in card
    assert "not smaller" in card and "pruning_masks.npz" in card and "No file of the source names a licence." in card
    everything = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"sparsity_config" not in everything and b"/home/me" not in everything
    assert is_export_of(run, tmp_path / "out") and not is_export_of(run, tmp_path)


@pytest.mark.parametrize("folder", ["", "journal", "checkpoint/hf", "hf/again"])
def test_an_export_does_not_go_into_the_run_that_it_is_made_from(run, folder):
    before = snapshot(run)
    with pytest.raises(UserError, match="expected a folder outside of the run directory"):
        export(run, run / folder)
    assert snapshot(run) == before


def test_markup_in_a_models_name_is_text_in_its_card(tmp_path):
    name = "<script>x<b>[a](b)`c`\n# d|*e*_f_"
    finished_run(tmp_path / "run", small_model(), model=f"wheel:{name}")
    export(tmp_path / "run", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[2]
    assert r"&lt;script&gt;" in text and r"\[a\](b)\`c\`\\n# d\|\*e\*\_f\_" in text
    assert "<script>" not in text and "\n# d" not in text


@pytest.mark.parametrize("model", ["wheel:llm-tiny", "/home/me/tiny.Q4_1.gguf", "/home/me/tiny"])
def test_the_card_says_of_a_gguf_file_that_its_numbers_were_converted(tmp_path, model):
    finished_run(tmp_path / "run", small_model(), model=model)
    export(tmp_path / "run", tmp_path / "out")
    sentence = "the same as in the source, a GGUF file whose numbers were converted to float32."
    assert (sentence in (tmp_path / "out" / "README.md").read_text()) == (model != "/home/me/tiny")


def test_a_local_model_is_named_without_its_path_and_the_licence_is_the_sources(tmp_path):
    assets = ASSETS | {"LICENSE": b"   Apache License\n Version 2.0", "config.json": b'{"_name_or_path": "owner/base"}'}
    finished_run(tmp_path / "run", small_model(), assets=assets, model="/home/me/llama")
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "base_model: owner/base" in card and "/home/me" not in card
    assert json.loads((tmp_path / "out" / "optima_tpu.json").read_text())["model"] == "llama"


OWN_LICENCE = ["license: other", "license_name: mine", "license_link: LICENSE"]


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: gemma", ["license: gemma"]),
        ("license: other\nlicense_name: mine\nlicense_link: LICENSE", OWN_LICENCE),
        ("license: other\nlicense_name: mine\nlicense_link: ../TERMS", OWN_LICENCE),
        ("license: [mit, gemma]", ["license: apache-2.0"]),
        (
            "license: other\nlicense_name: <img src=x onerror=alert(1)>\nlicense_link: 'https://x/\"><script>'",
            ["license: other", "license_link: LICENSE"],
        ),
        ("license: other\nlicense_name: '[mine](javascript:1)'", ["license: other", "license_link: LICENSE"]),
        (
            "license: other\nlicense_link: https://x.org/a_b?c=d&e#f",
            ["license: other", "license_link: https://x.org/a_b?c=d&e#f"],
        ),
        ("license: mit\nlicense: gemma", ["license: apache-2.0"]),
        ("{", ["license: apache-2.0"]),
    ],
)
def test_the_licence_that_the_sources_card_names_comes_before_its_file(card, front, said):
    text = card({"LICENSE": b"Apache License", "README.md": f"---\n{front}\n---\n# A model\nlicense: x\n".encode()})
    assert [line for line in text.split("---\n")[1].splitlines() if line.startswith("license")] == said


def test_a_licence_file_whose_name_is_markup_is_not_named(card):
    assert "<img" not in card({"LICENSE<img src=x>": b"Terms", "README.md": b"# A model\n"})


def test_only_checkpoint_journal_and_assets_are_needed(run, tmp_path):
    for name in ("checkpoint", "journal", "assets"):
        shutil.copytree(run / name, tmp_path / "moved" / name)
    export(tmp_path / "moved", tmp_path / "out")
    export(run, tmp_path / "other")
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "other")]
    assert files[0] == files[1]


def test_a_run_writes_every_weight_once_and_its_export_once_more(tmp_path, monkeypatch):
    """Counts bytes written by kind and left on disk, in sizes of the model."""
    source, written = small_model(), collections.Counter()
    for name, array in source.arrays.items():
        if array.ndim == 2:
            source.arrays[name] = np.random.default_rng(0).standard_normal((512, 512)).astype(array.dtype)
    replace = os.replace

    def size(path):
        return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file()) / model

    def counted(partial, final):
        if ".partial" not in str(final) and (parts := Path(final).relative_to(tmp_path / "run").parts)[0] in kinds:
            written[parts[0]] += size(Path(partial))
        replace(partial, final)

    kinds, model = ("journal", "checkpoint", "hf"), sum(array.nbytes for array in source.arrays.values())
    monkeypatch.setattr(os, "replace", counted)
    finished_run(tmp_path / "run", source)
    export(tmp_path / "run", tmp_path / "run" / "hf")
    embedding = source.arrays["model.embed_tokens.weight"].nbytes / model
    assert 0 < written["journal"] < 1 and 0 < written["checkpoint"] < embedding + 0.05 and 1 < written["hf"] < 1.1
    (tmp_path / "run" / "activations").rename(tmp_path / "hidden states")  # which the walk would have removed
    assert written.total() < 2.3 and size(tmp_path / "run") < 2.1


def test_what_exists_is_not_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.tex"]


@pytest.mark.parametrize("form", [pytest.param("plain", marks=pytest.mark.slow), "packed"])
def test_a_repeat_of_an_export_that_is_whole_leaves_it(form, run, tmp_path, capsys):
    """As after a kill between the last step and the end of the command."""
    words = [str(run), str(tmp_path / "out"), "--format", form]
    assert main(words) == 0 and "wrote" in capsys.readouterr().out
    before = snapshot(tmp_path)
    assert main(words) == 0 and snapshot(tmp_path) == before
    printed = capsys.readouterr().out
    assert "holds this export already, whole by its checksums: nothing is left to do" in printed and "wrote" not in printed
    others = [("--format", "packed" if form == "plain" else "plain"), ("--format", form, "--max-shard-size", "900")]
    for changed in others:
        assert main([*words[:2], *changed]) == 2 and "which is not empty" in only_error(capsys.readouterr().err)
    finished_run(tmp_path / "another", small_model(), MANIFEST | {"tokens": "ef" * 32})
    assert main([str(tmp_path / "another"), *words[1:]]) == 2 and "which is not empty" in only_error(capsys.readouterr().err)


def test_a_folder_that_was_unpacked_is_the_plain_export(run, tmp_path, capsys):
    assert main([str(run), str(tmp_path / "packed"), "--packed"]) == 0
    unpack(tmp_path / "packed", tmp_path / "plain")
    assert main([str(run), str(tmp_path / "plain")]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_an_export_of_the_same_run_that_lost_a_file_is_made_again(run, tmp_path):
    export(run, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert not is_export_of(run, tmp_path / "out")
    export(run, tmp_path / "out")
    assert is_export_of(run, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export(run, tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_an_export_is_written_though_its_lines_find_no_room(run, tmp_path, monkeypatch, capfd):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([str(run), str(tmp_path / "out")]) == 0
    assert is_export_of(run, tmp_path / "out")
    message = capfd.readouterr().err
    assert not message or message.startswith("all is written, but the output could not be printed: ")


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match="No space left on device; nothing was left there"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def save_damaged(tensors, path, **keywords):
    name = "model.layers.1.mlp.down_proj.weight"
    damaged = tensors[name].copy()
    damaged[damaged == 0] = 1
    Path(path).write_bytes(safetensors.numpy.save(tensors | {name: damaged}, **keywords))


def test_a_file_that_is_not_what_was_to_be_written_is_not_delivered(run, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.numpy, "save_file", save_damaged)
    with pytest.raises(RuntimeError, match="model.layers.1.mlp.down_proj.weight differs from the checkpoint"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_mask_or_pattern_are_not_delivered(run, tmp_path, monkeypatch):
    masks = CheckpointTensors.masks
    monkeypatch.setattr(
        CheckpointTensors, "masks", lambda self, names: {name: np.zeros_like(keep) for name, keep in masks(self, names).items()}
    )
    with pytest.raises(RuntimeError, match="other than zero where the mask prunes"):
        export(run, tmp_path / "out")
    monkeypatch.undo()
    manifest = MANIFEST | {"recipe": MANIFEST["recipe"] | {"pattern": "0.6"}}
    finished_run(tmp_path / "run", small_model(), manifest)
    with pytest.raises(RuntimeError, match="zeros of .* do not match mask and pattern 0.6"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pattern, good, bad",
    [
        (Unstructured(0.5, "row"), [[0, 1, 0, 1], [1, 0, 0, 0]], [[0, 0, 0, 1], [1, 1, 1, 0]]),
        (Unstructured(0.5, "layer"), [[0, 0, 0, 1], [1, 1, 1, 0]], [[1, 1, 0, 1], [1, 1, 1, 0]]),
        (NM(1, 2), [[0, 1, 1, 0], [0, 0, 0, 1]], [[0, 0, 1, 1], [0, 1, 0, 1]]),
    ],
)
def test_the_pattern_is_read_in_its_groups(pattern, good, bad):
    assert pattern.holds(np.array(good) == 0) and not pattern.holds(np.array(bad) == 0)


def test_the_command_splits_files_by_size_and_refuses_what_is_no_finished_run(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back after the test
    assert main([str(run), str(tmp_path / "out"), "--max-shard-size", "1KB"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    open_journal(tmp_path / "started", MANIFEST, ASSETS).save(0, *pruned_block(small_model(), 0))
    capsys.readouterr()
    for arguments, message in (
        ((run, tmp_path / "out"), "not empty"),
        ((tmp_path, tmp_path / "new"), "no run.json"),
        ((tmp_path / "started", tmp_path / "new"), "no checkpoint yet"),
        ((run, tmp_path / "new", "--max-shard-size", "big"), "shard size such as 5GB"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert message in only_error(printed.err) and "writing" not in printed.out
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_one_line(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "checkpoint" / "state" / "_sharding"
    file.write_bytes(b"none" + file.read_bytes()[4:])
    for path in copy.joinpath("checkpoint").rglob("_METADATA"):
        path.write_bytes(b"none")
    assert main([str(copy), str(tmp_path / "new")]) == 2
    error = only_error(capsys.readouterr().err)
    assert "checkpoint is damaged (state/_METADATA has 4 bytes" in error and "repeat the run's command" in error


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_it_with_nothing_missing_and_every_bit_equal(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    source = MemoryTensors(safetensors.numpy.load_file(tmp_path / "source" / "model.safetensors"))
    journal = begun(tmp_path / "run", assets={"config.json": (tmp_path / "source" / "config.json").read_bytes()})
    pruned, random = {}, np.random.default_rng(0)
    for block in range(2):
        names = [name for name in source.names() if name.startswith(f"model.layers.{block}.") and "proj" in name]
        masks = {name: random.permuted(np.indices(source.shape(name))[1] % 2 == 0, axis=1) for name in names}
        weights = {name: source.arrays[name] * masks[name] for name in names}
        report = block_report(block, {name.split(".", 3)[3].removesuffix(".weight"): keep for name, keep in masks.items()})
        journal.save(block, weights, masks, report, on_host(np.zeros((1, 1, 16), np.float32)))
        pruned |= weights
    write_checkpoint(journal, source, mesh(1, 1))
    export(tmp_path / "run", tmp_path / "out")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = loaded.state_dict()
    assert len(pruned) == 14
    for name, array in (source.arrays | pruned).items():
        assert state[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(state[name].float().numpy(), array.astype(np.float32))
