"""A W&B server on loopback, as small as wandb 0.31 lets it be: it keeps the history of every run it is sent."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    """`history`: rows by run id, in the order they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._body()
        self._answer({})

    do_PUT = do_GET

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            for name, file in json.loads(body).get("files", {}).items():
                if "history" in name:
                    rows = self.server.history.setdefault(self.path.split("/")[-2], [])
                    del rows[file["offset"] :]
                    rows += [json.loads(line) for line in file["content"]]
            self._answer({})
        elif self.path.endswith("/graphql"):
            asked = json.loads(body)
            found = re.search(r"(query|mutation)\s+(\w+)", asked.get("query", ""))
            self._answer({"data": self._graphql(found[2] if found else "", asked.get("variables", {}))})
        else:
            self._answer({})

    def _graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        entity, name = {"id": "e", "name": "ent"}, given.get("name")
        project = {"id": "p", "name": "p", "entity": entity}
        if operation == "UpsertBucket":
            self.server.history.setdefault(str(name), [])
            bucket = {"id": f"b-{name}", "name": name, "displayName": name, "project": project, "historyLineCount": 0}
            nothing = {"description": None, "config": None, "sweepName": None}
            return {"upsertBucket": {"bucket": bucket | nothing, "inserted": True}}
        if operation == "RunResumeStatus":
            rows = self.server.history.get(str(name))
            bucket = None
            if rows is not None:
                bucket = {"id": f"b-{name}", "name": name, "displayName": name, "summaryMetrics": "{}", "config": "{}"}
                bucket |= {"logLineCount": 0, "historyLineCount": len(rows), "eventsLineCount": 0, "tags": []}
                tail = json.dumps([json.dumps(rows[-1])] if rows else [])
                bucket |= {"historyTail": tail, "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1})}
            return {"model": project | {"bucket": bucket}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.server.url}/up/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        viewer = {"id": "u", "entity": "ent", "username": "u", "flags": "{}", "teams": {"edges": []}}
        versions = {"cliVersionInfo": {"max_cli_version": "9.0.0"}, "latestLocalVersionInfo": None}
        return {"viewer": viewer, "serverInfo": versions}


@contextlib.contextmanager
def wandb_server() -> Iterator[Server]:
    """A running server."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
