"""A local server of Google Cloud Storage's protocol that can fail.

It speaks the protocol as far as gcsfs and TensorStore use it.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

BUCKET = "bucket"


class Object(NamedTuple):
    data: bytes
    generation: int


class Asked(NamedTuple):
    """A request to the server.

    Attributes:
      method: GET, POST, ...
      kind: such as "media", "stat", "list", "upload", "part" or "delete".
      name: of the object, or a prefix of names.
    """

    method: str
    kind: str
    name: str


Fault = int | str
"""A status such as 503, or what becomes of the answer: "reset", "lost" (done, but never answered), "cut", "short" or "flipped".

"short" and "flipped" look whole: fewer bytes with a length to match, and one other bit. With "stall" no answer comes.
"""


class Bucket:
    """The objects of one bucket, and which requests fail.

    Attributes:
      objects: name -> object.
      asked: every request that came, in order.
      fault: decides how a request fails; None answers it.
      refused: the requests that failed.
      joined: the names of objects that have no MD5, as those that gcloud joins of parts.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.asked: list[Asked] = []
        self.refused: list[Asked] = []
        self.fault: Callable[[Asked], Fault | None] = lambda request: None
        self.generations, self.uploads, self.lock = itertools.count(1), dict[str, bytes](), threading.Lock()
        self.closed, self.joined = threading.Event(), set[str]()

    @contextlib.contextmanager
    def failing(self, fault: Callable[[Asked], Fault | None]) -> Iterator[None]:
        """Makes requests fail as ``fault`` says, inside the ``with``."""
        self.fault, before = fault, self.fault
        self.refused.clear()
        try:
            yield
        finally:
            self.fault = before

    def put(self, name: str, data: bytes) -> Object:
        self.objects[name] = Object(data, next(self.generations))
        return self.objects[name]


def now_and_then(bucket: Bucket, faults: list[Fault], every: int = 3, most: int = 2) -> Callable[[Asked], Fault | None]:
    """Makes every third request fail, with one fault after the other.

    No request fails more than twice in a row.
    """
    drawn, numbers, rows = itertools.cycle(faults), itertools.count(1), dict[Asked, int]()

    def fault(request: Asked) -> Fault | None:
        if next(numbers) % every or rows.get(request, 0) >= most:
            rows.pop(request, None)
            return None
        rows[request] = rows.get(request, 0) + 1
        return next(drawn)

    return fault


