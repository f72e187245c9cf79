"""A Hugging Face Hub on 127.0.0.1, as far as its clients go in these tests: reading, pushing, refusing, failing.

    with HubStandIn() as hub:
        hub.add("datasets", "me/ds", {"data/train-00000.parquet": content}, gated=True)
        subprocess.run(command, env=hub.environment(home, token=hub.token("me", reads=["me/ds"])))

Its answers are those that huggingface_hub 2.4, datasets 5.2 and transformers 5 were seen to need; an unknown path is a
404. Clients read HF_ENDPOINT when they are imported: they run in a process of their own.
"""

import base64
import hashlib
import io
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = ("models", "datasets")


@dataclass
class Repository:
    """A branch of a repository at one commit; pushing makes another commit and keeps no history."""

    files: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False  # its names are seen by everybody, its files by those who accepted the terms
    private: bool = False  # it is seen by those who may read it
    messages: list[str] = field(default_factory=list)  # of the commits that were pushed
    branches: dict[str, "Repository"] = field(default_factory=dict)  # those besides main

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(str(len(self.messages)).encode())
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()

    def at(self, revision: str | None) -> "Repository":
        """The branch of that name; main for any other revision."""
        return self.branches.get(revision, self)


@dataclass
class Account:
    """Who holds a token: it reads and writes its own repositories, and reads those gated and private ones."""

    name: str
    reads: set[str]
    writes: bool = True


@dataclass
class Fault:
    """Requests whose path on the server holds `part` fail: the first `after` are served, the next `times` not.

    GETs of files, or POSTs and PUTs, as `method` says.
    """

    part: str
    times: float
    status: int | None  # None: the connection ends, in the middle of the content or without an answer
    after: int = 0
    method: str = "GET"
    is_done: bool = False  # what is asked (POST, PUT) is done all the same: the answer alone is lost

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or self.part not in path or self.times <= 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return True


