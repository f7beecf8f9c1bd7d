"""A hub on this machine: as much of the Hugging Face hub's protocol as pushing and fetching small files takes, of
models and of data sets."""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub(BaseHTTPRequestHandler):
    """Serves ``server.files``, which commits fill: of each repository the files by name."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        where = f"http://{self.headers['Host']}"
        kind = self.path.split("/")[2 if "/repos/" in self.path or "yaml" in self.path else 5]
        if kind == "repos":
            asked = self.server.created = json.loads(body)
            self.say({"url": f"{where}/{asked['organization']}/{asked['name']}"})
        elif kind == "validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif kind == "paths-info":
            self.say(self.listed(parse_qs(body.decode())["paths"]))
        elif kind == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.say({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            repository = "/".join(self.path.split("/")[3:5])
            files = self.server.files.setdefault(repository, {})
            for value in (line["value"] for line in lines if line["key"] == "file"):
                files[value["path"]] = base64.b64decode(value["content"])
            self.say(
                {
                    "success": True,
                    "commitUrl": f"{where}/{repository}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "hookOutput": "",
                }
            )

    def do_GET(self):
        parts = unquote(self.path.split("?")[0]).strip("/").removeprefix("datasets/").split("/")
        if parts[0] == "api":
            files = self.server.files.get("/".join(parts[2:4]))
            if files is None:
                return self.refuse("RepoNotFound")
            if "tree" in parts:
                return self.say(self.listed(["/".join(parts[6:])], "recursive=false" in self.path.lower()))
            return self.say({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
        files = self.server.files.get("/".join(parts[:2]))
        if files is None or "/".join(parts[4:]) not in files:
            return self.refuse("RepoNotFound" if files is None else "EntryNotFound")
        return self.say(files["/".join(parts[4:])])

    do_HEAD = do_GET

    def listed(self, paths, at_once=False):
        """The files at some paths of the repository, and below them; or what is there at once."""
        files = self.server.files.get("/".join(self.path.split("/")[3:5]), {})
        found = [name for name in files if any(not path or f"{name}/".startswith(f"{path}/") for path in paths)]
        listed = {name: {"type": "file", "path": name, "size": len(files[name]), "oid": name} for name in found}
        if not at_once:
            return list(listed.values())
        depth = len(Path(paths[0]).parts) + 1
        tops = dict.fromkeys("/".join(Path(name).parts[:depth]) for name in found)
        return [listed.get(top, {"type": "directory", "path": top, "oid": top}) for top in tops]

    def say(self, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in (
            ("Content-Length", len(content)),
            ("X-Repo-Commit", COMMIT),
            ("ETag", f'"{sha1(content).hexdigest()}"'),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextmanager
def local_hub():
    """A running hub; its address is ``http://127.0.0.1:{server_port}``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), LocalHub)
    server.files = {}
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
