"""Where calibration and evaluation windows come from; what is refused."""

import dataclasses
import gzip
import hashlib
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from optima_tpu import data
from optima_tpu.data import hub
from optima_tpu.data.pydoc import words
from optima_tpu.data.sampling import calibration_windows, evaluation_windows
from optima_tpu.errors import UserError
from tests.support.texts import save
from tests.support.tiny_models import byte_tokenizer

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, BOS first, and a context shorter than every text."""
    byte_level = byte_tokenizer()
    byte_level.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    byte_level.model_max_length = 4
    return byte_level


def encode(text: str) -> np.ndarray:
    """Encodes bytes behind a BOS, without a tokenizer of transformers."""
    return np.array([BOS, *text.encode()], np.int32)


def places(window: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """Where ``window`` stands in ``stream``."""
    if len(stream) < len(window):
        return np.array([], int)
    return np.flatnonzero((np.lib.stride_tricks.sliding_window_view(stream, len(window)) == window).all(axis=1))


def drawn(documents, *, windows, length, seed=0, separator=EOS):
    return calibration_windows(documents, encode, data.Draw(windows, length, seed), separator=separator, origin="test")


# Sampling


documents_strategy = st.lists(st.text("abcdefgh ", max_size=40), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(documents_strategy, st.integers(1, 6), st.integers(1, 12), st.integers(0, 3))
def test_every_window_is_a_piece_of_one_document_or_of_the_packed_stream(documents, windows, length, seed):
    tokens = [encode(document) for document in documents if document.strip()]
    long = [ids for ids in tokens if ids.size > length]
    total = sum(ids.size for ids in tokens) + max(len(tokens) - 1, 0)
    if len(long) < windows and sum(ids.size for ids in long) < windows * length and total < windows * length:
        with pytest.raises(UserError, match=rf"\b{total} tokens.*\b{windows * length}\b"):
            drawn(documents, windows=windows, length=length, seed=seed)
        return

    result = drawn(documents, windows=windows, length=length, seed=seed)
    assert result.ids.shape == (windows, length) and result.ids.dtype == np.int32
    np.testing.assert_array_equal(result.ids, drawn(documents, windows=windows, length=length, seed=seed).ids)
    if "packed" not in result.how:
        assert all(any(places(window, ids).size for ids in long) for window in result.ids)
        return
    # Cut at the separators, the stream is a permutation of distinct documents, the last of them perhaps cut short.
    stream = result.ids.ravel()
    assert stream[0] == BOS
    *complete, last = np.split(stream, np.flatnonzero(stream == EOS))
    pieces = [tuple(piece[piece != EOS]) for piece in complete]
    left = [tuple(ids) for ids in tokens]
    for piece in pieces:
        left.remove(piece)
    end = tuple(last[last != EOS])
    assert any(ids[: len(end)] == end for ids in left) or not end


def test_long_documents_give_one_window_each_and_the_rest_is_not_read():
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    documents = [letter * (30 if index % 2 else 5) for index, letter in enumerate(alphabet)]
    seen = []

    def counting(text):
        seen.append(text)
        return encode(text)

    result = calibration_windows(documents, counting, data.Draw(4, 10, seed=3), separator=EOS, origin="test")
    letters = [{chr(i) for i in window if i != BOS} for window in result.ids]
    assert all(len(letter) == 1 for letter in letters) and len(set.union(*letters)) == 4
    assert sum(len(text) == 30 for text in seen) == 4 and len(seen) < len(documents)


@settings(deadline=None, max_examples=100)
@given(documents_strategy, st.integers(1, 5), st.integers(1, 4), st.integers(1, 8), st.integers(0, 3))
def test_held_out_windows_share_no_token_with_the_others(documents, windows, held_out, length, seed):
    """Every letter is unique and one token, so a token tells its index."""

    def encode(text):
        return np.array([BOS, *map(ord, text)], np.int32)

    documents = [
        "".join(chr(1000 * index + letter + 300) for letter in range(len(document))) for index, document in enumerate(documents)
    ]
    try:
        draw = data.Draw(windows, length, seed, held_out)
        result = calibration_windows(documents, encode, draw, separator=None, origin="test")
    except UserError as error:
        fit = int(re.search("tokens of calibration text, .* and ([0-9]+) would fit", str(error))[1])
        assert fit < windows + held_out
        if fit > held_out:
            most = data.Draw(fit - held_out, length, seed, held_out)
            assert len(calibration_windows(documents, encode, most, separator=None, origin="test").ids) == fit
        return
    assert result.ids.shape == (windows + held_out, length) and f" ({windows} to fit to, {held_out} held out)" in result.how
    seen = set(result.ids[:windows].ravel()) - {BOS}
    assert not seen & set(result.ids[windows:].ravel())


@pytest.mark.parametrize("documents", [["".join(map(chr, range(33, 120)))], [chr(97 + i) * 30 for i in range(26)]])
def test_holding_out_does_not_change_the_windows_that_calibrate(documents):
    more, fewer = (
        calibration_windows(documents, encode, data.Draw(4, 6, 1, held_out), separator=EOS, origin="test") for held_out in (2, 0)
    )
    np.testing.assert_array_equal(more.ids[:4], fewer.ids)


def test_another_seed_packs_short_documents_in_another_order():
    documents = [chr(97 + index) * 3 for index in range(26)]
    first, second = (drawn(documents, windows=5, length=20, seed=seed) for seed in (0, 1))
    assert "packed" in first.how and (first.ids != second.ids).any()


def test_the_window_of_a_long_document_starts_anywhere():
    stream = encode("abcdefg")
    windows = [drawn(["abcdefg"], windows=1, length=3, seed=seed).ids[0] for seed in range(60)]
    assert {int(places(window, stream)[0]) for window in windows} == set(range(6))


def test_every_window_of_the_long_documents_is_equally_likely():
    """Chi-square of 1,600 draws over 38 windows: above 77.8 once in 10,000."""
    documents = ["".join(map(chr, range(33, 63))), "".join(map(chr, range(80, 90)))]
    streams, counts = [encode(document) for document in documents], np.zeros(38)
    for seed in range(200):
        for window in drawn(documents, windows=8, length=3, seed=seed).ids:
            starts = [places(window, stream) for stream in streams]
            counts[starts[0][0] if starts[0].size else 29 + starts[1][0]] += 1
    assert np.sum((counts - 1600 / 38) ** 2 / (1600 / 38)) < 77.8


def test_without_eos_documents_are_joined_directly_and_an_eos_of_the_tokenizer_is_not_doubled():
    documents = ["abc", "def"]
    assert EOS not in drawn(documents, windows=2, length=4, separator=None).ids

    def with_eos(text):
        return np.append(encode(text), EOS).astype(np.int32)

    ids = calibration_windows(documents, with_eos, data.Draw(2, 5, seed=0), separator=EOS, origin="test").ids
    assert ids[:, -1].tolist() == [EOS, EOS] and ids[:, 0].tolist() == [BOS, BOS]


@settings(deadline=None)
@given(documents_strategy, st.integers(1, 9), st.integers(1, 4))
def test_evaluation_windows_are_the_text_cut_in_order(documents, length, windows):
    stream = encode("\n\n".join(documents))
    if stream.size < length:
        with pytest.raises(UserError, match=rf"\b{stream.size} tokens.*\b{length}\b"):
            evaluation_windows(documents, encode, length=length, windows=None, origin="test")
        return
    every = evaluation_windows(documents, encode, length=length, windows=None, origin="test")
    assert every.ids.shape == (stream.size // length, length) and every.ids.dtype == np.int32
    np.testing.assert_array_equal(every.ids.ravel(), stream[: every.ids.size])
    first = evaluation_windows(iter(documents), encode, length=length, windows=windows, origin="test")
    np.testing.assert_array_equal(first.ids, every.ids[:windows])


def test_evaluation_reads_on_where_a_token_is_long():
    def coarse(text):
        return np.arange(len(text) // 50, dtype=np.int32)

    result = evaluation_windows(["x" * 40] * 100, coarse, length=5, windows=10, origin="test")
    assert result.ids.ravel().tolist() == list(range(50))


def test_what_the_tokenizer_puts_at_the_end_of_a_text_is_in_no_window_before_that():
    """An EOS behind the first document would end the last window."""

    def with_eos(text):
        return np.array([*range(len(text) // 10), EOS], np.int32)

    result = evaluation_windows(["x" * 95, "y" * 95], with_eos, length=5, windows=2, origin="test")
    assert result.ids.ravel().tolist() == list(range(10))


def test_evaluation_reads_no_further_than_its_windows_need():
    def endless():
        while True:
            yield "abc "

    assert evaluation_windows(endless(), encode, length=10, windows=3, origin="test").ids.shape == (3, 10)


# With a tokenizer of transformers


def test_tokens_come_with_bos_at_document_starts_and_without_a_warning(tokenizer, tmp_path, caplog, monkeypatch):
    source = data.File(save(tmp_path / "a.jsonl", ["ab", "cd"]))
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokens = data.calibration_tokens(source, tokenizer, data.Draw(1, 7, seed=0))
    assert tokens.ids[0].tolist().count(BOS) == 2 and tokens.ids[0, 3] == EOS == tokenizer.eos_token_id
    evaluation = data.evaluation_tokens(source, tokenizer, length=7, windows=None)
    assert evaluation.ids[0, 0] == BOS and tokenizer.decode(evaluation.ids[0, 1:]) == "ab\n\ncd"
    assert evaluation.available == 7
    assert not caplog.records


def test_random_ids_are_of_the_vocabulary_and_differ_between_splits(tokenizer):
    source = data.parse_source("random")
    first, second = (data.calibration_tokens(source, tokenizer, data.Draw(3, 50, seed=0)).ids for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.dtype == np.int32 and first.min() >= 0 and first.max() < len(tokenizer)
    assert (first != data.evaluation_tokens(source, tokenizer, length=50, windows=3).ids).any()
    with pytest.raises(UserError, match="number of windows"):
        data.evaluation_tokens(source, tokenizer, length=50, windows=None)


@pytest.mark.parametrize("arguments", [{"windows": 0}, {"length": 0}, {"seed": -1}])
def test_impossible_arguments_are_refused(tokenizer, arguments):
    with pytest.raises(UserError):
        data.calibration_tokens(data.PyDoc(), tokenizer, data.Draw(**{"windows": 1, "length": 8, "seed": 0} | arguments))


# Sources


def test_pydoc_halves_share_no_paragraph():
    halves = [list(data.PyDoc().documents(split)) for split in ("calibration", "evaluation")]
    paragraphs = [{words(paragraph) for text in half for paragraph in text.split("\n\n")} for half in halves]
    assert not paragraphs[0] & paragraphs[1]
    assert len(halves[0]) > 2 * len(halves[1]) and min(sum(map(len, half)) for half in halves) > 30_000
    assert halves[0] == list(data.PyDoc().documents("calibration"))


DOCUMENTS = ["first line\nsecond line\r\n", "", "Ünïcödé \u2028 and \x85 too", "last"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet"])
@pytest.mark.parametrize("field", ["text", "page"])
def test_every_record_format_gives_the_same_documents(tmp_path, name, field):
    source = data.File(save(tmp_path / name, DOCUMENTS, field), field)
    assert list(source.documents("calibration")) == list(source.documents("evaluation")) == DOCUMENTS
    assert data.parse_source(str(source)) == source


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    assert list(data.File(save(tmp_path / name, DOCUMENTS)).documents("calibration")) == DOCUMENTS[:1]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert list(data.File(tmp_path / "a.txt").documents("calibration")) == ["abc"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_missing_field_is_refused_with_those_there_are(tmp_path, name):
    with pytest.raises(UserError, match="'body'.*id, text"):
        list(data.File(save(tmp_path / name, DOCUMENTS), "body").documents("calibration"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\xff\xfe\xff", "UTF-8"),
        ("a.txt.gz", b"no gzip", "a.txt.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz"),
        ("a.parquet", b"no parquet", "Parquet"),
        ("a.jsonl", b'{"text": "a"}\n{"text":', "line 2"),
        ("a.jsonl", b'["a"]\n', "line 1"),
        ("a.jsonl", b'{"text": null}\n', "NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogates"),
        ("a.csv", b"text\na\n", r"\.parquet"),
    ],
)
def test_a_damaged_or_unknown_file_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        list(data.File(tmp_path / name).documents("calibration"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("texts", [lambda: repeated("x" * 100_000, 60_000), lambda: ["x" * (70 << 20)]], ids=["many", "one long"])
def test_a_small_parquet_file_that_unpacks_to_much_is_refused(tmp_path, texts):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts()}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match="at most 67108864 characters"):
        for text in data.File(path).documents("calibration"):
            assert len(text) == 100_000


def repeated(text, count):
    """An array that Parquet stores as one text and a count."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int32)), pyarrow.array([text]))


