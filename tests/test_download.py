"""Downloads: an index on this machine whose answers are cut, damaged or without ranges."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mplus import download
from mplus.download import IndexFile, cache_folder, fetch, index_urls
from mplus.errors import DownloadError

CONTENT = bytes(range(256)) * 4096
FILE = IndexFile("Some.Model", "some_model-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


class Index:
    """A package index: what it does wrong can be set; it notes the ranges it was asked for."""

    def __init__(self):
        self.content, self.sends, self.ranges, self.form, self.asked = CONTENT, None, True, "json", []
        self.chunked = False

    def page(self):
        url = f"../../files/{FILE.filename}"
        if self.form == "broken":
            return "application/vnd.pypi.simple.v1+json", '{"files": 1}'
        if self.form == "json":
            return "application/vnd.pypi.simple.v1+json", json.dumps(
                {"files": [{"filename": FILE.filename, "url": url}]}
            )
        return "text/html", f'<html><a href="{url}#sha256={FILE.sha256}">{FILE.filename}</a></html>'


@pytest.fixture
def index(monkeypatch):
    index = Index()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/simple/some-model/":
                kind, text = index.page()
                self._answer(200, kind, text.encode())
            elif self.path == f"/files/{FILE.filename}":
                begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                index.asked.append(begin)
                begin = begin if index.ranges else 0
                self._answer(206 if begin else 200, "application/octet-stream", index.content[begin:][: index.sends])
            else:
                self._answer(404, "text/plain", b"")

        def _answer(self, status, kind, body):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            if index.chunked and kind == "application/octet-stream":  # announces more than it sends
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % (len(body) + 1) + body)
                return
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "index_urls", lambda: [f"http://127.0.0.1:{server.server_port}/simple"])
    yield index
    server.shutdown()


@pytest.mark.parametrize("form", ["json", "html"])
def test_a_file_is_found_and_brought_once(index, tmp_path, form):
    index.form = form
    done = []
    path = fetch(FILE, tmp_path / "new", done.append)
    assert path.name == FILE.filename
    assert path.read_bytes() == CONTENT
    assert done[-1] == len(CONTENT)
    assert fetch(FILE, tmp_path / "new") == path
    assert index.asked == [0]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on(index, tmp_path, ranges):
    index.sends, index.ranges = 300_000, ranges
    with pytest.raises(DownloadError, match=r"cut after 300,000 of 1,048,576 bytes; the next try goes on from there"):
        fetch(FILE, tmp_path)
    assert not (tmp_path / FILE.filename).exists()
    index.sends = None
    assert fetch(FILE, tmp_path).read_bytes() == CONTENT
    assert index.asked == [0, 300_000]


def test_an_answer_that_ends_too_early_is_no_raw_error(index, tmp_path):
    index.chunked, index.sends = True, 300_000
    with pytest.raises(DownloadError, match="the connection was cut"):
        fetch(FILE, tmp_path)
    index.chunked, index.sends = False, None
    assert fetch(FILE, tmp_path).read_bytes() == CONTENT


def test_a_page_that_is_none_is_named(index, tmp_path, monkeypatch):
    index.form = "broken"
    with pytest.raises(DownloadError, match="simple/some-model/ is no page of a package index"):
        fetch(FILE, tmp_path)
    monkeypatch.setattr(download, "index_urls", lambda: ["http://user:secret@127.0.0.1:9/simple"])
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:9/simple: ") as caught:
        fetch(FILE, tmp_path)
    assert "secret" not in str(caught.value)


def test_a_damaged_download_is_deleted_and_can_be_tried_again(index, tmp_path):
    index.content = CONTENT[:-1] + b"?"
    with pytest.raises(DownloadError, match=f"SHA-256 must be {FILE.sha256}, got"):
        fetch(FILE, tmp_path)
    assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".lock")] == []
    index.content = CONTENT
    assert fetch(FILE, tmp_path).read_bytes() == CONTENT


def test_a_file_that_was_damaged_later_is_brought_again(index, tmp_path):
    fetch(FILE, tmp_path).write_bytes(b"short")
    assert fetch(FILE, tmp_path).read_bytes() == CONTENT


def test_two_at_once_bring_it_once(index, tmp_path):
    threads = [threading.Thread(target=fetch, args=(FILE, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / FILE.filename).read_bytes() == CONTENT
    assert index.asked == [0]


def test_the_error_names_every_index(index, tmp_path, monkeypatch):
    there = download.index_urls()
    monkeypatch.setattr(download, "index_urls", lambda: ["http://127.0.0.1:9/simple", *there, "ftp://nowhere"])
    other = IndexFile("some-model", "other.whl", FILE.sha256, FILE.size)
    with pytest.raises(DownloadError, match=r"127.0.0.1:9/simple: .*; .*has no other.whl; ftp://nowhere: .*http"):
        fetch(other, tmp_path)
    assert fetch(FILE, tmp_path).read_bytes() == CONTENT


def test_settings_of_pip_and_uv_come_before_pypi(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple/")
    monkeypatch.setenv("UV_INDEX_URL", "https://uv.example/simple https://two.example/simple")
    urls = index_urls()
    assert urls[:3] == ["https://mirror.example/simple", "https://uv.example/simple", "https://two.example/simple"]
    assert urls[-1] == download.PYPI


def test_the_cache_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("MPLUS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mplus"
    monkeypatch.setenv("MPLUS_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
