"""Hugging Face Hub and ModelScope as their own clients see them over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from typing import Any
from urllib.parse import unquote

from tests.publish.fake_server import Handler

LARGE = (".onnx", ".data")
Files = dict[str, bytes]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub(Handler):
    """Repositories, their commits, and large files by SHA-256.

    Attributes:
        repositories: commits by repository, each a dictionary of files.
        stored: large files by SHA-256.
        token: the only one that may write.
        refuse: status for every write, when set.
        stalls: the upload of a large file is read to its end and then not answered until this is set.
    """

    token = "right-token"
    refuse: int | None = None
    repositories: dict[str, list[Files]]
    stored: dict[str, bytes]
    private: set[str]
    stalls: threading.Event | None = None
    puts: list[str]

    def allowed(self) -> bool:
        """Whether the request may write; answers when not."""
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.send_json({"error": f"bad token {self.headers.get('Authorization')}"}, 401)
            return False
        if self.refuse:
            self.send_json({"error": f"no: {self.headers.get('Authorization')}"}, self.refuse)
            return False
        return True

    def put_large(self, oid: str) -> None:
        """Store a large file under its digest, as object storage with a signed digest does."""
        data = self.body()
        self.puts.append(oid)
        if self.stalls:
            self.stalls.wait(30)
        if sha256(data) != oid:
            self.send(400)
            return
        self.stored[oid] = data
        self.send(200)

    def missing(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answer of a batch request of git-lfs."""
        found = []
        for item in objects:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.stored:
                entry["actions"] = {"upload": {"href": f"http://127.0.0.1:{self.port}/storage/{item['oid']}"}}
            found.append(entry)
        return found


