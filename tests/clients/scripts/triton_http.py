"""Every public method of tritonclient.http, sync, against a running server: `triton_http.py ADDRESS MODEL_FILE`.

Runs in an environment of its own with the client of any release: it imports nothing of this project.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

NAME = "client model"


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The server's sentence: a clean error that the client could read."""
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        return str(error.message())
    raise AssertionError(f"{call.__name__} was not refused")


def manage(client: Any, model: bytes) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "normserve"
    assert {"binary_tensor_data", "model_repository", "statistics"} <= set(metadata["extensions"])
    client.load_model(NAME, config='{"max_batch_size": 8}', files={"file:1/model.onnx": model})
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready(NAME, "9")
    assert not client.is_model_ready("nobody")
    assert client.get_model_metadata(NAME)["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get_model_config(NAME, "1")["max_batch_size"] == 8
    (entry,) = [entry for entry in client.get_model_repository_index() if entry["name"] == NAME]
    assert entry["state"] == "READY"
    client.load_model(NAME)
    client.load_model(NAME, config='{"max_batch_size": 4}')
    assert client.get_model_config(NAME)["max_batch_size"] == 4
    assert "nobody" in refused(client.get_model_metadata, "nobody")
    assert "nobody" in refused(client.load_model, "nobody")
    assert "nobody" in refused(client.unload_model, "nobody")


def infer(client: Any) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    given = triton.InferInput("x", [2, 3], "FP32")
    for is_binary in (True, False):
        given.set_data_from_numpy(x, binary_data=is_binary)
        for wants_binary in (True, False):
            outputs = [triton.InferRequestedOutput("negative", binary_data=wants_binary)]
            answer = client.infer(NAME, [given], outputs=outputs, request_id="7", model_version="1")
            np.testing.assert_array_equal(answer.as_numpy("negative"), -x)
            response = answer.get_response()
            assert (response["id"], response["model_name"], response["model_version"]) == ("7", NAME, "1")
    answer = client.infer(NAME, [given], timeout=1_000_000, priority=1, sequence_id=0)
    np.testing.assert_array_equal(answer.as_numpy("sum"), 2 * x)
    for coding in ("gzip", "deflate"):
        answer = client.infer(
            NAME, [given], request_compression_algorithm=coding, response_compression_algorithm=coding
        )
        np.testing.assert_array_equal(answer.as_numpy("sum"), 2 * x)
    waiting = [client.async_infer(NAME, [given]) for _ in range(20)]
    for request in waiting:
        np.testing.assert_array_equal(request.get_result().as_numpy("sum"), 2 * x)
    body, json_size = triton.InferenceServerClient.generate_request_body([given])
    assert json_size is None or body[:json_size]
    assert "nobody" in refused(client.infer, "nobody", [given])
    given.set_shape([3, 2])
    assert "x" in refused(client.infer, NAME, [given])


def compute(client: Any) -> None:
    """Built-in models: parameters, NaN in JSON, text parameters and half precision."""
    rows = np.array([[1, 2], [np.nan, 4], [np.inf, 9]], dtype=np.float32)
    given = triton.InferInput("input", [3, 2], "FP32")
    for is_binary in (True, False):
        given.set_data_from_numpy(rows, binary_data=is_binary)
        outputs = [triton.InferRequestedOutput("output", binary_data=is_binary)]
        parameters = {"training": True, "eps": 1e-3}
        answer = client.infer("normcore.batch_norm", [given], outputs=outputs, parameters=parameters)
        assert np.isnan(answer.as_numpy("output")[:, 0]).all()
        assert np.isfinite(answer.as_numpy("output")[:, 1]).all()
    half = triton.InferInput("input", [2, 4], "FP16")
    half.set_data_from_numpy(np.arange(8, dtype=np.float16).reshape(2, 4))
    answer = client.infer("normcore.rms_norm", [half], parameters={"normalized_shape": "4"})
    assert answer.as_numpy("output").dtype == np.float16


def statistics(client: Any) -> None:
    (stats,) = client.get_inference_statistics(NAME, "1")["model_stats"]
    assert stats["inference_stats"]["success"]["count"] >= 20
    assert stats["inference_count"] >= 40
    assert client.get_inference_statistics()["model_stats"]


def refusals(client: Any) -> None:
    """What this server does not offer is refused in a way that the client can show."""
    for call, arguments in (
        (client.get_trace_settings, ()),
        (client.update_trace_settings, (None, {"trace_level": ["OFF"]})),
        (client.get_log_settings, ()),
        (client.update_log_settings, ({"log_verbose_level": 1},)),
        (client.get_system_shared_memory_status, ()),
        (client.register_system_shared_memory, ("region", "/key", 16)),
        (client.unregister_system_shared_memory, ()),
        (client.get_cuda_shared_memory_status, ()),
        (client.register_cuda_shared_memory, ("region", b"aGFuZGxl", 0, 16)),
        (client.unregister_cuda_shared_memory, ()),
    ):
        assert "not supported" in refused(call, *arguments), call


def main() -> None:
    address, path = sys.argv[1:]
    client = triton.InferenceServerClient(address, concurrency=4)
    manage(client, Path(path).read_bytes())
    infer(client)
    compute(client)
    statistics(client)
    refusals(client)
    client.unload_model(NAME)
    assert not client.is_model_ready(NAME)
    client.load_model(NAME)
    client.unload_model(NAME, unload_dependents=True)
    client.close()


if __name__ == "__main__":
    main()
