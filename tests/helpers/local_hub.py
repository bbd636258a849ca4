"""A hub on the loopback: what huggingface_hub needs to create a model repository, push to it and load from it.

Commits, LFS and downloads only, for model repositories of one `user` with the token `hf_fake`. Every revision is the
latest one. Left out: branches, pull requests, deletions, datasets, Xet, and most checks of the card's metadata.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Self
from urllib.parse import unquote, urlsplit

import yaml


USER, TOKEN = "user", "hf_fake"
LARGE = (".safetensors", ".bin", ".png")  # stored by LFS
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "gemma", "llama3", "llama3.2", "other")  # some of the hub's


class LocalHub:
    """`with LocalHub(folder) as hub:` serves at `hub.endpoint`. The files of a repository are in `folder/user/name`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.commits: dict[str, list[str]] = {}  # repository -> messages, oldest first
        self.lock = Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables for a process that uses this hub, with its cache under `home`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return inherited | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def path(self, repository: str, name: str = "") -> Path:
        return self.folder / repository / name

    def files(self, repository: str) -> set[str]:
        root = self.path(repository)
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def blob(self, oid: str) -> Path:
        return self.folder / ".lfs" / oid

    def sha(self, repository: str) -> str:
        return hashlib.sha1(f"{repository} {len(self.commits[repository])}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        anonymous = path == "/api/validate-yaml"
        if self.command == "POST" and not anonymous and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid token"})
        for method, pattern, handle in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                repository = match.groupdict().get("repository")
                if repository is not None and repository not in self.hub.commits:
                    return self._missing("RepoNotFound")
                with self.hub.lock:
                    return handle(self, body, **match.groupdict())
        self._missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _create(self, body: bytes):
        asked = json.loads(body)
        repository = f"{asked.get('organization') or USER}/{asked['name']}"
        self.hub.commits.setdefault(repository, [])
        self._send(200, {"url": f"{self.hub.endpoint}/{repository}", "id": repository, "name": repository})

    def _validate_yaml(self, body: bytes):
        found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        errors = _metadata_errors(yaml.safe_load(found[1]) if found else {})
        self._send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def _preupload(self, body: bytes, repository: str):
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular"} for name in names]
        self._send(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def _lfs_batch(self, body: bytes, repository: str):
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": f"these {len(body)} bytes are not {oid}"})
        self.hub.blob(oid).parent.mkdir(parents=True, exist_ok=True)
        self.hub.blob(oid).write_bytes(body)
        self._send(200, {})

    def _commit(self, body: bytes, repository: str):
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                continue
            if key not in ("file", "lfsFile"):
                return self._send(400, {"error": f"this hub does not know {key!r}"})
            content = base64.b64decode(value["content"]) if key == "file" else self.hub.blob(value["oid"]).read_bytes()
            target = self.hub.path(repository, value["path"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        self.hub.commits[repository].append(message)
        sha = self.hub.sha(repository)
        self._send(200, {"commitUrl": f"{self.hub.endpoint}/{repository}/commit/{sha}", "commitOid": sha})

    def _info(self, body: bytes, repository: str):
        siblings = [{"rfilename": name} for name in sorted(self.hub.files(repository))]
        self._send(200, {"id": repository, "sha": self.hub.sha(repository), "siblings": siblings, "tags": []})

    def _resolve(self, body: bytes, repository: str, name: str):
        path = self.hub.path(repository, name)
        if not path.is_file():
            return self._missing("EntryNotFound", repository)
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.sha(repository)})

    def _missing(self, code: str, repository: str | None = None):
        commit = {} if repository is None else {"X-Repo-Commit": self.hub.sha(repository)}
        self._send(404, {"error": code}, {"X-Error-Code": code, **commit})

    def _send(self, status: int, content: bytes | dict, headers: dict[str, str] | None = None):
        if isinstance(content, dict):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _metadata_errors(metadata: dict) -> list[str]:
    """The hub's errors for a model card's metadata, for the fields that these cards have."""
    names = [name for field in ("base_model", "datasets") for name in _listed(metadata.get(field))]
    errors = [f"{name!r} is no repository" for name in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))]
    if "license" in metadata and metadata["license"] not in LICENSES:
        errors.append(f"license {metadata['license']!r} must be one of {LICENSES}")
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        errors.append("license other needs a license_name")
    if not all(isinstance(tag, str) for tag in _listed(metadata.get("tags"))):
        errors.append("tags must be texts")
    return errors


def _listed(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


_MODEL = r"(?P<repository>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", rf"/api/models/{_MODEL}/preupload/[^/]+", _Handler._preupload),
    ("POST", rf"/{_MODEL}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler._lfs_put),
    ("POST", rf"/api/models/{_MODEL}/commit/[^/]+", _Handler._commit),
    ("GET", rf"/api/models/{_MODEL}(?:/revision/[^/]+)?", _Handler._info),
    ("HEAD", rf"/{_MODEL}/resolve/[^/]+/(?P<name>.+)", _Handler._resolve),
    ("GET", rf"/{_MODEL}/resolve/[^/]+/(?P<name>.+)", _Handler._resolve),
]
