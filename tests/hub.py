"""As much of the Hugging Face hub as sending a model and fetching it again needs, in memory; prints its address and serves until killed."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    """Of the one repository that there is."""

    def reply(self, data: Any, status: int = 200, **headers: str) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body, address = self.rfile.read(int(self.headers["Content-Length"])), f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.reply({"url": f"{address}/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            sent = [row["value"] for row in map(json.loads, body.splitlines()) if row["key"] == "file"]
            self.files.update({file["path"]: base64.b64decode(file["content"]) for file in sent})
            self.reply({"commitUrl": f"{address}/you/captioner/commit/{COMMIT}", "commitOid": COMMIT, "success": True, "hookOutput": ""})
        else:
            self.reply({}, 404)

    def do_GET(self) -> None:
        sums = {path: hashlib.sha1(data).hexdigest() for path, data in self.files.items()}
        path = self.path.partition("/resolve/")[2].partition("/")[2]
        if path in self.files:
            self.reply(self.files[path], ETag=f'"{sums[path]}"', X_Repo_Commit=COMMIT)
        elif "/tree/" in self.path:
            self.reply([{"type": "file", "path": p, "size": len(self.files[p]), "oid": oid} for p, oid in sums.items()])
        elif "/revision/" in self.path:
            self.reply({"id": "you/captioner", "sha": COMMIT, "siblings": [{"rfilename": path} for path in self.files]})
        else:
            self.reply({}, 404)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None: ...


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
