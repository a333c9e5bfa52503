"""A service of its own folds a network, serves the fold and infers, over HTTP on a free port."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from service.selftest.check import Check

_BOUND = 1e-5
_DEADLINE_S = 120
_KEPT = ("NORMSERVE_DEVICE", "NORMSERVE_THREADS", "NORMSERVE_SANDBOX_MEMORY_BYTES")


def check_serving(devices: Sequence[str]) -> Iterator[Check]:
    """A row for the start, the fold, and an inference on every device that onnxruntime can use."""
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    urls: list[str] = []
    with tempfile.TemporaryDirectory(prefix="normserve-selftest-") as folder, _service(folder) as process:
        yield Check.run("service starts", "cpu", _BOUND, partial(_start, process, urls))
        if not urls:
            return
        network = _Network()
        yield Check.run("fold of Conv and batch norm", "cpu", _BOUND, partial(network.fold, urls[0]))
        for device in devices:
            if device == "cpu" or has_cuda:
                yield Check.run("infer of the fold over HTTP", device, _BOUND, partial(network.infer, urls[0], device))


class _Network:
    """y = relu(batch_norm(conv(x))), as ONNX and in float64."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.input = generator.standard_normal((4, 3, 8, 8), np.float32)
        self._weight = generator.standard_normal((6, 3, 3, 3), np.float32)
        self._affine = [generator.standard_normal(6, np.float32) for _ in range(3)]
        self._var = generator.random(6, np.float32) + np.float32(0.5)
        self._checkpoint = ""

    def fold(self, url: str) -> float:
        """Upload and fold; the certificate's verdict decides. Returns the residual at the folded operator."""
        uploaded = _call(f"{url}/v1/checkpoints?filename=selftest.onnx", self._model().SerializeToString())
        self._checkpoint = uploaded["id"]
        report = _call(f"{url}/v1/checkpoints/{self._checkpoint}/fold", b"{}")["report"]
        verdict = report["certificate"]["verdict"] if report["certificate"] else "nothing folded"
        if (report["folded"], verdict) != (1, "equivalent"):
            raise RuntimeError(f"expected 1 fold with the verdict equivalent, found {report['folded']}, {verdict}")
        return float(report["entries"][0]["residual"])

    def infer(self, url: str, device: str) -> float:
        """Serve the fold on a device and infer in JSON. Returns the relative error of the output."""
        name = f"selftest-{device.replace(':', '-')}"
        document = {"name": name, "checkpoint": self._checkpoint, "device": device}
        _call(f"{url}/v1/models", json.dumps(document).encode())
        tensor = {"name": "x", "datatype": "FP32", "shape": self.input.shape, "data": self.input.ravel().tolist()}
        answer = _call(f"{url}/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}).encode())
        (output,) = answer["outputs"]
        expected = self._expected()
        found = torch.tensor(output["data"], dtype=torch.float64).reshape(expected.shape)
        return float((found - expected).abs().max() / expected.abs().max())

    def _model(self) -> ModelProto:
        names = ("scale", "shift", "mean", "var")
        constants = {"weight": self._weight} | dict(zip(names, [*self._affine, self._var], strict=True))
        nodes = [
            helper.make_node("Conv", ["x", "weight"], ["convolved"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["convolved", *names], ["normalized"], epsilon=1e-5),
            helper.make_node("Relu", ["normalized"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "selftest",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 8, 8])],
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    def _expected(self) -> torch.Tensor:
        scale, shift, mean, var = (
            torch.from_numpy(array).double().reshape(-1, 1, 1) for array in [*self._affine, self._var]
        )
        weight = torch.from_numpy(self._weight).double()
        convolved = torch.nn.functional.conv2d(torch.from_numpy(self.input).double(), weight, padding=1)
        return ((convolved - mean) / (var + 1e-5).sqrt() * scale + shift).relu()


@contextmanager
def _service(folder: str) -> Iterator["subprocess.Popen[str]"]:
    """The service as a process that touches nothing of another one: no data, database, port or collector."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("NORMSERVE_") or name in _KEPT}
    settings = {
        "NORMSERVE_HOST": "127.0.0.1",
        "NORMSERVE_PORT": "0",
        "NORMSERVE_DATA_DIR": folder,
        "NORMSERVE_DRAIN_S": "0",
        "NORMSERVE_LOG_LEVEL": "error",
    }
    command = [sys.executable, "-m", "service"]
    with subprocess.Popen(command, env=inherited | settings, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _start(process: "subprocess.Popen[str]", urls: list[str]) -> float:
    assert process.stdout is not None
    found = re.search(r"listens on (\S+),", process.stdout.readline())
    if found is None:
        raise RuntimeError("the service ended instead of listening")
    until = time.monotonic() + _DEADLINE_S
    while not _is_ready(found[1]):
        if time.monotonic() > until:
            raise RuntimeError(f"the service was not ready after {_DEADLINE_S} s")
        time.sleep(0.05)
    urls.append(found[1])
    return 0.0


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=_DEADLINE_S):
            return True
    except urllib.error.HTTPError:
        return False


def _call(url: str, body: bytes) -> Mapping[str, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=_DEADLINE_S) as answer:
            content: Mapping[str, Any] = json.load(answer)
            return content
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error.code}: {error.read().decode()[:300]}") from None
