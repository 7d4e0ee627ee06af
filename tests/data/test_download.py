import errno
import io
import json
import os
import signal
import socket
import ssl
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement.data import download as downloads
from hierarchical_diffusion_rlhf_caption_refinement.data.download import download, image_file, link_rot
from hierarchical_diffusion_rlhf_caption_refinement.data.images import USER_AGENT, load_image


def png(colour: str = "red", side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """Serves /red<anything> after `delay_s`, and some trouble; counts what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.agents: set[str] = set()
        self.delay_s = 0.0
        self.now = self.most = 0
        self.lock = threading.Lock()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, name = self.server, self.path[1:]
        with server.lock:
            server.asked[name] += 1
            server.times.append(time.monotonic())
            server.agents.add(self.headers["User-Agent"])
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.delay_s)
        self.answer(name, server.asked[name])
        with server.lock:
            server.now -= 1

    def answer(self, name: str, time_asked: int) -> None:
        if name.startswith("red") or (name in ("busy", "flaky", "date") and time_asked > 1):
            return self.send(200, png())
        if name == "busy":
            return self.send(429, b"", {"Retry-After": "1"})
        if name == "date":
            return self.send(503, b"", {"Retry-After": formatdate(time.time() + 2, usegmt=True)})
        if name == "tomorrow":
            return self.send(429, b"", {"Retry-After": "86400"})
        if name == "maintained":
            return self.send(404, b"", {"Retry-After": "86400"})
        if name == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return self.send(200, png())
        if name == "slow":
            self.send(200, b"", {"Content-Length": "1000"})
            for _ in range(60):
                self.wfile.write(b"x")
                time.sleep(0.05)
            return None
        bodies = {"page": b"<html></html>", "huge": b"x" * 5000, "endless": b"x" * 5000, "empty": b"", "damaged": png(side=64)[:-40]}
        if name == "cut":
            return self.send(200, png()[:20], {"Content-Length": str(len(png()))})
        if name in bodies:
            return self.send(200, bodies[name], {"Content-Length": "5000"} if name == "huge" else {})
        self.send({"gone": 410, "flaky": 500, "broken": 500, "limited": 429}.get(name, 404), b"nothing here")

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One host for all, so the pause is short here."""
    monkeypatch.setattr(downloads, "PAUSE_S", 0.005)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / downloads.LOG).read_text().splitlines()]


def test_every_link_ends_as_an_image_or_a_reason(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hierarchical_diffusion_rlhf_caption_refinement.data.images.TIMEOUT_S", 1.0)
    monkeypatch.setattr("hierarchical_diffusion_rlhf_caption_refinement.data.images.MAX_BYTES", 1000)
    reasons = {
        "red": "", "red?a b=é": "", "flaky": "", "none": "HTTP 404", "gone": "HTTP 410", "broken": "HTTP 500", "page": "not an image",
        "damaged": "not an image", "empty": "not an image", "cut": "connection failed", "slow": "timed out",
        "huge": "larger than 1000 bytes", "endless": "larger than 1000 bytes",
    }  # fmt: skip
    urls = {server.url(name): reason for name, reason in reasons.items()} | {"ftp://x/y.png": "not an http(s) address"}
    progress: list[tuple[int, int]] = []
    assert download([*urls, *urls], tmp_path, 99, 16, lambda *counts: progress.append(counts)) == urls
    assert progress[-1] == (3, 99) and server.agents == {USER_AGENT}
    images = {url: image_file(tmp_path, url) for url, reason in urls.items() if not reason}
    assert all(load_image(path).size == (4, 4) for path in images.values())
    own = {tmp_path / "downloads.jsonl", tmp_path / "downloads.lock"}
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {*images.values(), *own}
    assert {row["url"]: row["error"] for row in rows(tmp_path)} == urls and len(rows(tmp_path)) == len(urls)
    assert {row["url"]: tmp_path / row["file"] for row in rows(tmp_path) if row["file"]} == images
    twice = {"flaky", "broken", "cut", "slow"}
    assert {name for name, times in server.asked.items() if times == 2} == twice and max(server.asked.values()) == 2
    passing = {row["url"] for row in rows(tmp_path) if row["passing"]}
    assert passing == {server.url(name) for name in ("broken", "cut", "slow")}


def test_reasons_of_links_without_a_server(tmp_path: Path) -> None:
    untrusted = urllib.error.URLError(ssl.SSLCertVerificationError("self-signed"))
    cases: list[tuple[Exception, tuple[str, bool]]] = [
        (urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "unknown")), ("no such host", True)),
        (urllib.error.URLError(TimeoutError()), ("timed out", True)),
        (untrusted, ("bad certificate", False)),
        (urllib.error.URLError(ssl.SSLError("handshake")), ("connection failed", True)),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ("connection failed", True)),
        (UnicodeError("label too long"), ("not an address", False)),
    ]
    for error, expected in cases:
        outcome = downloads._failure("http://x", error)
        assert (outcome.reason, outcome.passing) == expected
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x.png"  # nobody listens
        assert download([url], tmp_path, 1, 2) == {url: "connection failed"}


def test_retry_after_is_obeyed_once(server: Server, tmp_path: Path) -> None:
    assert download([server.url("busy")], tmp_path / "seconds", 1, 4) == {server.url("busy"): ""}
    assert server.asked["busy"] == 2 and 0.95 < server.times[1] - server.times[0] < 9
    assert download([server.url("date")], tmp_path / "date", 1, 4) == {server.url("date"): ""}
    assert server.asked["date"] == 2 and 0.9 < server.times[3] - server.times[2] < 9


