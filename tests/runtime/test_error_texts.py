"""What the texts of other libraries' errors mean, read from real errors."""

import errno

import numpy as np
import pytest
import safetensors.numpy
import tensorstore
from jax._src.distributed import State

from optima_tpu.runtime.command import LOST
from optima_tpu.runtime.error_texts import http_status, names_bucket, nltk_resource, no_cluster, peer_gone, system_number
from tests.support.processes import at_once, free_port


def raised(call) -> Exception:
    """The error that a call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_the_number_of_a_system_call_is_read_from_the_text_where_no_attribute_has_it(tmp_path):
    (tmp_path / "file").touch()
    values = {"a": np.zeros(3, np.float32)}
    store = tensorstore.KvStore.open(f"file://{tmp_path}/file/").result()
    numbers = {
        errno.ENOENT: lambda: safetensors.numpy.save_file(values, tmp_path / "none/a"),
        errno.ENOTDIR: lambda: store.write("a", b"1").result(),
        errno.EISDIR: tmp_path.read_bytes,
    }
    assert [system_number(raised(call)) for call in numbers.values()] == list(numbers)
    assert system_number(ValueError("os error")) is None


def test_the_status_of_a_bucket_is_read_from_the_text_where_no_attribute_has_it():
    answer = pytest.importorskip("gcsfs.retry").validate_response
    for status in (401, 403, 502, 503):
        assert http_status(raised(lambda status=status: answer(status, b'{"error": {"message": "no"}}', "a"))) == status
    invalid = raised(lambda: answer(400, b'{"error": {"message": "invalid"}}', "a"))
    assert http_status(invalid) == 0 and names_bucket(invalid) and not names_bucket(ValueError("no"))


def test_jax_without_a_cluster_is_told_from_a_cluster_that_it_refuses():
    def initialize(*arguments):
        State().initialize(*arguments, cluster_detection_method="deactivate")

    assert no_cluster(raised(initialize)) and not no_cluster(raised(lambda: initialize("localhost:1", 2)))


def test_nltk_says_what_to_download():
    nltk = pytest.importorskip("nltk")
    assert nltk_resource(raised(lambda: nltk.data.find("tokenizers/none_such"))) == "none_such"
    assert nltk_resource(LookupError("none")) is None


# Process 1 ends without a word, once process 0 waits for its values: jax aborts a process that still connects.
LEFT = f"""
import os, sys, time, jax
from optima_tpu.runtime.command import guarded
from optima_tpu.runtime.processes import everyones

def command():
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
    everyones(0)
    if int(sys.argv[2]):
        time.sleep(1)
        os._exit(0)
    everyones(1)

assert {LOST} == guarded(command, "again")
"""


def test_the_end_of_another_process_is_told():
    address = f"localhost:{free_port()}"
    (status, _, error), _ = at_once(["-c", LEFT, address, number] for number in range(2))
    assert status == LOST and "another process has ended, see its message (here: " in error, error
    assert not peer_gone(RuntimeError("INTERNAL: a defect"))
