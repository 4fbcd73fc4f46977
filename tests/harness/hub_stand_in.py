"""A stand-in for a hub: the protocol that huggingface_hub speaks to publish, list and download a model, without Xet.

Written after what huggingface_hub 1.33 and 2.4 send and read. One process, everything in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from lit_files.checksum import git_blob_id

TOKEN = "hf_stand_in"
LARGE_BYTES = 4096  # larger files, and binary ones by their ending, are kept by SHA-256
BINARY = (".safetensors", ".parquet", ".pth", ".bin")


@dataclass(frozen=True)
class Blob:
    """A file at a commit."""

    content: bytes
    large: bool

    def facts(self, path: str) -> dict[str, Any]:
        """As the tree lists it."""
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content)}
        if not self.large:
            return found | {"oid": git_blob_id(self.content)}
        pointer = pointer_of(self.content)
        lfs = {"oid": sha256(self.content), "size": len(self.content), "pointerSize": len(pointer)}
        return found | {"oid": git_blob_id(pointer), "lfs": lfs}


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], branch: str = "main") -> str:
        parent = self.branches.get(branch, "")
        facts = json.dumps([parent, sorted((p, sha256(b.content)) for p, b in files.items()), len(self.commits)])
        oid = hashlib.sha1(facts.encode()).hexdigest()
        self.commits[oid], self.parents[oid], self.branches[branch] = files, parent, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pointer_of(content: bytes) -> bytes:
    """The file that git keeps in place of a large one."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n".encode()