class HubStandIn:
    """The server and what it holds. As a context it serves; `requests` lists (method, path) in their order."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.accounts: dict[str, Account] = {}  # by token
        self.objects: dict[str, bytes] = {}  # large files that were uploaded, by SHA-256; commits name them
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object):
        self.server.shutdown()
        self.server.server_close()

    def add(self, kind: str, name: str, files: dict[str, bytes] | Path, **access: bool) -> Repository:
        """A repository of these files, or of those below a folder."""
        assert kind in KINDS, kind
        if isinstance(files, Path):
            paths = [path for path in sorted(files.rglob("*")) if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        self.repositories[kind, name] = Repository(dict(files), **access)
        return self.repositories[kind, name]

    def token(self, name: str, reads: tuple[str, ...] | list[str] = (), writes: bool = True) -> str:
        """A token of the account `name`, which reads its own repositories and these, and writes its own."""
        token = f"hf_{hashlib.sha1(f'{name} {writes}'.encode()).hexdigest()[:34]}"
        self.accounts[token] = Account(name, set(reads), writes)
        return token

    def fail(self, part: str, times: float = 1, status: int | None = 503, after: int = 0, **details: Any) -> Fault:
        """From now on requests fail as Fault says; times=math.inf: for good."""
        self.faults.append(Fault(part, times, status, after, **details))
        return self.faults[-1]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The variables of a process whose Hub is this one, with caches of its own below `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        return {**kept, **own, "HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {})}


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any):
        pass

    # ---------------------------------------------------------------- answers

    def answer(self, status: int, content: bytes = b"", **headers: Any):
        self.send_response(status)
        for name, value in {"Content_Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: Any):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def refuse(self, status: int, code: str | None, message: str):
        code_header = {"X_Error_Code": code} if code else {}
        self.answer(status, json.dumps({"error": message}).encode(), X_Error_Message=message, **code_header)

    # ---------------------------------------------------------------- who asks, and for what

    def account(self) -> Account | None:
        """Who holds the token; None without one. Raises PermissionError for a token nobody has."""
        header = self.headers.get("Authorization")
        if header is None:
            return None
        try:
            return self.hub.accounts[header.removeprefix("Bearer ")]
        except KeyError:
            raise PermissionError from None

    def may_read(self, name: str) -> bool:
        account = self.account()
        return account is not None and (name in account.reads or name.split("/")[0] == account.name)

    def may_write(self, name: str) -> bool:
        account = self.account()
        return account is not None and account.writes and name.split("/")[0] == account.name

    def found(self, kind: str, name: str, for_files: bool) -> Repository | None:
        """The repository, or None after the answer that the Hub gives to who may not have it."""
        repository = self.hub.repositories.get((kind, name))
        status = 401 if self.account() is None else 404
        if repository is None or (repository.private and not self.may_read(name)):
            self.refuse(status, "RepoNotFound", "Repository not found")
            return None
        if repository.gated and for_files and not self.may_read(name):
            status = 401 if self.account() is None else 403
            self.refuse(status, "GatedRepo", f"Access to {kind[:-1]} {name} is restricted.")
            return None
        return repository

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        try:
            self.account()
        except PermissionError:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        fault = self.fault() if self.command in ("POST", "PUT") else None
        if fault is not None:
            if not fault.is_done and fault.status is not None:
                return self.refuse(fault.status, None, "Out of order")
            self.wfile, self.close_connection = io.BytesIO(), True
            if not fault.is_done:
                return
        for pattern, act in ROUTES:
            matched = re.fullmatch(pattern, path)
            if matched:
                return act(self, body=body, query=query, **matched.groupdict())
        self.refuse(404, "EntryNotFound", "Not found")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # the names that http.server calls

    def fault(self) -> Fault | None:
        with self.hub.lock:
            path = unquote(self.path)
            return next((fault for fault in self.hub.faults if fault.strikes(self.command, path)), None)

    # ---------------------------------------------------------------- reading

    def send_file(self, name: str, revision: str, file: str, kind: str | None = None, **_: Any):
        repository = self.found((kind or "models/").rstrip("/"), name, for_files=True)
        if repository is None:
            return
        if revision not in ("main", *repository.branches) and not re.fullmatch("[0-9a-f]{40}", revision):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        repository = repository.at(revision)
        if file not in repository.files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = repository.files[file]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": repository.commit}
        fault = self.fault()
        if fault is not None and fault.status is not None:
            return self.refuse(fault.status, None, "Out of order")
        if fault is not None:
            self.answer(206, content[:10], **{**headers, "Content_Length": len(content)})
            self.close_connection = True
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span is None:
            return self.answer(200, content, Accept_Ranges="bytes", **headers)
        first, last = int(span[1]), min(int(span[2]), len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], **headers)

    def send_info(self, kind: str, name: str, revision: str | None, **_: Any):
        repository = self.found(kind, name, for_files=False)
        if repository is not None:
            repository = repository.at(revision)
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            facts = {"id": name, "sha": repository.commit, "private": repository.private, "siblings": siblings}
            self.answer_json({**facts, "gated": "auto" if repository.gated else False, "tags": [], "downloads": 0})

    def send_authorization(self, kind: str, name: str, write: str | None, **_: Any):
        if (self.writable(kind, name) if write else self.found(kind, name, for_files=True)) is not None:
            self.answer(200)

    def send_tree(self, kind: str, name: str, query: dict[str, list[str]], folder: str | None = None, **_: Any):
        repository = self.found(kind, name, for_files=False)
        if repository is None:
            return
        start = f"{folder.strip('/')}/" if folder else ""
        is_recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, content in sorted(repository.files.items()):
            if not path.startswith(start):
                continue
            steps = path.removeprefix(start).split("/")
            for depth in range(1, len(steps) if is_recursive else min(len(steps), 2)):
                directory = start + "/".join(steps[:depth])
                entries[directory] = {"type": "directory", "path": directory, "size": 0, "oid": "0" * 40}
            if is_recursive or len(steps) == 1:
                entries[path] = _entry(path, content)
        if not entries and folder:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        self.answer_json(list(entries.values()))

    def send_paths(self, kind: str, name: str, body: bytes, **_: Any):
        repository = self.found(kind, name, for_files=False)
        if repository is not None:
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            files = repository.files
            self.answer_json([_entry(path, files[path]) for path in asked if path in files])

    def send_account(self, **_: Any):
        account = self.account()
        if account is None:
            return self.refuse(401, None, "Invalid username or password.")
        self.answer_json({"type": "user", "name": account.name, "orgs": [], "auth": {"type": "access_token"}})

    # ---------------------------------------------------------------- pushing

    def create(self, body: bytes, **_: Any):
        account, asked = self.account(), json.loads(body)
        if account is None:
            return self.refuse(401, None, "Invalid username or password.")
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        if not self.may_write(name):
            return self.refuse(403, None, f"You don't have the rights to create {name}")
        kind = f"{asked.get('type') or 'model'}s"
        address = {"url": f"{self.hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}", "name": name, "id": name}
        if (kind, name) in self.hub.repositories:
            return self.answer(409, json.dumps({"error": "You already created this repo", **address}).encode())
        is_private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[kind, name] = Repository(private=bool(is_private))
        self.answer_json(address)

    def validate(self, **_: Any):
        self.answer_json({"errors": [], "warnings": []})

    def writable(self, kind: str, name: str) -> Repository | None:
        repository = self.found(kind, name, for_files=True)
        if repository is not None and not self.may_write(name):
            self.refuse(403, None, "You don't have the rights to write to this repository")
            return None
        return repository

    def add_branch(self, kind: str, name: str, revision: str, **_: Any):
        repository = self.writable(kind, name)
        if repository is None:
            return
        if revision in repository.branches:
            return self.refuse(409, None, "Reference already exists")
        repository.branches[revision] = Repository(dict(repository.files))
        self.answer(201)

    def announce_files(self, kind: str, name: str, revision: str, body: bytes, **_: Any):
        repository = self.writable(kind, name)
        if repository is not None:
            files = repository.at(revision).files
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer_json({"files": [_upload_mode(path, files.get(path)) for path in paths]})

    def announce_objects(self, name: str, body: bytes, kind: str | None = None, **_: Any):
        if self.writable((kind or "models/").rstrip("/"), name) is None:
            return
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}
        self.answer_json({"transfer": "basic", "objects": objects})

    def add_object(self, oid: str, body: bytes, **_: Any):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, None, "The content is not what was announced")
        self.hub.objects[oid] = body
        self.answer(200)

    def add_commit(self, kind: str, name: str, revision: str, body: bytes, **_: Any):
        repository = self.writable(kind, name)
        if repository is None:
            return
        repository = repository.at(revision)
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                repository.messages.append(value["summary"])
            elif key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del repository.files[value["path"]]
        commit = repository.commit
        self.answer_json({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _upload_mode(path: str, content: bytes | None) -> dict[str, Any]:
    """How a file is to come, large ones by LFS, with the digest of what is there already."""
    is_large = path.endswith(".safetensors")
    digest = None if content is None else hashlib.sha256(content).hexdigest() if is_large else _blob_id(content)
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": digest}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}


REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
ROUTES = (
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.send_file),
    (r"/api/whoami-v2", _Handler.send_account),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (REPOSITORY + r"/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", _Handler.send_tree),
    (REPOSITORY + r"/paths-info/(?P<revision>[^/]+)", _Handler.send_paths),
    (REPOSITORY + r"/auth-check(?P<write>/write)?", _Handler.send_authorization),
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.announce_objects),
    (r"/objects/(?P<oid>\w+)", _Handler.add_object),
    (REPOSITORY + r"/branch/(?P<revision>.+)", _Handler.add_branch),
    (REPOSITORY + r"/preupload/(?P<revision>[^/]+)", _Handler.announce_files),
    (REPOSITORY + r"/commit/(?P<revision>[^/]+)", _Handler.add_commit),
    (REPOSITORY + r"(/revision/(?P<revision>[^/]+))?", _Handler.send_info),
)
