"""A Hub on loopback: enough of its HTTP interface for transformers to load from and huggingface_hub to push to.

Repositories are in memory, each with commits, branches and tags. Every request is written down, so that a test can say
which files were fetched, and a file can be cut off while it is downloaded. Clients find it through `HF_ENDPOINT`:

    with HubServer() as hub:
        commit = hub.add("owner/name", folder)
        run_fresh(script, tmp_path, **hub.environment)

As on the Hub: `resolve` with ETag, size and commit in its headers and with ranges; model info, tree, refs; creating
repositories, preupload, LFS batch and PUT, commits as ndjson, tags. Xet is not spoken. Writing needs a token, and so
does reading what is private; whoever has one may do everything.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".mp4")


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files, branch="main"):
        number = len(self.commits)
        commit = hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def find(self, revision):
        """The commit that a branch, a tag or a commit names, None when there is none."""
        commit = self.branches.get(revision) or self.tags.get(revision) or revision
        return commit if commit in self.commits else None


class HubServer:
    """
    Attributes:
        requests (`list[tuple[str, str]]`): Method and path of every request, in order.
        cut_off (`dict[str, int]`): By file name, the number of bytes after which a download of it breaks off.
        refuse_uploads (`bool`): Whether the content of large files is refused (with a status no client retries).
    """

    token = "hf_test"

    def __init__(self):
        self.repositories, self.blobs = {}, {}
        self.requests, self.cut_off, self.refuse_uploads = [], {}, False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        self.environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *arguments):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, folder):
        """Commits the files of a folder to the main branch of a public repository; returns the commit."""
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files)

    def files(self, name, suffix=""):
        """Names of the files of a repository's main branch."""
        repository = self.repositories[name]
        return sorted(path for path in repository.commits[repository.branches["main"]] if path.endswith(suffix))

    def fetched(self, name):
        """Names of the files of a repository whose content was asked for, since `requests` was last cleared."""
        pattern = re.compile(rf"/{name}/resolve/[^/]+/(.+)")
        matches = [pattern.fullmatch(path) for method, path in self.requests if method == "GET"]
        return {match[1] for match in matches if match}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self):
        self.hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.body = self._read_body()
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                if method in ("POST", "PUT") and not self._has_token():
                    return self._send_error(401, "Unauthorized")
                return answer(self, *match.groups())
        self._send_error(404, "RepoNotFound")

    def _read_body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _has_token(self):
        # Uploaded content goes to a signed address, without a token, as on the Hub.
        return self.headers.get("Authorization") == f"Bearer {HubServer.token}" or self.command == "PUT"

    def _send(self, content, status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_error(self, status, code, **headers):
        self._send({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def _find(self, name, revision="main"):
        """Repository and commit; None after an error was sent."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._has_token()):
            return self._send_error(404, "RepoNotFound")
        commit = repository.find(revision)
        if commit is None:
            return self._send_error(404, "RevisionNotFound")
        return repository, commit

    # Reading

    def resolve(self, name, revision, path):
        if (found := self._find(name, revision)) is None:
            return
        repository, commit = found
        content = repository.commits[commit].get(path)
        if content is None:
            return self._send_error(404, "EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "Accept_Ranges": "bytes", "ETag": f'"{git_hash(content)}"'}
        if path.endswith(LFS_SUFFIXES):
            headers["X_Linked_ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X_Linked_Size"] = str(len(content))
        status, total = 200, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or total - 1)
            status, content = 206, content[start : end + 1]
            headers["Content_Range"] = f"bytes {start}-{end}/{total}"
        if path in self.hub.cut_off and self.command == "GET":
            headers["Content-Length"] = str(len(content))
            self.close_connection = True
            content = content[: self.hub.cut_off[path]]
        self._send(content, status, **headers)

    def info(self, name, revision="main"):
        if (found := self._find(name, revision)) is not None:
            repository, commit = found
            files = [{"rfilename": path} for path in repository.commits[commit]]
            self._send({"id": name, "sha": commit, "private": repository.private, "siblings": files, "tags": []})

    def tree(self, name, revision, folder=""):
        if (found := self._find(name, revision)) is None:
            return
        repository, commit = found
        entries = []
        for path, content in repository.commits[commit].items():
            if path.startswith(folder):
                entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                if path.endswith(LFS_SUFFIXES):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                entries.append(entry)
        if not entries and folder:
            return self._send_error(404, "EntryNotFound")
        self._send(entries)

    def refs(self, name):
        if (found := self._find(name)) is not None:
            names = {"branches": ("heads", found[0].branches), "tags": ("tags", found[0].tags)}
            answer = {
                kind: [{"name": n, "ref": f"refs/{prefix}/{n}", "targetCommit": c} for n, c in refs.items()]
                for kind, (prefix, refs) in names.items()
            }
            self._send({**answer, "converts": []})

    # Writing

    def create(self):
        options = json.loads(self.body)
        name = f"{options['organization']}/{options['name']}"
        status = 409 if name in self.hub.repositories else 200
        if status == 200:
            self.hub.repositories[name] = Repository(private=options.get("visibility") == "private")
            self.hub.repositories[name].commit({".gitattributes": b""})
        self._send({"url": f"{self.hub.url}/{name}"}, status)

    def validate_card(self):
        is_card = json.loads(self.body)["content"].startswith("---\n")
        self._send({} if is_card else {"errors": [{"message": "no metadata"}]}, 200 if is_card else 400)

    def preupload(self, name, revision):
        if (found := self._find(name, revision)) is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            is_large = file["path"].endswith(LFS_SUFFIXES)
            content = found[0].commits[found[1]].get(file["path"])
            oid = None
            if content is not None:
                oid = hashlib.sha256(content).hexdigest() if is_large else git_hash(content)
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": files})

    def lfs_batch(self, name):
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item)
        self._send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        if self.hub.refuse_uploads or hashlib.sha256(self.body).hexdigest() != oid:
            return self._send_error(400, "BadRequest")
        self.hub.blobs[oid] = self.body
        self._send({})

    def commit(self, name, branch):
        if (found := self._find(name, branch)) is None:
            return
        repository, parent = found
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        self._send({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def tag(self, name, revision):
        if (found := self._find(name, revision)) is None:
            return
        tag = json.loads(self.body)["tag"]
        if tag in found[0].tags:
            return self._send_error(409, "Conflict")
        found[0].tags[tag] = found[1]
        self._send({})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("HEAD", "GET"), rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (("GET",), rf"/api/models/{NAME}", _Handler.info),
    (("GET",), rf"/api/models/{NAME}/revision/([^/]+)", _Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    (("GET",), rf"/api/models/{NAME}/refs", _Handler.refs),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_card),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", _Handler.lfs_upload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{NAME}/tag/([^/]+)", _Handler.tag),
]
