"""A stand-in for the Hugging Face Hub on localhost: what a client needs to create, upload, look up and download.

It follows the Hub's HTTP interface for model repositories: uploads by preupload, LFS and one commit of JSON lines;
downloads by info, tree and resolve, where a large file redirects to a store. Everything lies in memory. Ids of
data sets begin with "datasets/", those of Spaces with "spaces/".

A test can let things go wrong: `hub.fail("/commit/", status=412)` answers the next request of which the path matches
with that status, `hub.fail("/store/", cut_after=100, method="PUT")` cuts its connection after so many bytes.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".parquet")
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ANY_ID = r"(?P<id>(?:datasets/|spaces/)?[\w.-]+/[\w.-]+)"


class HubError(Exception):
    """An answer that is not 2xx, with the code by which the client tells errors apart."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: dict[str, str] | None = None, **content: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.content, self.headers = status, code, content, headers or {}


@dataclass
class Fault:
    """What goes wrong with requests to come.

    Attributes:
        pattern: Regular expression that is searched in the path.
        status: Status of the answer, which reaches no repository.
        cut_after: Bytes after which the connection is cut, of the request's body or, where it has none, of the
            answer's; None answers with the status.
        method: Only requests of this method; empty for all.
        skip: So many matching requests pass before.
        times: So many requests fail.
        retry_after: Content of Retry-After; empty for none.
        message: What the Hub says of it.
    """

    pattern: str
    status: int = 500
    cut_after: int | None = None
    method: str = ""
    skip: int = 0
    times: int = 1
    retry_after: str = ""
    message: str = "A fault of the test"

    def takes(self, method: str, path: str) -> bool:
        """Say whether a request fails by this fault, and count it."""
        if self.times <= 0 or not re.search(self.pattern, path) or self.method not in ("", method):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