def test_a_host_that_goes_on_refusing_is_left_alone(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PER_HOST", 1)
    urls = [server.url(name) for name in ("tomorrow", "red0", "red1")]
    assert download(urls, tmp_path, 9, 4) == dict.fromkeys(urls, "HTTP 429")
    assert server.asked == {"tomorrow": 1}
    assert download([server.url("limited")], tmp_path, 9, 4) == {server.url("limited"): "HTTP 429"}
    assert server.asked["limited"] == 2 and server.times[2] - server.times[1] > 0.95  # a second, if the host does not say
    gone, good = server.url("maintained"), server.url("red7")
    assert download([gone, good], tmp_path, 9, 4) == {gone: "HTTP 404", good: ""}  # that one is missing says nothing of the others


def test_a_later_run_asks_only_for_what_may_have_changed(server: Server, tmp_path: Path) -> None:
    urls = [server.url(name) for name in ("red1", "none", "page", "broken", "red2", "red3")]
    first = download(urls[:5], tmp_path, 9, 4)
    with (tmp_path / downloads.LOG).open("a") as log:
        log.write('{"url": "http://killed while wri')
    server.asked.clear()
    assert download(urls, tmp_path, 9, 4) == first | {urls[5]: ""}
    assert server.asked == {"broken": 2, "red3": 1}
    image_file(tmp_path, urls[0]).unlink()
    server.asked.clear()
    assert download(urls, tmp_path, 9, 4) == first | {urls[5]: ""}
    assert server.asked == {"red1": 1, "broken": 2}
    server.asked.clear()
    assert download(urls, tmp_path, 9, 4)[urls[3]] == "HTTP 500"
    assert not server.asked  # a link gets three runs


def test_no_more_than_needed_is_fetched_and_always_the_first(server: Server, tmp_path: Path) -> None:
    names = ["none", *(f"red{i}" for i in range(30))]
    found = download((server.url(name) for name in names), tmp_path, 10, 8)
    assert sorted(server.asked) == sorted(names[:11]) and set(found) == {server.url(name) for name in names[:11]}
    server.asked.clear()
    more = download((server.url(name) for name in names), tmp_path, 12, 8)
    assert server.asked == {"red10": 1, "red11": 1} and len(more) == 13
    assert list(more.values()).count("") == 12


@pytest.mark.parametrize(("per_host", "connections", "most"), [(2, 8, 2), (8, 3, 3)])
def test_limits_on_connections(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_host: int, connections: int, most: int
) -> None:
    monkeypatch.setattr(downloads, "PER_HOST", per_host)
    server.delay_s = 0.05
    download([server.url(f"red{i}") for i in range(12)], tmp_path, 12, connections)
    assert server.most == most and len(server.asked) == 12


def test_a_pause_between_requests_to_one_host(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PAUSE_S", 0.2)
    other = server.url("red").replace("127.0.0.1", "localhost")
    assert set(download([*(server.url(f"red{i}") for i in range(4)), other], tmp_path, 5, 8).values()) == {""}
    assert sorted(server.times)[-1] - sorted(server.times)[0] > 0.57  # with some room for the clock
    assert sorted(server.times)[1] - sorted(server.times)[0] < 0.18  # another host need not wait


def test_ctrl_c_leaves_whole_files_and_the_next_run_goes_on(server: Server, tmp_path: Path) -> None:
    names = [*(f"red{i}" for i in range(6)), "interrupt", *(f"red{i}" for i in range(10, 16))]
    urls = [server.url(name) for name in names]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            download(urls, tmp_path, 20, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    files = list(tmp_path.glob("??/*"))
    assert 4 <= len(files) < len(names) and all(load_image(path).size == (4, 4) for path in files)
    kept = {url for url in urls if image_file(tmp_path, url).is_file()}
    server.asked.clear()
    others = [url for url in urls if "interrupt" not in url]
    assert set(download(others, tmp_path, 20, 2).values()) == {""}
    assert set(server.asked) == {url.rpartition("/")[2] for url in set(others) - kept}


def test_of_two_processes_one_fetches(server: Server, tmp_path: Path) -> None:
    urls = [server.url(f"red{i}") for i in range(8)]
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: download(urls, tmp_path, 8, 4), range(2))
    assert one == two == dict.fromkeys(urls, "") and set(server.asked.values()) == {1}


def test_a_network_that_is_down_is_not_held_against_the_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Counter[str] = Counter()

    def offline(url: str, *limits: object) -> bytes:
        asked[url] += 1
        raise urllib.error.URLError(socket.gaierror(socket.EAI_AGAIN, "try again"))

    monkeypatch.setattr(downloads, "fetch_bytes", offline)
    monkeypatch.setattr(downloads, "SILENCE", 8)
    found = download([f"http://{i}.example/x.png" for i in range(500)], tmp_path, 500, 2)
    assert set(found.values()) == {"no such host"} and len(found) == 8 and len(asked) <= 24
    assert rows(tmp_path) == []


def test_what_cannot_be_written_is_an_error_and_no_dead_link(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        download([server.url("red")], tmp_path, 1, 1)
    assert rows(tmp_path) == []


def test_the_report_is_one_line() -> None:
    links = Counter({"": 7, "HTTP 404": 12, "timed out": 3, "not an image": 2})
    assert link_rot(links) == "7 of 24 links gave an image; dead: 12 HTTP 404, 3 timed out, 2 not an image"
    assert link_rot(Counter([""])) == "1 of 1 links gave an image"