@contextlib.contextmanager
def serving() -> Iterator[tuple[Bucket, str]]:
    """Starts a server. Yields the bucket ``BUCKET`` and the address."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda *request: None  # a client may hang up
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield bucket, f"http://127.0.0.1:{server.server_port}"
        finally:
            bucket.closed.set()
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", url.path)
        if not match:
            return self._answer(404, b"{}")
        where, name_of_bucket, name = match[1], match[2], unquote(match[3] or "")
        kind = self._kind(where, name, query)
        if kind == "upload" and not name:
            name = query.get("name") or json.loads(_parts(body, self.headers["Content-Type"])[0])["name"]
        request = Asked(self.command, kind, name or query.get("prefix", ""))
        with self.bucket.lock:
            self.bucket.asked.append(request)
            fault = self.bucket.fault(request)
            if fault is not None:
                self.bucket.refused.append(request)
        self.fault = fault
        if isinstance(fault, int):
            return self._answer(fault, json.dumps({"error": {"code": fault, "message": "the test says so"}}).encode())
        if fault == "reset":
            return self._reset()
        if fault == "stall":
            self.bucket.closed.wait(60)
        if name_of_bucket != BUCKET:
            return self._answer(404, b'{"error": {"code": 404, "message": "no such bucket"}}')
        with self.bucket.lock:
            answer = getattr(self, "_" + kind)(name, query, body)
        if fault == "lost":
            return self._reset()
        self._answer(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _kind(self, where: str | None, name: str, query: dict[str, str]) -> str:
        if self.command == "DELETE":
            return "delete"
        if where == "/upload":
            return "part" if "upload_id" in query else "upload"
        if not name:
            return "list" if urlsplit(self.path).path.endswith("/o") else "about"
        return "media" if query.get("alt") == "media" else "stat"

    def _about(self, name, query, body):
        return 200, json.dumps({"name": BUCKET, "kind": "storage#bucket"}).encode()

    def _stat(self, name, query, body):
        if name not in self.bucket.objects:
            return 404, b'{"error": {"code": 404, "message": "No such object"}}'
        return 200, json.dumps(self._described(name)).encode()

    def _media(self, name, query, body):
        if name not in self.bucket.objects:
            return 404, b"No such object"
        stored = self.bucket.objects[name]
        if query.get("ifGenerationNotMatch") == str(stored.generation):
            return 304, b""
        if query.get("ifGenerationMatch", str(stored.generation)) != str(stored.generation):
            return 412, b""
        if query.get("generation", str(stored.generation)) != str(stored.generation):
            return 404, b"No such generation"
        about = self._described(name)
        headers = {
            "x-goog-generation": str(stored.generation),
            "x-goog-hash": f"crc32c={about['crc32c']}" + ("" if name in self.bucket.joined else f",md5={about['md5Hash']}"),
            "x-goog-stored-content-length": str(len(stored.data)),
        }
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not span:
            return 200, stored.data, headers
        if not span[1]:
            first, last = max(0, len(stored.data) - int(span[2])), len(stored.data) - 1
        else:
            first, last = int(span[1]), min(int(span[2] or len(stored.data) - 1), len(stored.data) - 1)
        if first >= len(stored.data):
            return 416, b"InvalidRange"
        return 206, stored.data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(stored.data)}"}

    def _list(self, name, query, body):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, last = query.get("startOffset", ""), query.get("endOffset")
        names = [
            each for each in sorted(self.bucket.objects)
            if each.startswith(prefix) and each >= first and (last is None or each < last)
        ]  # fmt: skip
        items, prefixes = [], dict[str, None]()
        for each in names:
            head, cut, _ = each[len(prefix) :].partition(delimiter) if delimiter else (each, "", "")
            if cut:
                prefixes[prefix + head + cut] = None
            else:
                items.append(self._described(each))
        start = int(query.get("pageToken") or 0)
        stop = start + int(query.get("maxResults") or 1000)
        page = {"kind": "storage#objects", "items": items[start:stop], "prefixes": list(prefixes) if not start else []}
        return 200, json.dumps(page | ({"nextPageToken": str(stop)} if stop < len(items) else {})).encode()

    def _upload(self, name, query, body):
        match = query.get("ifGenerationMatch")
        current = self.bucket.objects[name].generation if name in self.bucket.objects else 0
        if match is not None and int(match) != current:
            return 412, b""
        if query["uploadType"] == "resumable":
            number = str(next(self.bucket.generations))
            self.bucket.uploads[number] = b""
            address = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o?upload_id={number}&name={name}"
            return 200, b"{}", {"Location": address}
        data = _parts(body, self.headers["Content-Type"])[1] if query["uploadType"] == "multipart" else body
        self.bucket.put(name, data)
        return 200, json.dumps(self._described(name)).encode()

    def _part(self, name, query, body):
        name, number = query["name"], query["upload_id"]
        first, total = re.fullmatch(r"bytes (\d+|\*)(?:-\d+)?/(\d+|\*)", self.headers["Content-Range"]).groups()
        received = self.bucket.uploads[number]
        if first != "*":
            received = received[: int(first)] + body
        self.bucket.uploads[number] = received
        if total == "*" or len(received) < int(total):
            return 308, b"", {"Range": f"bytes=0-{len(received) - 1}"} if received else {}
        self.bucket.put(name, received)
        return 200, json.dumps(self._described(name)).encode()

    def _delete(self, name, query, body):
        if name not in self.bucket.objects:
            return 404, b'{"error": {"code": 404, "message": "No such object"}}'
        del self.bucket.objects[name]
        return 204, b""

    def _described(self, name: str) -> dict:
        data, generation = self.bucket.objects[name]
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(data)), "generation": str(generation),
            "metageneration": "1", "crc32c": base64.b64encode(struct.pack(">I", _crc32c(data))).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(), "updated": "2026-01-01T00:00:00.000000Z",
            "timeCreated": "2026-01-01T00:00:00.000000Z",
        }  # fmt: skip

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        if self.fault == "short":
            data = data[: len(data) // 2]
        if self.fault == "flipped" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.fault == "cut" and data:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._reset()
        self.wfile.write(data)

    def _reset(self) -> None:
        self.close_connection = True
        # With no time to linger the system sends RST in the place of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "r+b")  # noqa: SIM115  # what the base class flushes and closes


def _parts(body: bytes, content_type: str) -> list[bytes]:
    """The two bodies of a multipart upload: the description and the data."""
    boundary = b"--" + re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    sections = body.split(boundary)[1:-1]
    bodies = []
    for section in sections:
        head = re.search(rb"\r?\n\r?\n", section)
        bodies.append(re.sub(rb"\r?\n\Z", b"", section[head.end() :], count=1))
    return bodies


def _crc32c(data: bytes) -> int:
    import google_crc32c  # comes with gcsfs

    return google_crc32c.value(data)
