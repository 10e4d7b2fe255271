"""A Hub-compatible server on loopback: what `huggingface_hub` needs to create, fill, list and download models.

    with HubServer() as server:
        environment = server.client_environment(tmp_path)  # for a client in another process
        ...
        sha, files = server.commit("user/name")             # what was pushed

Repositories live in memory. A commit is an immutable `{path: File}` addressed by its sha; `main` names the last one.
Binary files travel through the LFS batch protocol, the others inline in the commit. Everything that writes asks for the
token. A request that no route knows is answered 404 and kept in `unexpected`, so that a test shows what a new client
release asks for.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The suffixes that matter here out of those in the `.gitattributes` of a new repository on the Hub.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass(frozen=True)
class File:
    """One file of a commit; its `etag` is the git blob sha of a regular file and the sha256 of an LFS file."""

    content: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.etag}
        if self.lfs:
            entry["lfs"] = {"oid": self.etag, "size": len(self.content), "pointerSize": 134}
        return entry


class HubError(Exception):
    """An answer other than 200; the client chooses its exception by the status and the headers."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "", **body):
        super().__init__(message)
        self.status, self.body = status, body | {"error": message}
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, pattern: str):
    """Register a handler, whose result is sent as it is if it is bytes and as JSON otherwise.

    In the pattern {repo} is `user/name`, {rev} and {oid} hold no slash, {path} may.
    """
    groups = {"repo": "[^/]+/[^/]+", "rev": "[^/]+", "oid": "[0-9a-f]{64}", "path": ".+"}
    regex = re.sub(r"\{(\w+)\}", lambda match: f"(?P<{match[1]}>{groups[match[1]]})", pattern)

    def register(handler):
        ROUTES.append((method, re.compile(regex), handler))
        return handler

    return register


