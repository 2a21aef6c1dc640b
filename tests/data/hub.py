"""A local Hugging Face hub, which serves folders as datasets and models over the hub's HTTP interface.

The real client libraries use it if `HF_ENDPOINT` has its address. The files of a revision are in
`ROOT/<owner>/<name>/<revision>/`. Its commit is a hash of the files, so `main` may change while the server runs.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve the datasets and models of a folder while the block runs, and yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root, "requests": []}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def commit_of(folder: Path) -> str:
    """Return the commit of a revision."""
    digest = hashlib.sha1()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    root: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if path[:2] == ["api", "datasets"]:
            self._api(*self._find(path[2:4], path[5] if len(path) > 5 else "main"), path[4:5], path[6:])
        elif path[:1] == ["datasets"] and path[3:4] == ["resolve"]:
            self._file(*self._find(path[1:3], path[4]), path[5:])
        elif path[2:3] == ["resolve"]:
            self._file(*self._find(path[:2], path[3]), path[4:])
        else:
            self._answer(404, b"{}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        folder, _ = self._find(path[2:4], path[5])
        if folder is None or path[4] != "paths-info":
            self._answer(404, b"{}")
            return
        names = json.loads(body)["paths"]
        self._json([_entry(folder, folder / name) for name in names if (folder / name).exists()])

    def _find(self, name: list[str], revision: str) -> tuple[Path | None, str]:
        """Return the folder of a revision, given by its name or its commit, and the commit."""
        dataset = self.root.joinpath(*name)
        for folder in dataset.iterdir() if dataset.is_dir() else ():
            commit = commit_of(folder)
            if revision in (folder.name, commit):
                return folder, commit
        return None, ""

    def _api(self, folder: Path | None, commit: str, endpoint: list[str], subpath: list[str]) -> None:
        if folder is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif endpoint in ([], ["revision"]):
            files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
            name = "/".join(folder.parent.parts[-2:])
            siblings = [{"rfilename": file} for file in files]
            info = {"id": name, "sha": commit, "private": False, "gated": False, "disabled": False, "downloads": 0}
            self._json(info | {"likes": 0, "tags": [], "siblings": siblings})
        elif endpoint == ["tree"] and folder.joinpath(*subpath).is_dir():
            directory = folder.joinpath(*subpath)
            recursive = "recursive=true" in self.path.lower()
            files = sorted(directory.rglob("*") if recursive else directory.iterdir())
            self._json([_entry(folder, file) for file in files])
        else:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _file(self, folder: Path | None, commit: str, subpath: list[str]) -> None:
        file = folder.joinpath(*subpath) if folder else None
        if file is None or not file.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        body = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if requested := self.headers.get("Range"):
            first, _, last = requested.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(body), len(body))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(body)}"
            self._answer(206, body[int(first) : stop], headers)
        else:
            self._answer(200, body, headers)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(folder: Path, file: Path) -> dict[str, object]:
    path = file.relative_to(folder).as_posix()
    if file.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
    return {"type": "file", "oid": _oid(file), "size": file.stat().st_size, "path": path}