class FakeHuggingFace(FakeHub):
    """https://huggingface.co/docs/hub/api, as far as publishing and pulling need it."""

    port: int

    def answer(self, path: str, query: dict[str, str]) -> None:
        if path.startswith("/storage/") and self.command == "PUT":
            self.put_large(path.rsplit("/", 1)[1])
        elif path.startswith("/cdn/"):
            self.send_ranged(self.stored[path.rsplit("/", 1)[1]])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        elif self.command == "POST":
            sent = self.body()
            if self.allowed():
                self._post(path, sent)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.send_json([self._entry(name, data) for name, data in sorted(self._files(match[1], match[2]).items())])
        else:
            self.send_json({"error": f"unknown: {path}"}, 404)

    def _post(self, path: str, sent: bytes) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(sent))
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/branch/[^/]+", path):
            self.send_json({})
        elif path == "/api/validate-yaml":
            self.send_json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.send_json({"transfer": "basic", "objects": self.missing(json.loads(sent)["objects"])})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            self.send_json({"files": [self._mode(match[1], file) for file in json.loads(sent)["files"]]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(match[1], [json.loads(line) for line in sent.splitlines()])
        else:
            self.send_json({"error": f"unknown: {path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repositories:
            self.send_json({"url": f"http://127.0.0.1:{self.port}/{name}", "error": "exists"}, 409)
            return
        self.repositories[name] = [{".gitattributes": b"*.onnx filter=lfs\n"}]
        if wanted.get("visibility") == "private" or wanted.get("private"):
            self.private.add(name)
        self.send_json({"url": f"http://127.0.0.1:{self.port}/{name}"})

    def _sha(self, repository: str) -> str:
        return f"{len(self.repositories[repository]):040x}"

    def _files(self, repository: str, revision: str) -> Files:
        commits = self.repositories[repository]
        return commits[int(revision, 16) - 1] if re.fullmatch("[0-9a-f]{40}", revision) else commits[-1]

    def _info(self, repository: str) -> None:
        if repository not in self.repositories:
            self.send_json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        else:
            self.send_json({"id": repository, "sha": self._sha(repository), "siblings": []})

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob(data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 100}
        return entry

    def _mode(self, repository: str, file: dict[str, Any]) -> dict[str, Any]:
        there = self.repositories[repository][-1].get(file["path"])
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        oid = (sha256(there) if mode == "lfs" else blob(there)) if there is not None else None
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.repositories[repository][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", self._sha(repository)) != self._sha(repository):
                self.send_json({"error": "A commit has happened since"}, 412)
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    self.send_json({"error": "lfs object is not there"}, 400)
                    return
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repositories[repository].append(files)
        self.send_json({"commitUrl": f"http://127.0.0.1/{repository}/commit/x", "commitOid": self._sha(repository)})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        data = self._files(repository, revision).get(unquote(name))
        if data is None:
            self.send_json({"error": "Entry not found"}, 404)
        elif name.endswith(LARGE) and sha256(data) in self.stored:
            # large files come from another host, as from the real hub
            self.send(302, Location=f"http://localhost:{self.port}/cdn/{sha256(data)}")
        else:
            self.send_ranged(data)


class FakeModelScope(FakeHub):
    """The requests that modelscope_hub makes."""

    port: int

    def answer(self, path: str, query: dict[str, str]) -> None:
        if path.startswith("/storage/") and self.command == "PUT":
            self.put_large(path.rsplit("/", 1)[1])
        elif self.command == "POST":
            sent = json.loads(self.body())
            if self.allowed():
                self._post(path, sent)
        elif match := re.fullmatch(r"/openapi/v1/models/([^/]+/[^/]+)", path):
            self._info(match[1], {"success": True, "data": {"id": match[1]}})
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)", path):
            self._info(match[1], {"Code": 200, "Data": {"Name": match[1].split("/")[1]}})
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self._list(match[1])
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self.send_ranged(self.repositories[match[1]][-1][query["FilePath"]])
        else:
            self.send_json({"Code": 404, "Message": f"unknown: {path}"}, 404)

    def _info(self, repository: str, answer: dict[str, Any]) -> None:
        if repository in self.repositories:
            self.send_json(answer)
        else:
            self.send_json({"Code": 404, "success": False, "Message": "not found"}, 404)

    def _list(self, repository: str) -> None:
        if repository not in self.repositories:
            self.send_json({"Code": 404, "Message": "not found"}, 404)
            return
        entries = [
            {"Type": "blob", "Path": name, "Name": name, "Size": len(data), "Sha256": sha256(data)}
            for name, data in sorted(self.repositories[repository][-1].items())
        ]
        self.send_json({"Code": 200, "Success": True, "Data": {"Files": entries}})

    def _post(self, path: str, sent: dict[str, Any]) -> None:
        if path == "/api/v1/models":
            name = f"{sent['Path']}/{sent['Name']}"
            self.repositories[name] = [{".gitattributes": b"x", "README.md": b"# hello\n", "configuration.json": b"{}"}]
            if sent["Visibility"] == 1:
                self.private.add(name)
            self.send_json({"Code": 200, "Success": True, "Data": {"Name": sent["Name"], "Path": sent["Path"]}})
        elif re.fullmatch(r"/api/v1/repos/models/[^/]+/[^/]+/info/lfs/objects/batch", path):
            self.send_json({"Code": 200, "Data": {"objects": self.missing(sent["objects"])}})
        elif match := re.fullmatch(r"/api/v1/repos/models/([^/]+/[^/]+)/commit/[^/]+", path):
            self._commit(match[1], sent["actions"])
        else:
            self.send_json({"Code": 404, "Message": f"unknown: {path}"}, 404)

    def _commit(self, repository: str, actions: list[dict[str, Any]]) -> None:
        files = dict(self.repositories[repository][-1])
        for action in actions:
            if action["action"] == "delete":
                del files[action["path"]]
            elif action["type"] == "lfs":
                files[action["path"]] = self.stored[action["sha256"]]
            else:
                files[action["path"]] = base64.b64decode(action["content"])
        self.repositories[repository].append(files)
        self.send_json({"Code": 200, "Success": True, "Data": {}})
