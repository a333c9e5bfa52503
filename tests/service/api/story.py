"""Tells the documentation's story to a running service. As a program, with a fresh one, it writes the answers down.

Usage: python -m tests.service.api.story
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

import service.api
from service.api.examples import ABRIDGED, STORY, Exchange
from tests.server import running

ANSWERS = Path(service.api.__file__).with_name("answers.json")
_PATIENCE_S = 60


class Storyteller:
    """Sends the requests in order. Ids that the service makes up are exchanged for those that the documentation shows.

    Attributes:
        document: the service's OpenAPI document.
        made: the service's ids, by those of the documentation.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.document: dict[str, Any] = client.get("/openapi.json").json()
        self.made: dict[str, str] = {}
        self._operations = {
            operation["operationId"]: (method, path, operation)
            for path, item in self.document["paths"].items()
            for method, operation in item.items()
        }

    @property
    def operations(self) -> set[str]:
        return set(self._operations)

    def description(self, operation: str) -> str:
        """With the service's own ids, as a reader would fill them in."""
        text: str = self._operations[operation][2]["description"]
        return self._told(text)

    def tell(self, exchange: Exchange) -> Any:
        """Send a request and return its answer, as the documentation would show it."""
        method, path, operation = self._operations[exchange.operation]
        query: dict[str, str] = {}
        headers: dict[str, str] = {}
        for parameter in operation.get("parameters", ()):
            if parameter["name"] in exchange.values:
                value = str(exchange.values[parameter["name"]])
                if parameter["in"] == "path":
                    path = path.replace(f"{{{parameter['name']}}}", self._told(value))
                else:
                    (query if parameter["in"] == "query" else headers)[parameter["name"]] = value
        content = exchange.body
        if content is not None and not isinstance(content, bytes):
            content, headers["Content-Type"] = self._told(json.dumps(content)), "application/json"
        answer = self._client.request(method, path, params=query, headers=headers, content=content)
        assert answer.status_code == exchange.status, (exchange.operation, answer.status_code, answer.text)
        if exchange.makes:
            document = answer.json()
            self.made[exchange.makes] = document["id"] if "id" in document else document["checkpoint"]["id"]
        if exchange.operation == "fold_checkpoint" and exchange.status == 202:
            self._wait_for_job(answer.headers["Location"])
        return self._shown(exchange.operation, answer)

    def _wait_for_job(self, location: str) -> None:
        for _ in range(_PATIENCE_S * 20):
            if self._client.get(location).json()["ended_at"]:
                return
            time.sleep(0.05)
        raise AssertionError(f"{location} has not ended")

    def _told(self, text: str) -> str:
        for shown, made in self.made.items():
            text = text.replace(shown, made)
        return text

    def _shown(self, operation: str, answer: httpx.Response) -> Any:
        kind = answer.headers.get("Content-Type", "").partition(";")[0]
        if kind not in ("application/json", "text/plain"):
            return answer.content
        text = answer.text.replace(str(self._client.base_url).rstrip("/"), "http://127.0.0.1:8000")
        for shown, made in self.made.items():
            text = text.replace(made, shown)
        if kind == "text/plain":
            return "".join(line for line in text.splitlines(keepends=True) if ABRIDGED[operation] in line)
        return _abridged(operation, json.loads(text)) if text else None


def _abridged(operation: str, answer: Any) -> Any:
    if operation not in ABRIDGED:
        return answer
    if isinstance(answer, dict):
        return {key: _abridged(operation, value) for key, value in answer.items()}
    return [entry for entry in answer if entry["name"] == ABRIDGED[operation]]


def record() -> None:
    found: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "data") as server,
        httpx.Client(base_url=server.url, timeout=_PATIENCE_S) as client,
    ):
        teller = Storyteller(client)
        for exchange in STORY:
            answer = teller.tell(exchange)
            if exchange.status != 204 and not (isinstance(answer, bytes) and answer):
                found.setdefault(exchange.operation, {}).setdefault(str(exchange.status), answer or None)
    lines = [f'"{operation}": {json.dumps(answers)}' for operation, answers in found.items()]
    ANSWERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    record()