class HubServer(ThreadingHTTPServer):
    """The server and all of its state; `with` starts it in a thread and stops it."""

    daemon_threads = True

    def __init__(self, token: str = "hf_loopback"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.token = token
        # Of each repository its commits, oldest first, by sha; of each commit its files, by path.
        self.repos: dict[str, dict[str, dict[str, File]]] = {}
        self.private: set[str] = set()
        # Of each repository the files that a pull request would give it.
        self.pull_requests: dict[str, list[dict[str, File]]] = {}
        self.lfs_granted: dict[str, int] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.unexpected: list[str] = []
        # snapshot_download asks from several threads; every handler runs alone.
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.shutdown()
        self.server_close()

    def client_environment(self, home: Path) -> dict[str, str]:
        """The environment in which a new process talks to this server alone, with its cache and token under `home`.

        `huggingface_hub` reads these variables once, at import, so they have to be set before the process starts.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            # uploads through LFS; Xet would need a content-addressed store behind it
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def commit(self, repo: str, revision: str = "main") -> tuple[str, dict[str, File]]:
        """Resolve `main` or a sha to (sha, files)."""
        if repo not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        commits = self.repos[repo]
        sha = next(reversed(commits)) if revision == "main" else revision
        if sha not in commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, commits[sha]

    def add_commit(self, repo: str, files: dict[str, File]) -> str:
        commits = self.repos.setdefault(repo, {})
        # The position is part of the hash: a commit that restores an earlier state is still a commit of its own.
        listing = [repo, len(commits), sorted((path, file.etag) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        commits[sha] = files
        return sha

    @route("GET", "/api/whoami-v2")
    def whoami(self, request):
        request.require_token()
        return {"type": "user", "name": "user", "orgs": []}

    @route("POST", "/api/repos/create")
    def create_repo(self, request):
        request.require_token()
        asked = request.json()
        name = f"{asked['organization'] or 'user'}/{asked['name']}"
        if name in self.repos:
            raise HubError(409, "You already created this model repo", url=f"{self.url}/{name}")
        self.add_commit(name, {})
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(name)
        return {"url": f"{self.url}/{name}", "name": name}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self, request, repo, rev):
        request.require_token()
        _, present = self.commit(repo, rev)
        answers = []
        for file in request.json()["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            # The oid lets the client leave out a file that has not changed.
            oid = present[path].etag if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def lfs_batch(self, request, repo):
        request.require_token()
        self.commit(repo)
        objects = []
        for item in request.json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.lfs_objects:
                self.lfs_granted[item["oid"]] = item["size"]
                href = f"{self.url}/lfs/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{oid}")
    def lfs_upload(self, request, oid):
        # As with a presigned URL the grant stands in for the token, which the client does not send here.
        if self.lfs_granted.get(oid) != len(request.body) or hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"Content is not the object that was announced as {oid}")
        self.lfs_objects[oid] = request.body
        return {}

    @route("POST", "/lfs/{oid}/verify")
    def lfs_verify(self, request, oid):
        request.require_token()
        if len(self.lfs_objects.get(oid, b"")) != request.json()["size"]:
            raise HubError(404, f"LFS object {oid} was not uploaded")
        return {}

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def create_commit(self, request, repo, rev):
        request.require_token()
        if rev != "main":
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        sha, files = self.commit(repo)
        files = dict(files)
        for line in map(json.loads, request.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                if value.get("parentCommit", sha) != sha:
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                if value["oid"] not in self.lfs_objects:
                    raise HubError(400, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                files[value["path"]] = File(self.lfs_objects[value["oid"]], lfs=True)
            else:
                raise HubError(400, f"Operation {key!r} is not supported")
        if "create_pr=1" in request.path:
            self.pull_requests.setdefault(repo, []).append(files)
            number = len(self.pull_requests[repo])
            answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}
            return answer | {"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"}
        sha = self.add_commit(repo, files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"}

    @route("GET", "/api/models/{repo}")
    def model_info(self, request, repo):
        return self.model_info_at(request, repo, "main")

    @route("GET", "/api/models/{repo}/revision/{rev}")
    def model_info_at(self, request, repo, rev):
        sha, files = self.commit(repo, rev)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "id": repo,
            "modelId": repo,
            "sha": sha,
            "private": repo in self.private,
            "tags": [],
            "siblings": siblings,
        }

    @route("GET", "/api/models/{repo}/tree/{rev}")
    @route("GET", "/api/models/{repo}/tree/{rev}/{path}")
    def tree(self, request, repo, rev, path=""):
        """The files below `path`, always recursively: what else a client asks for is not used by loading a model."""
        sha, files = self.commit(repo, rev)
        below = sorted(name for name in files if name.startswith(f"{path}/" if path else ""))
        if path and not below:
            raise HubError(404, f"{path} does not exist on {rev!r}", "EntryNotFound", sha)
        return [files[name].describe(name) for name in below]

    @route("GET", "/{repo}/resolve/{rev}/{path}")
    def resolve(self, request, repo, rev, path):
        sha, files = self.commit(repo, rev)
        if path not in files:
            raise HubError(404, "Entry not found", "EntryNotFound", sha)
        request.reply_headers = {"ETag": f'"{files[path].etag}"', "X-Repo-Commit": sha}
        return files[path].content


class Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its route, writes the reply."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format, *args) -> None:
        """Write no log: the output belongs to the tests."""

    def json(self):
        return json.loads(self.body)

    def require_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            raise HubError(401, "Invalid credentials in Authorization header")

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.reply_headers: dict[str, str] = {}
        method = "GET" if self.command == "HEAD" else self.command
        with self.server.lock:
            try:
                body, status = self.dispatch(method, path), 200
            except HubError as error:
                body, status, self.reply_headers = error.body, error.status, error.headers
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in self.reply_headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def dispatch(self, method: str, path: str) -> dict | list | bytes:
        for route_method, regex, handler in ROUTES:
            match = regex.fullmatch(path)
            if route_method == method and match:
                return handler(self.server, self, **match.groupdict())
        self.server.unexpected.append(f"{self.command} {self.path}")
        raise HubError(404, f"No such endpoint: {self.command} {path}")
