"""Cached tokens equal drawn ones, whatever happens to cache or text."""

import dataclasses
import importlib.metadata
import os
import threading

import numpy as np
import pytest

from optima_tpu import data
from optima_tpu.config.run_config import Calibration, Evaluation, RunConfig
from optima_tpu.data import build
from optima_tpu.data.cache import TokenCache, _code, token_key
from optima_tpu.data.source import Tokens
from optima_tpu.pipeline.inputs import manifest_of, open_model_on_mesh, read_texts
from optima_tpu.runtime.files import user_cache
from tests.support.tiny_models import tiny_folder

DRAW = dict(windows=4, length=20, held_out=2, seed=0, bos=None)
TOKENS = Tokens(np.arange(12, dtype=np.int32).reshape(3, 4), "three windows", 99)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("cache") / "model")
    return open_model_on_mesh(RunConfig(model=str(folder)))


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A run's settings over two files, and a cache that is empty."""
    monkeypatch.setenv("OPTIMA_TPU_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the text of file {name}; " * 40)
    return RunConfig(
        model="unused",
        calibration=Calibration(f"file:{tmp_path}/a.txt", windows=4, length=20, held_out=2),
        evaluation=Evaluation(f"file:{tmp_path}/b.txt"),
    )


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(
        {"cut": content[:-3], "empty": b"", "other": b"x" * 99, "a bit": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]}[
            how
        ]
    )


def test_a_second_run_has_the_same_tokens_and_manifest_and_tokenises_nothing(texts, model, monkeypatch):
    first = read_texts(texts, model)
    fresh = read_texts(dataclasses.replace(texts, token_cache=False), model)

    def refused(*arguments, **settings):
        raise AssertionError("a text was read")

    monkeypatch.setattr(data, "calibration_tokens", refused)
    monkeypatch.setattr(data, "evaluation_tokens", refused)
    again = read_texts(texts, model)
    for before, uncached, after in zip(first[:2], fresh[:2], again[:2]):
        np.testing.assert_array_equal(after.ids, before.ids)
        np.testing.assert_array_equal(uncached.ids, before.ids)
        assert after.ids.dtype == np.int32 and after.available == before.available
        assert after.how == before.how == uncached.how
        assert (before.cache, uncached.cache, after.cache) == ("", "", "from the token cache")
    assert manifest_of(texts, model, again) == manifest_of(texts, model, first)


def test_a_changed_text_is_read_again_even_with_the_size_and_time_it_had(texts, model, tmp_path):
    first, path = read_texts(texts, model), tmp_path / "a.txt"
    times = path.stat()
    path.write_text(path.read_text().replace("file a", "file c"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = read_texts(texts, model)
    assert (again.calibration.ids != first.calibration.ids).any() and not again.calibration.cache
    assert again.evaluation.cache


@pytest.mark.parametrize("change", [dict(windows=5), dict(length=21), dict(held_out=1), dict(seed=1), dict(bos=1)], ids=str)
def test_another_draw_has_another_key(texts, model, change):
    source = data.parse_source(texts.calibration.source)
    key = token_key(source, "calibration", model.pretrained, **DRAW)
    assert key == token_key(source, "calibration", model.pretrained, **DRAW)
    assert key != token_key(source, "calibration", model.pretrained, **DRAW | change)
    assert key != token_key(source, "evaluation", model.pretrained, **DRAW)


def test_another_tokenizer_has_another_key(texts, model):
    source, assets = data.parse_source(texts.calibration.source), model.pretrained.assets
    other = dataclasses.replace(model.pretrained, assets={**assets, "tokenizer.json": assets["tokenizer.json"] + b" "})
    assert token_key(source, "calibration", model.pretrained, **DRAW) != token_key(source, "calibration", other, **DRAW)


@pytest.mark.parametrize("name", ["numpy", "tokenizers", "transformers"])
def test_another_version_of_a_library_has_another_key(texts, model, monkeypatch, name):
    source, version = data.parse_source(texts.calibration.source), importlib.metadata.version
    monkeypatch.setattr("optima_tpu.data.cache._code", _code.__wrapped__)  # asked for anew
    key = token_key(source, "calibration", model.pretrained, **DRAW)
    monkeypatch.setattr(importlib.metadata, "version", lambda library: version(library) + "+2" * (library == name))
    assert key != token_key(source, "calibration", model.pretrained, **DRAW)


@pytest.mark.parametrize("name", ["pydoc", "random", "npy:a.npy"])
def test_what_is_drawn_faster_than_it_is_found_has_no_key(model, name):
    assert token_key(data.parse_source(name), "calibration", model.pretrained, **DRAW) is None


def test_a_prepared_data_set_that_was_made_again_has_another_key(texts, model, tmp_path):
    source, keys = data.parse_source(f"tfds:mine@{tmp_path}"), []
    for name in ("a", "b"):
        build.build(data.TFDS("mine", tmp_path), [data.File(tmp_path / f"{name}.txt")])
        keys += [token_key(source, "calibration", model.pretrained, **DRAW) for _ in range(2)]
        (tmp_path / "mine").rename(tmp_path / f"old-{name}")
    assert keys[0] == keys[1] != keys[2] == keys[3]


@pytest.mark.parametrize("how", ["cut", "empty", "other", "a bit"])
def test_a_damaged_entry_is_written_again(tmp_path, how):
    cache, drawn = TokenCache(tmp_path), []

    def draw():
        drawn.append(1)
        return TOKENS

    for harmed, count in ((False, 1), (False, 1), (True, 2), (False, 2)):
        if harmed:
            damage(next(tmp_path.iterdir()), how)
        np.testing.assert_array_equal(cache.tokens(lambda: "key", draw).ids, TOKENS.ids)
        assert len(drawn) == count


def test_an_entry_under_another_key_is_not_taken(tmp_path):
    cache = TokenCache(tmp_path)
    assert cache.save("one", TOKENS) is None
    (tmp_path / "one.safetensors").rename(tmp_path / "two.safetensors")
    assert cache.load("two") is None and cache.load("one") is None


def test_a_cache_that_cannot_be_written_stops_nothing_and_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    tokens = TokenCache(tmp_path / "file" / "tokens").tokens(lambda: "key", lambda: TOKENS)
    np.testing.assert_array_equal(tokens.ids, TOKENS.ids)
    assert "Not a directory" in tokens.cache and str(tmp_path / "file") in tokens.cache


def test_programs_that_write_one_entry_at_once_do_not_harm_it(tmp_path):
    cache, loaded = TokenCache(tmp_path), []
    tokens = Tokens(np.arange(40_000, dtype=np.int32).reshape(200, 200), "many", 1)
    assert cache.save("key", tokens) is None

    def work():
        for _ in range(10):
            assert cache.save("key", tokens) is None
            loaded.append(cache.load("key"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 40 and all(one is not None and (one.ids == tokens.ids).all() for one in loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["key.safetensors"]


def test_the_directory_is_where_the_user_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTIMA_TPU_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.delenv("OPTIMA_TPU_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "optima-tpu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache/optima-tpu"
