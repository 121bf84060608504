"""TFDS (without TensorFlow) and hub data sets hold their files' documents."""

import contextlib
import gzip
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from optima_tpu import data
from optima_tpu.data import build
from optima_tpu.errors import UserError
from optima_tpu.runtime import processes
from optima_tpu.runtime.files import begin
from tests.support.processes import at_once, free_port
from tests.support.texts import save
from tests.support.tiny_models import byte_tokenizer, tiny_folder

DOCUMENTS = [
    "first line\nsecond line\r\n",
    "",
    "Ünïcödé \u2028 and \x85 too",
    *(chr(97 + i) * (1 + 7 * i % 60) for i in range(26)),
]
DRAWS = {
    "one window of each long document": dict(windows=4, length=20),
    "many of few documents": dict(windows=15, length=30),
    "packed": dict(windows=9, length=70),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a.jsonl and "mine", the data set that build made."""
    folder = tmp_path_factory.mktemp("tfds")
    save(folder / "a.jsonl", DOCUMENTS)
    assert build.main([f"mine@{folder}", str(folder / "a.jsonl")]) == 0
    return folder


@pytest.fixture(scope="module")
def split_set(tmp_path_factory):
    """A data set "halves" from Parquet; every fourth text is validation."""
    folder = tmp_path_factory.mktemp("halves")
    save(folder / "a.parquet", DOCUMENTS, "page")
    assert build.main([f"halves@{folder}", str(folder / "a.parquet"), "--field", "page", "--validation-share", "0.25"]) == 0
    return folder


def draw(source, over=map, **settings):
    return data.calibration_tokens(source, byte_tokenizer(), data.Draw(seed=3, **settings), over)


def test_a_data_set_has_the_documents_of_its_file_in_their_order_and_no_tensorflow_is_imported(made):
    source = data.parse_source(f"tfds:mine@{made}")
    assert list(source.documents("calibration")) == DOCUMENTS
    assert source.documents("calibration")[2:4] == DOCUMENTS[2:4] and source.documents("calibration")[-1] == DOCUMENTS[-1]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("settings", DRAWS.values(), ids=DRAWS)
def test_its_tokens_are_those_of_the_file(made, settings):
    source, file = data.parse_source(f"tfds:mine@{made}"), data.parse_source(f"file:{made}/a.jsonl")
    tokens, expected = draw(source, **settings), draw(file, **settings)
    np.testing.assert_array_equal(tokens.ids, expected.ids)
    assert tokens.how == expected.how.replace(str(file), str(source)) and tokens.available == expected.available
    score = dict(length=30, windows=None)
    np.testing.assert_array_equal(
        data.evaluation_tokens(source, byte_tokenizer(), **score).ids, data.evaluation_tokens(file, byte_tokenizer(), **score).ids
    )


class Together:
    """Two threads that ``processes`` takes for two processes."""

    def __init__(self, monkeypatch):
        self._barrier, self._given, self._own = threading.Barrier(2, timeout=30), [None] * 2, threading.local()
        monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
        monkeypatch.setattr(processes.jax, "process_index", lambda: self._own.index)
        monkeypatch.setattr(processes, "everyones", self._everyones)

    def _everyones(self, value):
        self._given[self._own.index] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def run(self, work):
        """``work(index)`` of both, or what it raised."""
        results = [None] * 2

        def one(index):
            self._own.index = index
            try:
                results[index] = work(index)
            except UserError as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("settings", DRAWS.values(), ids=DRAWS)
def test_two_processes_read_disjoint_parts_and_get_the_same_tokens(made, monkeypatch, settings):
    expected, read, text = draw(data.parse_source(f"tfds:mine@{made}"), **settings), [[], []], data.TFDS._text

    def counted(source, records, number):
        read[processes.jax.process_index()].append(number)
        return text(source, records, number)

    def work(index):
        return draw(data.parse_source(f"tfds:mine@{made}"), over=lambda *what: processes.spread(*what, at_once=2), **settings)

    monkeypatch.setattr(data.TFDS, "_text", counted)
    for tokens in Together(monkeypatch).run(work):
        np.testing.assert_array_equal(tokens.ids, expected.ids)
        assert tokens[1:] == expected[1:]
    assert all(read) and not set(read[0]) & set(read[1]) and sum(map(len, read)) == len({*read[0], *read[1]})
    everything = sorted(read[0] + read[1]) == list(range(len(DOCUMENTS)))
    assert everything == ("each from another document" not in expected.how)


def test_a_document_that_one_process_cannot_read_fails_all(monkeypatch):
    def read(number):
        if number == 5:
            raise UserError("document 5 is damaged")
        return number

    first, second = Together(monkeypatch).run(lambda index: list(processes.spread(read, range(9), at_once=2)))
    assert str(first) == str(second) == "process 1: document 5 is damaged"


def test_splits_are_disjoint_and_complete(split_set):
    source = data.parse_source(f"tfds:halves@{split_set}")
    train, validation = (list(source.documents(split)) for split in ("calibration", "evaluation"))
    assert validation == DOCUMENTS[3::4] and train == [text for index, text in enumerate(DOCUMENTS) if index % 4 != 3]
    data.refuse_overlap(source, source)
    last = data.parse_source(f"tfds:halves:1.0.0@{split_set}?split=train[90%:]")
    assert list(last.documents("calibration")) == list(last.documents("evaluation")) == train[-2:]


@pytest.mark.parametrize(
    "calibration, evaluation, refused",
    [
        ("", "", True),
        ("?split=train", "?split=train", True),
        ("", "?split=train[90%:]", True),
        ("?split=train[:90%]", "?split=train[90%:]", False),
        ("?split=train[:20]", "?split=train[19:]", True),
    ],
)
def test_the_same_documents_are_not_calibration_and_evaluation_text(made, calibration, evaluation, refused):
    with pytest.raises(UserError, match="would both read.*mine") if refused else contextlib.nullcontext():
        data.refuse_overlap(*(data.parse_source(f"tfds:mine@{made}{rest}") for rest in (calibration, evaluation)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("tfds:yours@{}", "yours.*holds mine:1.0.0"),
        ("tfds:mine:2.0.0@{}", "mine:1.0.0"),
        ("tfds:mine@{}/none", "holds none"),
        ("tfds:mine@{}?split=test", "'test'.*train"),
        ("tfds:mine@{}?split=train[5", "train.5"),
        ("tfds:mine@{}?field=page", "'page'.*text"),
    ],
)
def test_what_is_not_there_is_one_line(made, text, message):
    source = data.parse_source(text.format(made))
    with pytest.raises(UserError, match=message) as raised:
        source.documents("calibration")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("harm", ["cut", "gone", "another format"])
def test_a_damaged_data_set_is_one_line(made, tmp_path, harm):
    assert build.main([f"mine@{tmp_path}", str(made / "a.jsonl")]) == 0
    folder = tmp_path / "mine" / "1.0.0"
    records, about = next(folder.glob("*array_record*")), folder / "dataset_info.json"
    if harm == "cut":
        records.write_bytes(records.read_bytes()[:70])
    elif harm == "gone":
        records.unlink()
    else:
        about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="can't be read.*array_record") as raised:
        list(data.parse_source(f"tfds:mine@{tmp_path}").documents("calibration"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["proto", "legacy", "inner"])
def test_a_class_that_a_description_names_is_never_imported(made, tmp_path, monkeypatch, layout):
    """TFDS imports the module of any class in features.json."""
    shutil.copytree(made / "mine", tmp_path / "sets" / "mine")
    (tmp_path / "evil_features.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (path,) = (tmp_path / "sets").glob("**/features.json")
    proto, legacy = {"pythonClassName": "evil_features.Text", "text": {}}, {"type": "evil_features.Text", "content": {}}
    sequence = "tensorflow_datasets.core.features.sequence_feature.Sequence"
    inner = {"pythonClassName": sequence, "json": {"json": json.dumps({"feature": legacy, "length": None})}}
    path.write_text(json.dumps({"proto": proto, "legacy": legacy, "inner": inner}[layout]))
    with pytest.raises(UserError, match="got evil_features.Text, a class that is never imported"):
        data.parse_source(f"tfds:mine@{tmp_path / 'sets'}").documents("calibration")
    assert not (tmp_path / "imported").exists()


def test_building_refuses_what_exists_and_leaves_nothing_of_what_failed(made, tmp_path, capsys):
    before = (made / "mine").stat().st_mtime_ns
    assert build.main([f"mine@{made}", str(made / "a.jsonl")]) == 2
    assert "there is a data set mine" in capsys.readouterr().err and (made / "mine").stat().st_mtime_ns == before
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    for files, message in (["none.jsonl", "none.jsonl does not exist"], ["b.jsonl.gz", "can't be read"]):
        assert build.main([f"mine@{tmp_path}", str(made / "a.jsonl"), str(tmp_path / files)]) == 2
        assert message in capsys.readouterr().err
    assert build.main([f"mine@{tmp_path}", str(made / "a.jsonl"), "--validation-share", "0.001"]) == 2
    assert "no document is in the split validation" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["b.jsonl.gz"]


def test_what_a_killed_program_left_is_no_data_set_and_in_nobodys_way(made, tmp_path):
    (left := begin(tmp_path / "mine") / "1.0.0").mkdir(parents=True)
    (left / "mine-train.array_record-00000-of-00001").write_bytes(b"half")
    with pytest.raises(UserError, match="holds none"):
        data.parse_source(f"tfds:mine@{tmp_path}").documents("calibration")
    files = [data.File(made / "a.jsonl")]
    assert build.build(data.TFDS("mine", tmp_path), files, validation_files=files) == dict.fromkeys(
        ("train", "validation"), len(DOCUMENTS)
    )
    assert list(data.parse_source(f"tfds:mine@{tmp_path}").documents("evaluation")) == DOCUMENTS


# The datasets library


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """Makes org/name a data set for ``datasets`` and shuts off the hub."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "org/name").mkdir(parents=True)
    save(tmp_path / "org/name/train.jsonl", DOCUMENTS)


def test_a_hub_data_set_has_the_documents_of_its_files(hub_folder):
    whole, first = data.parse_source("hub:org/name@train"), data.parse_source("hub:org/name@train[:5]")
    assert list(whole.documents("calibration")) == DOCUMENTS and whole.documents("calibration")[3] == DOCUMENTS[3]
    assert list(first.documents("calibration")) == list(first.documents("evaluation")) == DOCUMENTS[:5]
    assert whole.fingerprint("calibration") == whole.fingerprint("calibration") is not None
    with pytest.raises(UserError, match="would both read org/name@train"):
        data.refuse_overlap(whole, first)
    for text, message in (
        ("hub:org/name@test", "test"),
        ("hub:org/name@train?field=page", "'page'.*id, text"),
        ("hub:org/name@train[:5]?field=id", "text in field 'id'.*int"),
        ("hub:org/none@train", "org/none"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            list(data.parse_source(text).documents("calibration"))
        assert "\n" not in str(raised.value)


def test_a_split_of_another_source_is_known_again():
    for name, text in (
        ("wikitext2", "hub:Salesforce/wikitext/wikitext-2-raw-v1@test"),
        ("c4", "hub:allenai/c4/en@validation[:9]"),
    ):
        source = data.parse_source(name)
        data.refuse_overlap(source, source)
        with pytest.raises(UserError, match="would both read"):
            data.refuse_overlap(data.parse_source(text), source)
        data.refuse_overlap(data.parse_source(text.partition("@")[0] + "@train"), source)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def unreachable(repository):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.dataset_info", unreachable)
    for text in ("hub:org/name@train", "hub:org/name@train[:5]"):
        with pytest.raises(UserError, match=r"Name or service not known.*HF_HUB_OFFLINE=1.*file:PATH"):
            data.parse_source(text).documents("calibration")


# Real processes


@pytest.mark.parametrize("template", ["../../../{}", "{}/../../../../{}", "/{}", "out/{}", "\0{}"])
def test_a_description_that_names_files_outside_of_the_data_set_is_refused(made, tmp_path, template):
    folder = Path(shutil.copytree(made / "mine", tmp_path / "sets/mine"))
    (path,) = folder.glob("*/dataset_info.json")
    record = json.loads(path.read_text())
    name = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (tmp_path / "outside").mkdir()
    for file in path.parent.glob("*.array_record-*"):
        shutil.copy(file, tmp_path / "outside")
        shutil.copy(file, tmp_path)
    for split in record["splits"]:
        split["filepathTemplate"] = template.replace("{}", name) if template[0] != "/" else f"{tmp_path}/{name}"
    path.write_text(json.dumps(record))
    source = data.parse_source(f"tfds:mine@{tmp_path / 'sets'}")
    for read in (lambda: list(source.documents("calibration")), lambda: source.fingerprint("calibration")):
        with pytest.raises(UserError, match="which is not a file of its own folder|is a link to|can't be read"):
            read()


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_a_pipe_or_a_link_out_of_a_data_set_is_refused(made, tmp_path, name):
    folder = Path(shutil.copytree(made / "mine", tmp_path / "mine"))
    (path,) = folder.glob(f"*/{name}")
    path.rename(tmp_path / "outside")
    source = data.parse_source(f"tfds:mine@{tmp_path}")
    for replace, reason in (
        (lambda: path.symlink_to(tmp_path / "outside"), "is a link to"),
        (lambda: os.mkfifo(path), "is a pipe"),
    ):
        path.unlink(missing_ok=True)
        replace()
        with pytest.raises(UserError, match=f"{name} {reason}"):
            list(source.documents("calibration"))


READER = """
import json, sys
from optima_tpu.runtime import processes
from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.data import TFDS
from optima_tpu.pipeline.inputs import manifest_of, open_model_on_mesh, read_texts

model, source, other, port, index = sys.argv[1:]
if port != "0":
    processes.start(f"localhost:{port}", 2, int(index), 60)
read, text = [], TFDS._text
TFDS._text = lambda source, records, number: (read.append(number), text(source, records, number))[1]
config = RunConfig(model=model, calibration=Calibration(source, windows=9, length=70, held_out=1), token_cache=False,
                   evaluation=Evaluation(source=other, windows=2))
model = open_model_on_mesh(config)
manifest = manifest_of(config, model, read_texts(config, model))
print(json.dumps({"read": read, "calibration": manifest["calibration"], "held_out": manifest["held_out"]}))
"""


@pytest.mark.slow
def test_two_real_processes_read_disjoint_parts_of_the_same_tokens(made, tmp_path):
    model, port, other = tiny_folder(tmp_path / "model"), free_port(), tmp_path / "b.txt"
    other.write_text("text to score " * 50)
    starts = [(f"tfds:mine@{made}", port, 0), (f"tfds:mine@{made}", port, 1), (f"file:{made}/a.jsonl", 0, 0)]
    ended = at_once(["-c", READER, model, source, f"file:{other}", port, index] for source, port, index in starts)
    assert not any(status for status, *_ in ended), ended
    first, second, file = (json.loads(output.splitlines()[-1]) for _, output, _ in ended)
    for name in ("calibration", "held_out"):
        assert first[name] == second[name] == file[name]
    assert first["read"] and second["read"] and sorted(first["read"] + second["read"]) == list(range(len(DOCUMENTS)))
