"""Images behind addresses -> files: many at a time, few per host, resumable; dead links are recorded with their reason."""

import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.error
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TextIO

from ..utils.files import alone, parse_row, whole
from ..utils.runlog import counter
from .images import ImageError, fetch_bytes, load_image

PER_HOST = 4
"""Connections to one host at a time."""
PAUSE_S = 0.1
"""From the start of one request to the next to the same host."""
PATIENCE_S = 60.0
"""Longest Retry-After that is waited for; a host that wants more, or refuses again after it, is left alone until the next run."""
RUNS = 3
"""Runs that ask a link which fails for a reason that may pass."""
SILENCE = 64
"""Links without an answer, from the start, after which the network is taken to be down."""
LOG = "downloads.jsonl"

_TICK_S = 0.02
_PASSING = frozenset([408, 425, 429, 500, 502, 503, 504])
_KINDS: list[tuple[type[Exception] | tuple[type[Exception], ...], str, bool]] = [
    (TimeoutError, "timed out", True),
    (socket.gaierror, "no such host", True),
    (ssl.SSLCertVerificationError, "bad certificate", False),
    (ImageError, "not an image", False),
    ((UnicodeError, http.client.InvalidURL), "not an address", False),
]
_DECODING = threading.Lock()  # one image at a time: the largest need half a gigabyte each


@dataclass(frozen=True)
class Outcome:
    url: str
    reason: str = ""
    """Why there is no image; empty: there is."""
    passing: bool = False
    """Whether the reason may pass."""
    wait_s: float = 0.0
    """What the host asks for before the next request."""
    known: bool = False
    """From an earlier run."""


def image_file(folder: Path, url: str) -> Path:
    """Where the image of this address is kept."""
    name = hashlib.sha256(url.encode()).hexdigest()[:32]
    return folder / name[:2] / name