def test_a_parquet_column_of_lists_is_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [["a"]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="expected text in field 'text' .* it holds list"):
        list(data.File(tmp_path / "a.parquet").documents("calibration"))


def test_a_missing_file_is_refused(tmp_path, tokenizer):
    for text in (f"file:{tmp_path}/none.txt", f"file:{tmp_path}", f"npy:{tmp_path}/none.npy"):
        with pytest.raises(UserError, match=str(tmp_path)):
            data.calibration_tokens(data.parse_source(text), tokenizer, data.Draw(1, 4, seed=0))


def test_npy_rows_are_used_as_they_are(tmp_path, tokenizer):
    ids = np.arange(24).reshape(4, 6)
    np.save(tmp_path / "a.npy", ids)
    source = data.parse_source(f"npy:{tmp_path}/a.npy")
    tokens = data.calibration_tokens(source, tokenizer, data.Draw(3, 6, seed=5))
    np.testing.assert_array_equal(tokens.ids, ids[:3])
    assert tokens.ids.dtype == np.int32 and tokens.available == 24
    for windows, count in ((2, 2), (None, 4), (9, 4)):
        evaluation = data.evaluation_tokens(source, tokenizer, length=6, windows=windows)
        np.testing.assert_array_equal(evaluation.ids, ids[:count])
    with pytest.raises(UserError, match="4 windows.*5"):
        data.calibration_tokens(source, tokenizer, data.Draw(5, 6, seed=0))
    with pytest.raises(UserError, match="length to 6"):
        data.calibration_tokens(source, tokenizer, data.Draw(1, 8, seed=0))


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([[0, 258]]), "258"),
        (np.array([[-1, 3]]), "-1"),
        (np.zeros((2, 2)), "float64"),
        (np.zeros(2, int), "integer array"),
        (np.array([["a", None]], object), "numpy.save"),
    ],
)
def test_npy_that_is_no_matrix_of_ids_is_refused(tmp_path, tokenizer, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message):
        data.calibration_tokens(data.Npy(tmp_path / "a.npy"), tokenizer, data.Draw(1, 2, seed=0))


