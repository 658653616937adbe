"""A Hugging Face Hub on the loopback interface: the part of its API that reading and writing repositories uses.

It keeps files on disk and says what it was asked. `with FakeHub(folder) as hub:` serves at `hub.endpoint`;
`hub.environment()` is what a process needs to use it. huggingface_hub reads HF_ENDPOINT when it is imported, so a test
that stays in its process calls `hub.patch(monkeypatch)`.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from web_server import WebServer

REPO = r"(?P<type>datasets|models|spaces)/(?P<repo>[^/]+/[^/]+)"


@dataclass(frozen=True)
class Blob:
    """A file of a repository."""

    sha256: str
    size: int
    lfs: bool
    git: str


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> dict[str, Blob] | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What a request is answered with instead: a status, or half of the answer."""

    pattern: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"{}"


class FakeHub:
    """A Hub that keeps its files below `folder`.

    Args:
        folder: An empty folder.
        token: What private repositories and all writing need; None allows everybody everything.
        page: Entries in one answer of a listing.
    """

    def __init__(self, folder: Path, token: str | None = None, page: int = 1000) -> None:
        self.folder, self.token, self.page = folder, token, page
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []  # "GET /path"
        self.sent: Counter[str] = Counter()  # SHA-256 of each content that was uploaded
        self.leaked: list[str] = []  # tokens that were sent to the place of large files
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.server = WebServer(type("Bound", (Handler,), {"hub": self}))
        self.port, self.endpoint = self.server.server_address[1], self.server.url

    def __enter__(self) -> "FakeHub":
        self.server.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.server.__exit__(*exception)

    def environment(self) -> dict[str, str]:
        """Variables for a process that shall use this Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(self.folder / "home"),
            "HF_TOKEN": self.token or "",
        }

    def patch(self, monkeypatch) -> None:
        """Make huggingface_hub in this process use this Hub."""
        from huggingface_hub import constants

        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(self.folder / "home" / "token"))

    # ------------------------------------------------------------------------------------------ for tests

    def refuse(self, pattern: str, status: int, times: int = 1_000_000, body: bytes = b"{}", **headers: str) -> None:
        """Answer requests whose `METHOD /path` matches with a status; `Retry_After` in `headers` is Retry-After."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, times, status, named, body))

    def cut(self, pattern: str, times: int = 1_000_000) -> None:
        """Break the connection after half of the answer."""
        self.faults.append(Fault(pattern, times))

    def put(self, repo: str, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Commit files to a data set; None removes one. The data set is created where it is absent."""
        with self.lock:
            repository = self.repositories.setdefault(f"datasets/{repo}", self.new())
            tree = dict(repository.at(branch) or {})
            for name, data in files.items():
                if data is None:
                    del tree[name]
                else:
                    tree[name] = self.blob(data, lfs=is_large(name, data))
            return self.commit(repository, branch, tree, "put")

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a data set."""
        tree = self.repositories[f"datasets/{repo}"].at(revision) or {}
        return {name: self.content(blob.sha256) for name, blob in sorted(tree.items())}

    def new(self, *, private: bool = False) -> Repository:
        """A repository that holds what the Hub puts into a new one."""
        repository = Repository(private=private)
        attributes = self.blob(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n", lfs=False)
        self.commit(repository, "main", {".gitattributes": attributes}, "initial commit")
        return repository

    # ------------------------------------------------------------------------------------------ storage

    def content(self, sha256: str) -> bytes:
        return (self.folder / sha256).read_bytes()

    def holds(self, sha256: str) -> bool:
        return (self.folder / sha256).is_file()

    def blob(self, data: bytes, *, lfs: bool) -> Blob:
        sha256 = hashlib.sha256(data).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / sha256).write_bytes(data)
        return Blob(sha256, len(data), lfs, git_oid(data if not lfs else pointer(sha256, len(data))))

    def commit(self, repository: Repository, branch: str, tree: dict[str, Blob], message: str) -> str:
        text = json.dumps([branch, len(repository.commits), sorted((name, blob.git) for name, blob in tree.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[oid] = tree
        repository.branches[branch] = oid
        repository.messages.append(message)
        return oid


def is_large(name: str, data: bytes) -> bool:
    return name.endswith((".parquet", ".lance")) or b"\0" in data[:512]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, *arguments: object) -> None:
        pass

    def do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.chunks()
        url = urlsplit(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        line = f"{self.command} {self.route}"
        with self.hub.lock:
            self.hub.requests.append(line)
            fault = next((each for each in self.hub.faults if each.times > 0 and re.search(each.pattern, line)), None)
            if fault:
                fault.times -= 1
        self.cut = fault is not None and not fault.status
        if fault and fault.status:
            return self.answer(fault.body, fault.status, **fault.headers)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, line):
                return method(self, **found.groupdict())
        return self.error(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = do

    def chunks(self) -> bytes:
        data = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def answer(self, data: bytes | object, status: int = 200, **headers: str) -> None:
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
            headers = {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            self.close_connection = True

    def error(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, **{"X-Error-Code": code, "X-Error-Message": code})

    # ------------------------------------------------------------------------------------------ rights

    def is_known(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def found(self, type: str, repo: str, *, write: bool = False) -> Repository | None:
        """The repository, unless it was answered that there is none."""
        repository = self.hub.repositories.get(f"{type}/{repo}")
        if repository is None or ((repository.private or write) and not self.is_known()):
            self.error(404 if self.is_known() else 401, "RepoNotFound")
            return None
        return repository

    def tree(self, repository: Repository, revision: str) -> dict[str, Blob] | None:
        tree = repository.at(revision)
        if tree is None:
            self.error(404, "RevisionNotFound")
        return tree

    # ------------------------------------------------------------------------------------------ routes

    def create(self) -> None:
        asked = json.loads(self.body)
        if not self.is_known():
            return self.error(401, "Unauthorized")
        name = f"{asked['type']}s/{asked['organization']}/{asked['name']}"
        said = {"url": f"{self.hub.endpoint}/{name}"}
        with self.hub.lock:
            if name in self.hub.repositories:
                return self.answer(said | {"error": "You already created this repo"}, 409)
            self.hub.repositories[name] = self.hub.new(private=asked.get("visibility") == "private")
        return self.answer(said)

    def branch(self, type: str, repo: str, revision: str) -> None:
        repository = self.found(type, repo, write=True)
        if repository is None:
            return None
        if revision in repository.branches:
            return self.answer({"error": "Reference already exists"}, 409)
        repository.branches[revision] = repository.branches["main"]
        return self.answer({})

    def info(self, type: str, repo: str, revision: str | None = None) -> None:
        repository = self.found(type, repo)
        if repository is None or (tree := self.tree(repository, revision or "main")) is None:
            return
        sha = repository.branches.get(revision or "main", revision)
        siblings = [{"rfilename": name} for name in tree]
        self.answer({"id": repo, "sha": sha, "private": repository.private, "siblings": siblings})

    def listing(self, type: str, repo: str, revision: str, path: str | None = None) -> None:
        repository = self.found(type, repo)
        if repository is None or (tree := self.tree(repository, revision)) is None:
            return
        below = f"{path}/" if path else ""
        entries: dict[str, dict] = {}
        for name, blob in sorted(tree.items()):
            if not name.startswith(below):
                continue
            parts = name.removeprefix(below).split("/")
            for depth in range(1, len(parts)):
                folder = below + "/".join(parts[:depth])
                entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
            entries[name] = described(name, blob)
        if "true" not in "".join(self.query.get("recursive", [])).lower():
            entries = {name: entry for name, entry in entries.items() if "/" not in name.removeprefix(below)}
        start = int(self.query.get("cursor", ["0"])[0])
        shown, headers = list(entries.values())[start : start + self.hub.page], {}
        if start + self.hub.page < len(entries):
            rest = f"recursive={self.query.get('recursive', ['false'])[0]}&cursor={start + self.hub.page}"
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{rest}>; rel="next"'
        self.answer(shown, **headers)

    def paths_info(self, type: str, repo: str, revision: str) -> None:
        repository = self.found(type, repo)
        if repository is None or (tree := self.tree(repository, revision)) is None:
            return
        paths = parse_qs(self.body.decode()).get("paths", [])
        self.answer([described(name, tree[name]) for name in paths if name in tree])

    def preupload(self, type: str, repo: str, revision: str) -> None:
        repository = self.found(type, repo, write=True)
        if repository is None or (tree := self.tree(repository, revision)) is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_large(file["path"], base64.b64decode(file["sample"])) else "regular"
            known = tree.get(file["path"])
            oid = None if known is None else known.sha256 if known.lfs else known.git
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def batch(self, type: str, repo: str) -> None:
        if self.found(type, repo, write=True) is None:
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append(asked | ({} if self.hub.holds(asked["oid"]) else {"actions": upload}))
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer({"error": "wrong digest"}, 400)
        with self.hub.lock:
            self.hub.sent[oid] += 1
        self.hub.blob(self.body, lfs=True)
        return self.answer(b"")

    def commit(self, type: str, repo: str, revision: str) -> None:
        repository = self.found(type, repo, write=True)
        if repository is None or (tree := self.tree(repository, revision)) is None:
            return None
        tree, summary = dict(tree), ""
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "deletedFile":
                if value["path"] not in tree:
                    return self.error(404, "EntryNotFound")
                del tree[value["path"]]
            elif item["key"] == "file":
                tree[value["path"]] = self.hub.blob(base64.b64decode(value["content"]), lfs=False)
                with self.hub.lock:
                    self.hub.sent[tree[value["path"]].sha256] += 1
            elif item["key"] == "lfsFile" and self.hub.holds(value["oid"]):
                oid, size = value["oid"], value["size"]
                tree[value["path"]] = Blob(oid, size, True, git_oid(pointer(oid, size)))
            else:
                return self.answer({"error": f"unknown operation or content: {value['path']}"}, 400)
        with self.hub.lock:
            oid = self.hub.commit(repository, revision, tree, summary)
        return self.answer({"commitUrl": f"{self.hub.endpoint}/{type}/{repo}/commit/{oid}", "commitOid": oid})

    def resolve(self, type: str, repo: str, revision: str, path: str) -> None:
        repository = self.found(type, repo)
        if repository is None or (tree := self.tree(repository, revision)) is None:
            return None
        if repository.gated and not self.is_known():
            return self.error(403, "GatedRepo")
        if path not in tree:
            return self.error(404, "EntryNotFound")
        blob, commit = tree[path], repository.branches.get(revision, revision)
        about = {"X-Repo-Commit": commit, "ETag": f'"{blob.sha256 if blob.lfs else blob.git}"'}
        if not blob.lfs:
            return self.serve(blob.sha256, about)
        about |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.sha256}"'}
        # Large files lie on another host, where no token belongs.
        return self.answer(b"", 302, Location=f"http://localhost:{self.hub.port}/cdn/{blob.sha256}", **about)

    def large(self, sha256: str) -> None:
        if token := self.headers.get("Authorization"):
            self.hub.leaked.append(token)
        self.serve(sha256, {})

    def serve(self, sha256: str, headers: dict[str, str]) -> None:
        data = self.hub.content(sha256)
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(data[start : end + 1], 206, **headers)
        return self.answer(data, **headers, **{"Accept-Ranges": "bytes"})

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})


def described(name: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.git}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(pointer(blob.sha256, blob.size))}
    return entry


ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET /api/{REPO}", Handler.info),
    (rf"GET /api/{REPO}/revision/(?P<revision>.+)", Handler.info),
    (rf"POST /api/{REPO}/branch/(?P<revision>.+)", Handler.branch),
    (rf"GET /api/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.listing),
    (rf"POST /api/{REPO}/paths-info/(?P<revision>.+)", Handler.paths_info),
    (rf"POST /api/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /api/{REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", Handler.upload),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (r"(?:GET|HEAD) /cdn/(?P<sha256>[0-9a-f]{64})", Handler.large),
]
