"""Every operation has an example in every encoding that it takes; each is run, and the answer is the documented one."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from normcore.normalization import METHODS
from service.api.examples import CHECKPOINT, NORMALIZATIONS, STORY
from tests.server import running
from tests.service.api.story import Storyteller
from tests.sessions import run_in_shell

BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
JSON = "application/json"
# What the clock, the host or its libraries decide; a content hash takes the last bit of sums, which vectors decide.
FREE = {
    *("created_at", "ended_at", "last_inference", "ns", "threads"),
    *("devices", "gpus", "libraries", "content_hash"),
}
SENTENCES = {"sentence", "reason"}

# The same documents as another status of the operation, which has the example.
OTHER_OUTCOMES = {
    ("upload_checkpoint", "200"),
    ("fold_checkpoint", "200"),
    ("recalibrate_checkpoint", "202"),
    ("measure_drift", "202"),
}


@dataclass(frozen=True)
class Told:
    """What came of the story: answers by operation and status, and what the blocks of operations printed and wrote."""

    document: dict[str, Any]
    answers: dict[tuple[str, int], Any]
    printed: dict[str, list[bytes]]
    folder: Path
    plain: dict[str, list[float]]

    @property
    def operations(self) -> dict[str, dict[str, Any]]:
        paths = self.document["paths"].values()
        return {operation["operationId"]: operation for item in paths for operation in item.values()}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """The story up to where it deletes, then the blocks of all operations, then its end."""
    folder = tmp_path_factory.mktemp("examples")
    # What is shown are a service's own settings, so that nothing may have to be compiled within its deadline.
    compiled = running(folder / "data", {"NORMSERVE_WARM_UP": "true"}, patience_s=300)
    with compiled as server, httpx.Client(base_url=server.url, timeout=60) as client:
        teller = Storyteller(client)
        printed: dict[str, list[bytes]] = {}
        answers: dict[tuple[str, int], Any] = {}
        for exchange in STORY:
            if exchange.status == 204 and not printed:
                printed |= _run_blocks(teller, folder, server.address)
            answers.setdefault((exchange.operation, exchange.status), teller.tell(exchange))
        plain = {
            name: _output_of_input_alone(client, name)
            for name in METHODS
            if (folder / f"normalize_{name}" / "input.npy").exists()
        }
        yield Told(teller.document, answers, printed, folder, plain)


def _run_blocks(teller: Storyteller, folder: Path, address: str) -> dict[str, list[bytes]]:
    """Each operation's in a folder of its own, several at a time: most of it is waiting for Python to start."""
    _run(teller.document["info"]["description"], folder, address)
    network = (folder / "model.onnx").read_bytes()

    def run(operation: str) -> list[bytes]:
        own = folder / operation
        own.mkdir()
        (own / "model.onnx").write_bytes(network)
        return _run(teller.description(operation), own, address)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(sorted(teller.operations), pool.map(run, sorted(teller.operations)), strict=True))


def _run(text: str, folder: Path, address: str) -> list[bytes]:
    blocks = BLOCK.findall(text)
    return [run_in_shell(lines.replace("127.0.0.1:8000", address), folder, ID=CHECKPOINT) for lines in blocks]


def _output_of_input_alone(client: httpx.Client, name: str) -> list[float]:
    """A .npy file has no room for the other tensors."""
    others = {tensor.name for tensor in METHODS[name].tensors} - {"input"}
    body = {key: value for key, value in NORMALIZATIONS[name].items() if key not in {*others, "outputs"}}
    data: list[float] = client.post(f"/v1/normalizations/{name}", json=body).json()["outputs"]["output"]["data"]
    return data


def test_every_operation_is_run(told: Told) -> None:
    assert {operation for operation, _ in told.answers} == set(told.operations)


def test_every_body_has_an_example_in_every_encoding(told: Told) -> None:
    for name, operation in told.operations.items():
        for media, content in operation.get("requestBody", {}).get("content", {}).items():
            lines = "".join(BLOCK.findall(operation["description"]))
            if media == JSON:
                assert "example" in content, name
            elif media == "application/octet-stream":
                assert re.search(r"curl (?!.*Content-Type).*--data-binary", lines), name
            elif media == "multipart/form-data":
                assert " -F file=@" in lines, name
            else:
                assert f"Content-Type: {media}" in lines, (name, media)