def test_hub_sources_read_disjoint_splits_and_join_them_as_sparsegpt_does(tmp_path, monkeypatch):
    requests = []

    def download(repository, name):
        requests.append((repository, name))
        rows = [f"{'train' if 'train' in name else 'held'} {index}" for index in range(1200)]
        return save(tmp_path / name.replace("/", "-"), rows)

    monkeypatch.setattr(hub, "download", download)
    train, evaluation = ([f"{split} {index}" for index in range(1200)] for split in ("train", "held"))
    assert list(data.C4().documents("calibration")) == train
    assert list(data.C4().documents("evaluation")) == [" ".join(evaluation[:1100])]
    assert list(data.WikiText2().documents("calibration")) == [" ".join(train)]
    assert list(data.WikiText2().documents("evaluation")) == ["\n\n".join(evaluation)]
    assert [repository for repository, _ in requests] == ["allenai/c4"] * 2 + ["Salesforce/wikitext"] * 2


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("source", [data.C4(), data.WikiText2()])
def test_an_unreachable_hub_is_one_line_that_says_what_to_do(source, hub_cache):
    with pytest.raises(UserError, match="offline mode.*file:PATH") as raised:
        list(source.documents("calibration"))
    assert "\n" not in str(raised.value)


def test_a_file_in_the_cache_needs_no_hub(hub_cache):
    repository = hub_cache / "datasets--Salesforce--wikitext"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    (repository / "snapshots/0123abc/wikitext-2-raw-v1").mkdir(parents=True)
    save(repository / "snapshots/0123abc/wikitext-2-raw-v1/train-00000-of-00001.parquet", ["a", "", "b"])
    assert list(data.WikiText2().documents("calibration")) == ["a  b"]