def link_rot(links: Counter[str]) -> str:
    """One line from the number of links by reason ("": an image)."""
    dead = ", ".join(f"{count} {reason}" for reason, count in links.most_common() if reason)
    return f"{links['']} of {links.total()} links gave an image" + (f"; dead: {dead}" if dead else "")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds, given as such or as a date; without, a second if there were too many requests."""
    value = error.headers.get("Retry-After", "")
    try:
        return float(value) if value.isdigit() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return float(error.code == 429)


def _failure(url: str, error: Exception) -> Outcome:
    if isinstance(error, urllib.error.HTTPError):
        error.close()  # it is the response
        passing = error.code in _PASSING
        return Outcome(url, f"HTTP {error.code}", passing, _retry_after(error) if passing else 0.0)
    inner = getattr(error, "reason", None)
    cause = inner if isinstance(inner, Exception) else error
    other = (str(cause), False) if isinstance(cause, ValueError) else ("connection failed", True)
    return Outcome(url, *next(((reason, passing) for kind, reason, passing in _KINDS if isinstance(cause, kind)), other))


def _fetch(url: str, path: Path) -> Outcome:
    """Puts the image at `path`, whole or not at all."""
    try:
        data = fetch_bytes(url)
        with _DECODING:
            load_image(data, url)
    except Exception as error:  # urllib, http.client, ssl and socket share no narrower class
        return _failure(url, error)
    with whole(path) as partial:
        partial.write_bytes(data)
    return Outcome(url)


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].lower()


def _look_up(urls: Iterable[str], folder: Path, dead: dict[str, str]) -> Iterator[Outcome]:
    """Each address once, with what is known of it."""
    seen: set[str] = set()
    for url in urls:
        if url not in seen:
            seen.add(url)
            there = image_file(folder, url).is_file()
            yield Outcome(url, "" if there else dead.get(url, ""), known=there or url in dead)


def _ask(links: Iterator[Outcome], folder: Path, enough: int, connections: int) -> Generator[Outcome, None, None]:
    """Outcomes as they come, of no more links than `enough` images need; what fails for a passing reason is asked once more.

    The links whose outcomes are found are always the first ones, whatever the hosts' speed.
    """
    good, more = 0, True
    waiting: list[str] = []
    running: dict[Future[Outcome], str] = {}
    again: set[str] = set()
    refused: dict[str, Outcome] = {}
    busy: Counter[str] = Counter()
    free_at: dict[str, float] = defaultdict(float)
    with ThreadPoolExecutor(connections) as pool:
        while more or waiting or running:
            while (more := more and good < enough) and len(waiting) + len(running) < min(8 * connections, enough - good):
                link = next(links, None)
                if link is None:
                    more = False
                elif link.known:
                    good += not link.reason
                    yield link
                else:
                    waiting.append(link.url)
            for url in waiting.copy():
                host, now = _host(url), time.monotonic()
                if host in refused:
                    waiting.remove(url)
                    yield replace(refused[host], url=url)
                elif len(running) < connections and busy[host] < PER_HOST and now >= free_at[host]:
                    waiting.remove(url)
                    busy[host], free_at[host] = busy[host] + 1, now + PAUSE_S
                    running[pool.submit(_fetch, url, image_file(folder, url))] = url
            time.sleep(0 if running else _TICK_S)
            for future in wait(running, _TICK_S, FIRST_COMPLETED).done:
                url, outcome = running.pop(future), future.result()
                host, wait_s = _host(url), outcome.wait_s
                busy[host], free_at[host] = busy[host] - 1, max(free_at[host], time.monotonic() + wait_s)
                if wait_s > PATIENCE_S or (wait_s > 0 and url in again):
                    refused[host] = outcome
                if outcome.passing and host not in refused and url not in again:
                    again.add(url)
                    waiting.append(url)
                else:
                    good += not outcome.reason
                    yield outcome


def _read_log(log: TextIO) -> dict[str, str]:
    """Links that are not asked again, with the reason; the log is then ready for more lines."""
    last: dict[str, str] = {}
    tries: Counter[str] = Counter()
    line = "\n"
    log.seek(0)
    for line in log:
        if row := parse_row(line, "url", "error", "passing"):  # else a kill cut it short
            last[row["url"]] = row["error"]
            tries[row["url"]] += 1 if row["passing"] else RUNS
    if not line.endswith("\n"):
        log.write("\n")
    return {url: reason for url, reason in last.items() if reason and tries[url] >= RUNS}


def logged(folder: Path) -> set[str]:
    """Addresses of which the folder's log tells what came of them."""
    with (folder / LOG).open(encoding="utf-8") as log:
        return {row["url"] for line in log if (row := parse_row(line, "url", "error", "passing"))}


def download(
    urls: Iterable[str], folder: Path, enough: int, connections: int, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Address -> why there is no image ("": there is, in `image_file`), of as many of the first `urls` as `enough` images need.

    Images of an earlier run are not asked for again, nor are dead links, but those whose reason may pass are, in `RUNS` runs.
    Of two processes one fetches while the other waits. `on_progress` gets (images, enough); the default shows them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    show, results, unwritten, answered, good = on_progress or counter("images fetched:"), dict[str, str](), list[str](), False, 0
    with alone(folder / "downloads.lock"), (folder / LOG).open("a+", encoding="utf-8") as log:
        links = _look_up(urls, folder, _read_log(log))
        with closing(_ask(links, folder, enough, connections)) as outcomes:
            for link in outcomes:
                results[link.url] = link.reason
                good += not link.reason
                if not link.known:
                    show(good, enough)
                    answered = answered or not link.passing
                    name = None if link.reason else image_file(Path(), link.url).as_posix()
                    unwritten.append(json.dumps({"url": link.url, "file": name, "error": link.reason, "passing": link.passing}) + "\n")
                if answered:  # what a network that is down makes of links is not held against them
                    log.writelines(unwritten)
                    log.flush()
                    unwritten.clear()
                elif len(unwritten) == SILENCE:
                    break
    return results