def test_every_answer_is_the_documented_one(told: Told) -> None:
    compared = []
    for name, operation in told.operations.items():
        for status, response in operation["responses"].items():
            for media, content in response.get("content", {}).items():
                if media not in (JSON, "text/plain") or not status.startswith("2"):
                    continue
                if "example" not in content:
                    assert (name, status) in OTHER_OUTCOMES, (name, status)
                    continue
                assert_close(told.answers[name, int(status)], content["example"], name)
                compared.append((name, status))
    assert len(compared) >= 58


def test_answers_without_a_document_are_as_the_operation_says(told: Told) -> None:
    silent = [
        name
        for name, operation in told.operations.items()
        for code in ("200", "204")
        if code in operation["responses"] and not operation["responses"][code].get("content")
    ]
    assert silent
    for name in silent:
        (answer,) = (answer for (operation, _), answer in told.answers.items() if operation == name)
        assert not answer, name


@pytest.mark.parametrize("name", METHODS)
def test_a_method_answers_the_same_in_every_encoding(told: Told, name: str) -> None:
    shown = told.operations[f"normalize_{name}"]["responses"]["200"]["content"][JSON]["example"]["outputs"]
    folder = told.folder / f"normalize_{name}"
    with np.load(folder / "output.npz") as arrays:
        for found in (dict(arrays), load_file(folder / "output.safetensors")):
            assert set(shown) <= set(found)
            for output, tensor in shown.items():
                assert list(found[output].shape) == tensor["shape"]
                assert found[output].ravel().tolist() == pytest.approx(tensor["data"], rel=1e-5, abs=1e-6), output
    if name in told.plain:
        assert np.load(folder / "output.npy").ravel().tolist() == pytest.approx(told.plain[name], rel=1e-5, abs=1e-6)


def test_files_come_back(told: Told) -> None:
    assert told.answers["download_checkpoint", 200] == (told.folder / "model.onnx").read_bytes()
    assert (told.folder / "download_checkpoint" / "model.onnx").read_bytes() == told.answers["download_checkpoint", 200]
    assert (told.folder / "fold_file" / "folded.onnx").read_bytes() == told.answers["fold_file", 200]
    shown = told.operations["infer_version"]["responses"]["200"]["content"][JSON]["example"]["outputs"][0]["data"]
    content = (told.folder / "infer_version" / "output.bin").read_bytes()
    assert np.frombuffer(content[-4 * len(shown) :], "<f4").tolist() == pytest.approx(shown, rel=1e-5)


def test_tensors_in_files_are_answered_like_those_in_json(told: Told) -> None:
    npz, safetensors, npy = _documents(told.printed["measure_drift"])
    for found in (npz, safetensors):
        assert_close(found, told.answers["measure_drift", 200], "measure_drift")
    assert (npy["verdict"], npy["batches"]) == ("unknown", 1)  # of so few values
    reports = [found["report"] for found in _documents(told.printed["recalibrate_checkpoint"])]
    assert [report["batches"] for report in reports] == [2, 2, 1]
    assert_close(reports[0], told.answers["recalibrate_checkpoint", 201]["report"], "recalibrate_checkpoint")
    posted = _documents(told.printed["post_batch"])
    assert [found["counted"] for found in posted] == [True] * 4
    assert [right["count"] - left["count"] for left, right in pairwise(posted)] == [2, 3, 3]


def _documents(printed: list[bytes]) -> list[dict[str, Any]]:
    """JSON texts without anything between them."""
    text, found = b"".join(printed).decode(), []
    while text:
        document, end = json.JSONDecoder().raw_decode(text)
        found.append(document)
        text = text[end:]
    return found


def assert_close(found: Any, shown: Any, where: str) -> None:
    """The same document, numbers within single precision; in sentences too many a digit is rounding."""
    if isinstance(shown, dict):
        assert found.keys() == shown.keys(), where
        for key, value in shown.items():
            inside = f"{where}.{key}"
            if key in FREE:
                assert type(found[key]) is type(value), inside
            elif key in SENTENCES and isinstance(value, str):
                assert NUMBER.sub("#", found[key]) == NUMBER.sub("#", value), inside
            else:
                assert_close(found[key], value, inside)
    elif isinstance(shown, list):
        assert len(found) == len(shown), where
        for index, (left, right) in enumerate(zip(found, shown, strict=True)):
            assert_close(left, right, f"{where}[{index}]")
    else:
        assert type(found) is type(shown), where
        assert found == (pytest.approx(shown, rel=1e-5, abs=1e-6) if isinstance(shown, float) else shown), where