def test_a_file_that_was_damaged_on_its_way_from_the_hub_is_named(hub_cache):
    repository, name = hub_cache / "datasets--Salesforce--wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abc")
    (repository / "blobs").mkdir()
    save(repository / "a.parquet", ["a", "", "b"])
    content = (repository / "a.parquet").read_bytes()
    (link := repository / "snapshots/0123abc" / name).parent.mkdir(parents=True)
    for digest in (hashlib.sha256(content), hashlib.sha1(b"blob %d\0" % len(content) + content)):
        blob = repository / "blobs" / digest.hexdigest()
        blob.write_bytes(content)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        assert list(data.WikiText2().documents("calibration")) == ["a  b"]
        blob.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
        with pytest.raises(UserError, match=f"{name} is damaged.*Remove {blob}"):
            list(data.WikiText2().documents("calibration"))


# The command line's strings


@pytest.mark.parametrize(
    "text",
    [
        *("pydoc", "c4", "wikitext2", "random", "self", "self?temperature=0.8"),
        *("file:a/b.txt", "file:b.jsonl?field=page", "npy:x.npy", "tfds:mine@a/b", "hub:org/name@train"),
        *("tfds:mine/config:1.2.3@a?split=train[:90%]&field=page", "hub:org/name/en@train[:20]?field=page"),
    ],
)
def test_a_source_is_written_as_it_is_read(text):
    assert str(data.parse_source(text)) == text


