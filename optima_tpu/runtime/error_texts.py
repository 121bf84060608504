"""What an error of another library means where only its text says so.

The one file that reads such texts; everywhere else an error is told by its class, its number or its status. Beside each text
stands the file of the library that has nothing else. A text that is not known here leads to the error itself, as a traceback or
within a message: never to going on, and never to a restart.
"""

import re

# gloo and NCCL fail inside a program of XLA, and jaxlib raises that as a ValueError without a status, or with a status that other
# errors have too (libjax_common.so); its coordination service ends a wait with DEADLINE_EXCEEDED.
_PEER_GONE = re.compile(
    "gloo|nccl|connection (closed|reset|refused)|coordination|heartbeat|socket closed|broken pipe", re.IGNORECASE
)
# TensorStore raises every status as a ValueError (_tensorstore.so), safetensors a SafetensorError (_safetensors_rust.abi3.so).
_SYSTEM_NUMBER = re.compile(r"os[ _]error(?:_code=')? ?(\d+)")
_HTTP_STATUS = re.compile(r"http_response_code='(\d+)'")
_NLTK_RESOURCE = re.compile(r"nltk\.download\('(\w+)'\)")


def peer_gone(error: Exception) -> bool:
    """Whether an error may be what remains of another process that ended."""
    return _PEER_GONE.search(str(error)) is not None


def no_cluster(error: ValueError) -> bool:
    """Whether ``jax.distributed.initialize`` did not detect a cluster.

    It then misses the argument that names one (jax/_src/distributed.py, State.initialize). Other values that it refuses are the
    environment's.
    """
    return "coordinator_address" in str(error)


def system_number(error: Exception) -> int | None:
    """The number (errno) of the system call that failed; None if none did."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    return int(match[1]) if (match := _SYSTEM_NUMBER.search(str(error))) else None


def http_status(error: Exception) -> int:
    """The status that a bucket's server gave to a client; 0 if unknown."""
    if match := _HTTP_STATUS.search(str(error)):
        return int(match[1])
    # gcsfs raises classes without a status for these two (gcsfs/retry.py, validate_response).
    other = 403 if str(error).startswith("Forbidden") else 502 if type(error).__name__ == "ProxyError" else 0
    return int(getattr(error, "code", 0) or other)


def names_bucket(error: Exception) -> bool:
    """Whether an error of a class that anything raises is about a bucket.

    TensorStore raises a ValueError for each status, gcsfs for a request that the server refuses as invalid (gcsfs/retry.py).
    """
    return str(error).startswith("Bad Request") or "gs://" in str(error)


def nltk_resource(error: Exception) -> str | None:
    """The data of NLTK that are not on this machine; None if none are missing.

    NLTK raises a LookupError whose text alone names them (nltk/data.py, find).
    """
    return match[1] if (match := _NLTK_RESOURCE.search(str(error))) else None
