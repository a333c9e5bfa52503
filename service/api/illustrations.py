"""What a reader copies, added to the operations of the OpenAPI document: bodies, answers, and lines for a shell."""

from collections.abc import Mapping
from typing import Any

from service.api import curl
from service.api.examples import ABRIDGED, NETWORK, NORMALIZATIONS, STORY, Exchange, answers

_JSON = "application/json"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
# Their answers are files or text, which the framework knows nothing of.
_CONTENTS: Mapping[str, dict[str, Any]] = {
    "download_checkpoint": _BINARY,
    "fold_file": _BINARY,
    "read_metrics": {"text/plain": {"schema": {"type": "string"}}},
}
DESCRIPTION = f"""Examples are one story, which the service's tests run from the first to the last: compute, collect
statistics, fold, serve. Its checkpoint is a network of one convolution and one batch norm:{
    curl.block(f"printf %s {NETWORK} | base64 -d > model.onnx")
}

A field or parameter that may be null says what null means. In the query string of a normalization it is the text null;
elsewhere the parameter is left out. In an answer null stands for what there is not, or what cannot be told."""


class Illustrations:
    """The story by operation, with the answers that were recorded."""

    def __init__(self) -> None:
        self._answers = answers()
        self._exchanges: dict[str, list[Exchange]] = {}
        for exchange in STORY:
            self._exchanges.setdefault(exchange.operation, []).append(exchange)
        self._lines = _lines()

    def add(self, operation: dict[str, Any]) -> None:
        """Give an operation its examples."""
        name = operation["operationId"]
        if name in _CONTENTS:
            operation["responses"]["200"]["content"] = _CONTENTS[name]
        for exchange in self._exchanges.get(name, ())[:1]:
            _add_request(operation, exchange)
        for status, answer in self._answers.get(name, {}).items():
            _add_answer(operation["responses"][status], answer, is_abridged=name in ABRIDGED)
        if name in self._lines:
            operation["description"] += curl.block(self._lines[name])


def _add_request(operation: dict[str, Any], exchange: Exchange) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in exchange.values:
            parameter["example"] = exchange.values[parameter["name"]]
    if isinstance(exchange.body, dict):
        operation["requestBody"]["content"][_JSON]["example"] = exchange.body


def _add_answer(response: dict[str, Any], answer: Any, *, is_abridged: bool) -> None:
    if answer is None:
        response.pop("content", None)
        return
    (content,) = (value for media, value in response["content"].items() if media in (_JSON, "text/plain"))
    content["example"] = answer
    if is_abridged:
        response["description"] = f"{response['description'].rstrip('.')}; the example shows a part."


def _lines() -> dict[str, str]:
    """For the encodings that are not JSON, by operation."""
    found = {f"normalize_{name}": curl.method_file_lines(name) for name in NORMALIZATIONS}
    url = f"{curl.LOCAL}/v2/models/normcore.layer_norm/infer"
    found["infer"] = curl.method_infer_lines("layer_norm", url)["binary"]
    found["upload_checkpoint"] = f"curl -s {curl.LOCAL}/v1/checkpoints -F file=@model.onnx"
    found["fold_file"] = f"curl -s {curl.LOCAL}/v1/fold -F file=@model.onnx -o folded.onnx"
    found["read_metrics"] = f"curl -s {curl.LOCAL}/metrics | grep ^normserve_"
    return found | curl.story_lines()