@pytest.mark.parametrize("text", ["", "c5", "a.txt", "file:", "c4:x", "file:a.jsonl?page", "file:a.jsonl?field="])
def test_other_source_texts_are_refused(text):
    with pytest.raises(UserError, match="file:PATH"):
        data.parse_source(text)


@pytest.mark.parametrize(
    "text, form",
    [
        ("npy:", "npy:PATH"),
        *((f"tfds:{rest}", "tfds:NAME@DIR") for rest in ("", "mine", "@a", "mine@", "mine@a?page=1")),
        *(
            (f"hub:{rest}", "hub:ORG/NAME")
            for rest in ("", "name@train", "org/name", "org/name@train[5:]", "org/name@train?split=a")
        ),
    ],
)
def test_a_source_without_its_place_is_told_its_own_form(text, form):
    with pytest.raises(UserError, match=rf"expected {form}.*got .*{re.escape(text.partition(':')[2])}"):
        data.parse_source(text)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4, unique=True), st.integers(36, 60), st.integers(36, 60), st.integers(0, 20)
)
def test_a_mix_keeps_its_shares_in_every_first_part_and_every_text_its_own_windows(weights, windows, held_out, cut):
    shares = tuple(weight / sum(weights) for weight in weights)
    mix = data.Mix(tuple(data.File(Path(f"{k}.txt")) for k in range(len(weights))), shares)

    def mixed(windows, held_out=0, most=120):
        def drawn(text, draw):
            return data.Tokens(1000 * int(text.path.stem) + np.arange(min(draw.count, most))[:, None], str(text), 1)

        return mix.windows(data.Draw(windows, 1, seed=0, held_out=held_out), "windows", drawn).ids

    for ids in (mixed(windows, held_out), mixed(windows + held_out)):
        for k, share in enumerate(shares):
            own = np.flatnonzero(ids[:, 0] // 1000 == k)
            assert (ids[own, 0] == 1000 * k + np.arange(len(own))).all()
            for first in (windows - cut, windows):
                assert abs(np.sum(own < first) - share * first) < len(shares)
    short = mixed(windows, most=8)
    assert (short == mixed(len(short))).all() and max(np.bincount(short[:, 0] // 1000)) == 8


def test_a_run_draws_a_mix_from_its_texts(tmp_path, tokenizer):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 400)
    mix = data.parse_source(f"file:{tmp_path}/a.txt:0.75, file:{tmp_path}/b.txt:0.25")
    assert data.parse_source(str(mix)) == mix and isinstance(mix, data.Mix)
    drawn = data.calibration_tokens(mix, tokenizer, data.Draw(8, 16, seed=0, held_out=4))
    alone = data.calibration_tokens(mix.texts[1], tokenizer, data.Draw(2, 16, seed=0, held_out=1))
    assert (drawn.ids[[2, 6, 10]] == alone.ids).all()
    assert drawn.how.count("held out") == 2 and len(data.stream_tokens(mix, tokenizer, data.Draw(8, 16, seed=0)).ids) == 8
    with pytest.raises(UserError, match="would both read"):
        data.refuse_overlap(mix, mix.texts[1])
    with pytest.raises(UserError, match="expected one text to measure on"):
        data.evaluation_tokens(mix, tokenizer, length=16, windows=1)
    with pytest.raises(UserError, match="windows from each text in .*, got 1 and none of file:.*b.txt: take more"):
        data.calibration_tokens(mix, tokenizer, data.Draw(1, 16, seed=0))
    again = data.parse_source(f"file:{tmp_path}/a.txt:0.5,file:{tmp_path}/../{tmp_path.name}/a.txt:0.5")
    for draw in (data.calibration_tokens, data.stream_tokens):
        with pytest.raises(UserError, match="which both read .*a.txt: add up their shares"):
            draw(again, tokenizer, data.Draw(8, 16, seed=0))
    small = dataclasses.replace(mix, shares=(0.99999, 0.00001))
    assert data.parse_source(str(small)) == small


@pytest.mark.parametrize(
    "text, message",
    [
        ("c4:0.5,pydoc:0.6", "whose sum is 1"),
        ("c4:1,pydoc:0", "above 0"),
        ("c4:0.5,self:0.5", "give --calibration.written"),
        ("c4:0.5,c4:0.5", "expected different texts"),
        ("c4:0.5,pydoc", "a share behind each text"),
        ("file:a.txt,file:b.txt", "a share behind each text"),
        ("c4:0.5,a.txt", "several with their shares"),
        ("c4:0.5,c5:0.5", "got 'c5'"),
    ],
)
def test_a_mix_that_is_none_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        data.parse_source(text)


def test_calibration_and_evaluation_on_the_same_file_are_refused(tmp_path):
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    a, link, b = (data.parse_source(f"file:{tmp_path}/{name}.txt") for name in ("a", "link", "b"))
    with pytest.raises(UserError, match="a.txt does not exist"):  # nor would a second text help
        data.refuse_overlap(a, a)
    (tmp_path / "a.txt").touch()
    for second in (a, link):
        with pytest.raises(UserError, match="both read .*a.txt"):
            data.refuse_overlap(a, second)
    ids = data.parse_source(f"npy:{tmp_path}/x.npy")
    with pytest.raises(UserError, match="x.npy does not exist"):
        data.refuse_overlap(ids, ids)
    (tmp_path / "x.npy").touch()
    with pytest.raises(UserError, match="both read .*x.npy"):
        data.refuse_overlap(ids, data.parse_source(f"npy:{tmp_path}/../{tmp_path.name}/x.npy"))
    data.refuse_overlap(a, b)
    for text in ("pydoc", "c4", "wikitext2", "random"):
        data.refuse_overlap(data.parse_source(text), data.parse_source(text))


@pytest.mark.parametrize(
    ("calibration", "evaluation", "shared"),
    [
        ("c4", "hub:Allenai/C4/en@train", "allenai/c4@train"),
        ("hub:a/b/c@train", "hub:A/B/c@train[:9]", "a/b@train"),
        ("hub:a/b@train", "hub:a/b/default@train", "a/b@train"),
        ("hub:a/b/default@train", "hub:a/b@train", "a/b@train"),
        ("hub:a/b/c@train", "hub:a/b/d@train", None),
        ("hub:a/b@train", "hub:a/b/c@test", None),
    ],
)
def test_a_data_set_is_the_same_in_any_case_and_with_no_configuration_named(calibration, evaluation, shared):
    sources = data.parse_source(calibration), data.parse_source(evaluation)
    part = data.shared(*sources)
    assert (part and part.text) == shared
    if shared:
        with pytest.raises(UserError, match=f"would both read {shared}: "):
            data.refuse_overlap(*sources)