@dataclass
class Repo:
    """A repository: its commits in order, the last of which is `main`; each holds all files by path."""

    private: bool = False
    gated: bool = False
    refuses_uploads: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, changes: dict[str, bytes], deleted: Collection[str] = ()) -> str:
        files = {**(list(self.commits.values())[-1] if self.commits else {}), **changes}
        files = {path: data for path, data in files.items() if path not in deleted}
        content = "".join(f"{path} {sha256(data)}\n" for path, data in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{content}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = list(self.commits)[-1] if revision == "main" and self.commits else revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, self.commits[sha]


class FakeHub:
    """The server; a context manager that serves while it is open.

    Attributes:
        token: The one token that logs in.
        repos: Repositories by id; tests may change them.
        requests: Method and path of every request, and whether it carried the token.
        ranges: Path and Range header of every request for a part of a file.
        faults: What goes wrong with requests to come; see `fail`.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.ranges: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.store_url = f"{self.url.replace('127.0.0.1', 'localhost')}/store"  # another host to the client

    def __enter__(self) -> Self:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def head(self, repo_id: str) -> str:
        """Newest commit of a repository."""
        return self.repos[repo_id].at("main")[0]

    def fail(self, pattern: str, **how: Any) -> Fault:
        """Let requests to come fail, by the fields of `Fault`; its `times` says how many are still to come."""
        self.faults.append(Fault(pattern, **how))
        return self.faults[-1]

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Find the fault by which a request fails."""
        with self.lock:
            return next((fault for fault in self.faults if fault.takes(method, path)), None)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_route()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def handle_route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.logged_in = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        self.hub.requests.append((self.command, path, self.logged_in))
        if "Range" in self.headers:
            self.hub.ranges.append((path, self.headers["Range"]))
        self.fault = self.hub.fault_for(self.command, path)
        cut = self.fault.cut_after if self.fault else None
        if cut is not None and self.command not in ("GET", "HEAD"):
            self.rfile.read(min(cut, int(self.headers.get("Content-Length", cut))))
            return self.hang_up()
        self.body = self.read_body()
        try:
            if self.fault and cut is None:
                retry = {"Retry-After": self.fault.retry_after} if self.fault.retry_after else {}
                raise HubError(self.fault.status, "", self.fault.message, headers=retry)
            for methods, pattern, answer in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods:
                    return answer(self, **found.groupdict())
            raise HubError(501, "NotImplemented", f"{self.command} {path} is not part of this stand-in")
        except HubError as error:
            codes = {"X-Error-Code": error.code} if error.code else {}
            headers = {**codes, "X-Error-Message": str(error), **error.headers}
            self.send(json.dumps({"error": str(error), **error.content}).encode(), error.status, headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def hang_up(self) -> None:
        """Cut the connection."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.fault and self.fault.cut_after is not None:
            self.wfile.write(data[: self.fault.cut_after])
            return self.hang_up()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, data: object) -> None:
        self.send(json.dumps(data).encode(), headers={"Content-Type": "application/json"})

    def repo(self, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.logged_in):
            raise HubError(404 if self.logged_in else 401, "RepoNotFound", "Repository not found")
        if write and not self.logged_in:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        return repo

    def whoami(self) -> None:
        if not self.logged_in:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        self.send_json({"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        if not self.logged_in:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        settings = json.loads(self.body)
        kind = settings.get("type") or "model"
        repo_id = f"{settings.get('organization') or 'org'}/{settings['name']}"
        repo_id = repo_id if kind == "model" else f"{kind}s/{repo_id}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(409, "RepoExists", "You already created this model repo", url=url)
        self.hub.repos[repo_id] = Repo(private=settings.get("visibility") == "private")
        self.hub.repos[repo_id].commit({".gitattributes": b""})
        self.send_json({"url": url, "id": repo_id})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, id: str, revision: str) -> None:
        self.repo(id, write=True).at(revision)
        files = [
            {"path": path, "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular", "shouldIgnore": False}
            for path in (item["path"] for item in json.loads(self.body)["files"])
        ]
        self.send_json({"files": files})

    def lfs_batch(self, id: str) -> None:
        repo = self.repo(id, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            verify = {"href": f"{self.hub.url}/{id}.git/info/lfs/verify"}
            actions = {"upload": {"href": f"{self.hub.store_url}/{item['oid']}?repo={id}"}, "verify": verify}
            known = item["oid"] in self.hub.store and not repo.refuses_uploads
            item |= {} if known else {"actions": actions}
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.hub.repos[self.path.partition("?repo=")[2]].refuses_uploads:
            raise HubError(403, "Forbidden", "Storage limit reached")
        self.hub.store[oid] = self.body
        self.send(b"")

    def lfs_verify(self, id: str) -> None:
        wanted = json.loads(self.body)
        data = self.hub.store.get(wanted["oid"], b"")
        if (sha256(data), len(data)) != (wanted["oid"], wanted["size"]):
            raise HubError(422, "Invalid", "The upload is damaged")
        self.send_json({})

    def commit(self, id: str, revision: str) -> None:
        repo, changes, deleted = self.repo(id, write=True), {}, set()
        for line in self.body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header" and value.get("parentCommit") not in (None, self.hub.head(id)):
                raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                changes[value["path"]] = self.hub.store[value["oid"]]
            elif key == "deletedFile":
                deleted.add(value["path"])
        sha = repo.commit(changes, deleted)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}"})

    def info(self, id: str, revision: str | None = None) -> None:
        sha, files = self.repo(id).at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.send_json({"id": id, "sha": sha, "private": self.repo(id).private, "siblings": siblings})

    def tree(self, id: str, revision: str) -> None:
        _, files = self.repo(id).at(revision)
        entries = []
        for path, data in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if path.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self.send_json(entries)

    def resolve(self, id: str, revision: str, file: str) -> None:
        repo = self.repo(id)
        sha, files = repo.at(revision)
        if repo.gated:
            raise HubError(403, "GatedRepo", f"Access to {id} is restricted.")
        if file not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data, headers = files[file], {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if file.endswith(LFS_SUFFIXES):
            oid = sha256(data)
            self.hub.store[oid] = data
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{oid}"'}
            return self.send(b"", 302, {**headers, "Location": f"{self.hub.store_url}/{oid}"})
        self.send_range(data, {**headers, "ETag": f'"{git_oid(data)}"'})

    def stored(self, oid: str) -> None:
        self.send_range(self.hub.store[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(data, 200, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data) - 1) + 1, len(data))
        where = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        self.send(data[start:stop], 206, {**headers, **where})


_Answer = Callable[..., None]
_ROUTES: list[tuple[str, str, _Answer]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/(?:models/)?{ANY_ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/{ID}\\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/store/(?P<oid>[0-9a-f]+)", _Handler.lfs_put),
    ("POST", f"/{ID}\\.git/info/lfs/verify", _Handler.lfs_verify),
    ("POST", f"/api/(?:models/)?{ANY_ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("GET", f"/api/(?:models/)?{ANY_ID}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", f"/api/(?:models/)?{ANY_ID}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET HEAD", f"/{ANY_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("GET HEAD", "/store/(?P<oid>[0-9a-f]+)", _Handler.stored),
]


def sha256(data: bytes) -> str:
    """Name of a large file's content."""
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    """Name git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
