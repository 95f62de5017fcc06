from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from conftest import Toy, draw, stored
from features import locations, reading
from features.errors import SourceError
from features.extract import extract
from features.locations import read
from features.sources import list_source
from features.store import FeatureStore

RED, BLUE = (255, 0, 0), (0, 0, 255)


class Server(ThreadingHTTPServer):
    """Serves files with their ETag, and odd answers under odd names."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[str] = Counter()
        self.closing = threading.Event()

    def gets(self) -> int:
        return sum(times for (method, _), times in self.asked.items() if method == "GET")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may hang up."""


class Answer(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].strip("/")
        self.server.asked[self.command, name] += 1
        if name == "silent":
            self.server.closing.wait(30)
        elif name == "endless":
            self.send(200)
            with suppress(OSError):
                while self.command == "GET" and not self.server.closing.is_set():
                    self.server.sent[name] += self.wfile.write(bytes(2**16))
        elif name == "cut":
            self.send(200, ETag='"cut"', Content_Length="1000")
            self.wfile.write(b"x" * 10)
        elif name == "flaky" and self.server.asked["GET", name] < 2:
            self.send(500)
        elif name in ("403", "429", "500"):
            self.send(int(name))
        elif content := self.server.files.get(name):
            self.send(200, ETag=f'"{hashlib.sha256(content).hexdigest()}"', Content_Length=str(len(content)))
            if self.command == "GET":
                self.wfile.write(content)
        else:
            self.send(404)

    def send(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(reading, "DELAYS", (0.01, 0.02))
    with Server() as server:
        for name, colour in (("a.png", RED), ("b.png", BLUE)):
            server.files[name] = draw(tmp_path / "served" / name, colour).read_bytes()
        server.files["flaky"] = server.files["a.png"]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def fill(tmp_path: Path, toy: Toy) -> Callable[..., dict[str, Any]]:
    """Extract from a table of URLs; gives the record."""
    store = FeatureStore.open_or_new(str(tmp_path / "store"))

    def run(*urls: str) -> dict[str, Any]:
        table = tmp_path / "table.csv"
        table.write_text("\n".join(("image", *urls)) + "\n")
        return extract(list_source(str(table)), store, [toy.request])

    return run


def errors(tmp_path: Path) -> dict[str, str | None]:
    """What each row of the listing has for an error, by the last part of its id."""
    listed = FeatureStore.open(str(tmp_path / "store")).snapshot().samples.to_pylist()
    return {row["id"].rpartition("/")[2]: row["error"] for row in listed}


def test_every_failure_of_a_server_has_its_reason(server: Server, fill: Any, tmp_path: Path) -> None:
    names = ("a.png", "gone", "403", "429", "500", "flaky", "cut")
    fill(*(f"{server.url}/{name}" for name in names), "nobody-knows://x/y.png", "http://127.0.0.1:1/refused")
    found = errors(tmp_path)
    assert found.pop("a.png") is found.pop("flaky") is None
    assert {name: str(error).split(": ")[0] for name, error in found.items()} == {
        "gone": "missing",
        "y.png": "missing",
        "403": "unreadable",
        **dict.fromkeys(("429", "500", "cut", "refused"), "unreachable"),
    }
    assert (found["403"], found["500"]) == ("unreadable: HTTP 403", "unreachable: HTTP 500")
    assert [server.asked["GET", name] >= 3 for name in ("500", "429")] == [True, True]
    assert server.asked["GET", "a.png"] == 1


def test_who_never_answers_is_left_behind(
    server: Server, fill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SECONDS_TO_READ", 0.3)
    monkeypatch.setattr(reading, "SECONDS_TO_END", 0.1)
    monkeypatch.setattr(locations, "SECONDS_TO_ASK", 0.2)
    begun = time.monotonic()
    fill(f"{server.url}/silent", f"{server.url}/a.png")
    assert time.monotonic() - begun < 5
    found = errors(tmp_path)
    assert (str(found["silent"]).split(":")[0], found["a.png"]) == ("timeout", None)


def test_a_body_without_an_end_is_cut_off(
    server: Server, fill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "MAX_BYTES", 2**20)
    fill(f"{server.url}/endless", f"{server.url}/a.png")
    assert {name: str(error)[:9] for name, error in errors(tmp_path).items()} == {
        "endless": "too_large",
        "a.png": "None",
    }
    assert server.sent["endless"] < 2**26


def test_what_is_unchanged_is_not_fetched_again(server: Server, fill: Any) -> None:
    urls = [f"{server.url}/{name}?signed=on-monday" for name in ("a.png", "b.png")]
    assert fill(*urls)["embedded"] == 2
    before = server.gets()
    record = fill(*(url.replace("monday", "tuesday") for url in urls))
    assert (record["opened"], record["outcome"], server.gets()) == (0, "unchanged", before)
    server.files["b.png"] += b"changed"
    assert (fill(*urls)["opened"], server.gets()) == (1, before + 1)


def test_no_key_is_kept_or_told(server: Server, permafrost: Any, tmp_path: Path) -> None:
    address = server.url.removeprefix("http://")
    names = ("a.png", "gone", "403", "cut", "500")
    urls = [f"http://user:hidden-word@{address}/{name}?token=hidden-token" for name in names]
    (tmp_path / "t.csv").write_text("\n".join(["image", *urls, "http://user:hidden-word@127.0.0.1:1/x?t=hidden-token"]))
    options = ("--store", tmp_path / "store", "--backbone", "tiny")
    told = [permafrost("extract", tmp_path / "t.csv", *options, *more) for more in (("--json",), ("--rehash",))]
    told.append(permafrost("extract", f"{urls[0]}.csv", *options, code=2))
    told.append(permafrost("extract", urls[1].replace("gone", "gone.parquet"), *options, code=2))
    told.append(permafrost("extract", tmp_path / "t.csv", *options, "--max-failures", 1, code=3))
    content = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert b"403" in content
    assert b"hidden" not in content
    assert not [done for done in told if "hidden" in done.stdout + done.stderr]
    assert list(errors(tmp_path).values()).count(None) == 1


def test_folders_tables_and_stores_may_lie_behind_urls(photos: Path, toy: Toy) -> None:
    base = f"memory://{photos}"
    fs, path = fsspec.url_to_fs(base)
    fs.put(str(photos), path, recursive=True)
    store = FeatureStore.open_or_new(f"{base}-store")
    assert extract(list_source(base), store, [toy.request])["embedded"] == 24
    again = extract(list_source(f"{base}/"), store, [toy.request])
    assert (again["opened"], again["outcome"]) == (0, "unchanged")
    local = list_source(str(photos)).listing
    listed = store.snapshot().samples
    assert listed.select(["id", "label", "split"]).equals(local.select(["id", "label", "split"]))
    fs.pipe_file(f"{path}/t.jsonl", b'{"image": "train/red/00.png"}\n{"image": "nothing.png"}\n')
    record = extract(list_source(f"{base}/t.jsonl"), store, [toy.request])
    assert (record["embedded"], record["failed"]) == (0, 1)
    loaded = store.load()
    assert len(loaded.ids) == 25
    assert len(stored(store, store.pick_view())) == 24
    assert read(listed["uri"][0].as_py()) == (photos / listed["id"][0].as_py()).read_bytes()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/t.csv", "nobody-knows://x/t.csv", "memory://nothing/t.csv", "nobody-knows://x"]
)
def test_a_table_that_cannot_be_fetched_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(SourceError, match=r"^[^\n]*$"):
        list_source(url)
