"""Every request that a model's own page shows is run by a shell."""

import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from onnx import TensorProto, helper

from normcore.normalization import METHODS
from tests.server import Server
from tests.service.engine import graphs
from tests.sessions import run_in_shell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ocr_cls: Path) -> Path:
    """Where the shell stands, with a checkpoint to upload."""
    made = tmp_path_factory.mktemp("shell")
    (made / "model.onnx").write_bytes(ocr_cls.read_bytes())
    return made


def _serve(server: Server, name: str, content: bytes) -> dict[str, Any]:
    """What the model's page says of its version."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        checkpoint = client.post("/v1/checkpoints", content=content).json()["id"]
        answer = client.post("/v1/models", json={"name": name, "checkpoint": checkpoint})
        assert answer.status_code == 201, answer.text
        (found,) = client.get(f"/v1/models/{name}").json()["models"]
        document: dict[str, Any] = found
        return document


@pytest.mark.parametrize("name", METHODS)
def test_a_method_shows_requests_that_work(server: Server, folder: Path, name: str) -> None:
    (page,) = httpx.get(f"{server.url}/v1/models/normcore.{name}").json()["models"]
    outputs = orjson.loads(run_in_shell(page["requests"]["json"], folder))["outputs"]
    run_in_shell(page["requests"]["binary"], folder)
    content = (folder / "output.bin").read_bytes()
    for output in outputs:
        if output["datatype"] == "FP32":
            assert np.array(output["data"], np.float32).tobytes() in content, output["name"]


def test_a_network_with_free_axes_shows_requests_that_work(server: Server, folder: Path) -> None:
    page = _serve(server, "cls", (folder / "model.onnx").read_bytes())
    assert [tensor["shape"] for tensor in page["inputs"]] == [[-1, 3, -1, -1]]
    (output,) = orjson.loads(run_in_shell(page["requests"]["json"], folder))["outputs"]
    run_in_shell(page["requests"]["binary"], folder)
    assert (folder / "output.bin").read_bytes().endswith(np.array(output["data"], np.float32).tobytes())


def _mixed() -> bytes:
    """Every kind of zero: strings, booleans, integers, and a name that a shell would read."""
    names = ["text", "flag", "it's $(HOME) `x`"]
    kinds = [TensorProto.STRING, TensorProto.BOOL, TensorProto.INT64]
    nodes = [helper.make_node("Identity", [name], [f"{name} out"]) for name in names]
    inputs = [graphs.value(name, [40 if name == "flag" else 2], kind) for name, kind in zip(names, kinds, strict=True)]
    outputs = [graphs.value(f"{one.name} out", [2], one.type.tensor_type.elem_type) for one in inputs]
    outputs[1] = graphs.value("flag out", [40], TensorProto.BOOL)
    content: bytes = graphs.model("mixed", nodes, inputs, outputs).SerializeToString()
    return content


def test_every_datatype_and_name_gives_requests_that_work(server: Server, folder: Path) -> None:
    page = _serve(server, "mixed one", _mixed())
    outputs = orjson.loads(run_in_shell(page["requests"]["json"], folder))["outputs"]
    assert [output["data"] for output in outputs] == [["", ""], [False] * 40, [0, 0]]
    run_in_shell(page["requests"]["binary"], folder)
    assert (folder / "output.bin").read_bytes().endswith(bytes(2 * 4 + 40 + 2 * 8))


def test_a_host_header_cannot_smuggle_commands_into_the_requests(server: Server, folder: Path) -> None:
    headers = {"Host": "x$(touch$IFS'smuggled')"}
    (page,) = httpx.get(f"{server.url}/v1/models/normcore.lp_norm", headers=headers).json()["models"]
    for line in page["requests"].values():
        subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, timeout=60, check=False)
    assert not (folder / "smuggled").exists()


def test_a_model_that_is_not_ready_shows_no_requests(server: Server) -> None:
    _serve(server, "gone", graphs.doubling().SerializeToString())
    httpx.post(f"{server.url}/v2/repository/models/gone/unload")
    (page,) = httpx.get(f"{server.url}/v1/models/gone").json()["models"]
    assert (page["state"], page["requests"]) == ("UNAVAILABLE", {})