class HubStandIn:
    """Serves until closed.

    Attributes:
        uploads: how often each large file arrived whole, by SHA-256.
        committed: how often each small file came in a commit, by repository, path and git's blob id.
        agents: parts of the user agents seen, such as hf_hub/2.4.0.
        refuse: called with method and path of each request; a status to answer instead, with Retry-After: 0.
        slow_s: seconds that reading each 64 KiB of an upload takes.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.committed: Counter[tuple[str, str, str]] = Counter()
        self.requests: list[str] = []
        self.agents: set[str] = set()
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.slow_s = 0.0
        self.closed = False
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closed = True  # connections that are kept open get no answer any more
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(6, 1, 1)  # TCP_NODELAY: else each answer in two writes waits 40 ms

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, {"error": message}, headers | ({"Retry-After": "0"} if status == 429 else {}))

    def _body(self) -> bytes:
        length, parts = int(self.headers.get("Content-Length") or 0), []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        while length:
            part = self.rfile.read(min(length, 1 << 16))
            if not part:
                raise ConnectionError("the client is gone")
            parts.append(part)
            length -= len(part)
            time.sleep(self.hub.slow_s if self.command == "PUT" else 0)
        return b"".join(parts)

    def _handle(self) -> None:
        try:
            body = self._body()
        except (ConnectionError, OSError):
            self.close_connection = True
            return
        if self.hub.closed:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {parts.path}")
        self.hub.agents |= set(self.headers.get("User-Agent", "").split("; "))
        status = self.hub.refuse(self.command, parts.path)
        if status is not None:
            self._error(status, "refused by the stand-in")
            return
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            self._error(401, "Invalid credentials in Authorization header")
            return
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else ""):
                with self.hub.lock:
                    getattr(self, name)(*map(unquote, match.groups()), body=body, query=parse_qs(parts.query))
                return
        self._error(404, f"no route for {self.command} {parts.path}", "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str, *, write: bool = False) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or ((found.private or write) and not self._signed_in()):
            self._error(404 if self._signed_in() else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.resolve(revision)
        if commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def create(self, *, body: bytes, query: Any) -> None:
        if not self._signed_in():
            self._error(401, "Invalid username or password.")
            return
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            self._answer(409, url | {"error": "You already created this model repo"})
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = self.hub.repositories[name] = Repository(private)
        repository.commit({".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        self._answer(200, url)

    def refs(self, name: str, *, body: bytes, query: Any) -> None:
        if (repository := self._repository(name)) is None:
            return

        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]

        branches, tags = listed(repository.branches, "heads"), listed(repository.tags, "tags")
        self._answer(200, {"branches": branches, "tags": tags, "converts": []})

    def info(self, name: str, revision: str | None = None, *, body: bytes, query: Any) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (commit := self._commit_of(repository, revision or "main")) is None:
            return
        files = repository.commits[commit]
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._answer(200, {"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, path: str | None = None, *, body: bytes, query: Any) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (commit := self._commit_of(repository, revision)) is None:
            return
        prefix = f"{path}/" if path else ""
        files = {p: b for p, b in repository.commits[commit].items() if p.startswith(prefix)}
        if path and not files:
            self._error(404, f"{path} does not exist", "EntryNotFound")
            return
        listed = [blob.facts(p) for p, blob in sorted(files.items())]
        at = int(query.get("cursor", ["0"])[0])
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        if not recursive:
            listed = [f for f in listed if "/" not in f["path"].removeprefix(prefix)]
        page, rest = listed[at : at + 10], listed[at + 10 :]  # small pages, so that their links are followed
        query_next = f"recursive={recursive}&cursor={at + 10}"
        link = {"Link": f'<{self.hub.url}{urlsplit(self.path).path}?{query_next}>; rel="next"'} if rest else {}
        self._answer(200, page, link)

    def preupload(self, name: str, revision: str, *, body: bytes, query: Any) -> None:
        if (repository := self._repository(name, write=True)) is None:
            return
        if (commit := self._commit_of(repository, revision)) is None:
            return
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if asked["size"] > LARGE_BYTES or path.endswith(BINARY) else "regular"
            blob = repository.commits[commit].get(path)
            oid = None if blob is None else sha256(blob.content) if blob.large else git_blob_id(blob.content)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def batch(self, name: str, *, body: bytes, query: Any) -> None:
        if self._repository(name, write=True) is None:
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{asked['oid']}", "header": {}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str, *, body: bytes, query: Any) -> None:
        if sha256(body) != oid:
            self._error(400, "the content has another SHA-256")
            return
        self.hub.uploads[oid] += 1
        self.hub.large[oid] = body
        self._answer(200)

    def commit(self, name: str, revision: str, *, body: bytes, query: Any) -> None:
        if (repository := self._repository(name, write=True)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        head = repository.branches.get(revision)
        parent = lines[0]["value"].get("parentCommit")
        if head is None or (parent is not None and parent != head):
            self._error(412, "A commit has happened since. Please refresh and try again.")
            return
        files = dict(repository.commits[head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Blob(content, False)
                self.hub.committed[name, value["path"], git_blob_id(content)] += 1
            elif line["key"] == "lfsFile":
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            else:
                del files[value["path"]]
        commit = repository.commit(files, revision)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def tag(self, name: str, revision: str, *, body: bytes, query: Any) -> None:
        self._point(name, revision, "tags", json.loads(body)["tag"])

    def branch(self, name: str, branch: str, *, body: bytes, query: Any) -> None:
        self._point(name, json.loads(body).get("startingPoint", "main"), "branches", branch)

    def _point(self, name: str, revision: str, kind: str, ref: str) -> None:
        if (repository := self._repository(name, write=True)) is None:
            return
        refs: dict[str, str] = getattr(repository, kind)
        if (commit := self._commit_of(repository, revision)) is None:
            return
        if ref in refs:
            self._error(409, f"Reference {ref} already exists")
            return
        refs[ref] = commit
        self._answer(200)

    def validate(self, *, body: bytes, query: Any) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def resolve(self, name: str, revision: str, path: str, *, body: bytes, query: Any) -> None:
        if (repository := self._repository(name)) is None:
            return
        if (commit := self._commit_of(repository, revision)) is None:
            return
        blob = repository.commits[commit].get(path)
        if blob is None:
            self._error(404, "Entry not found", "EntryNotFound")
            return
        etag = f'"{sha256(blob.content) if blob.large else git_blob_id(blob.content)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Content-Length": str(len(blob.content))}
        if blob.large:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(blob.content))}
        self._answer(200, blob.content, headers | {"Content-Type": "application/octet-stream"})


REPO = r"([^/]+/[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{REPO}/refs", "refs"),
    ("GET", f"/api/models/{REPO}", "info"),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", "info"),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", "tree"),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)/(.+)", "tree"),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", "commit"),
    ("POST", f"/api/models/{REPO}/tag/([^/]+)", "tag"),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", "branch"),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/upload/([0-9a-f]{64})", "upload"),
    ("GET", f"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
)
