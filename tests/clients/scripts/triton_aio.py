"""Every public method of tritonclient.http.aio against a running server: `triton_aio.py ADDRESS MODEL_FILE`."""

import asyncio
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http.aio as triton
from tritonclient.utils import InferenceServerException

NAME = "aio model"


async def refused(call: Awaitable[Any]) -> str:
    try:
        await call
    except InferenceServerException as error:
        return str(error.message())
    raise AssertionError("the call was not refused")


async def manage(client: Any, model: bytes) -> None:
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert (await client.get_server_metadata())["name"] == "normserve"
    await client.load_model(NAME, config="{}", files={"file:2/model.onnx": model})
    assert await client.is_model_ready(NAME, "2")
    assert (await client.get_model_metadata(NAME))["versions"] == ["2"]
    assert (await client.get_model_config(NAME))["name"] == NAME
    assert NAME in {entry["name"] for entry in await client.get_model_repository_index()}
    assert "nobody" in await refused(client.get_model_config("nobody"))


async def infer(client: Any) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for is_binary in (True, False):
        given = triton.InferInput("x", [2, 3], "FP32")
        given.set_data_from_numpy(x, binary_data=is_binary)
        outputs = [triton.InferRequestedOutput("sum", binary_data=is_binary)]
        answers = await asyncio.gather(*(client.infer(NAME, [given], outputs=outputs) for _ in range(8)))
        for answer in answers:
            np.testing.assert_array_equal(answer.as_numpy("sum"), 2 * x)
        answer = await client.infer(
            NAME, [given], request_compression_algorithm="gzip", response_compression_algorithm="deflate"
        )
        np.testing.assert_array_equal(answer.as_numpy("negative"), -x)
        assert "nobody" in await refused(client.infer("nobody", [given]))


async def rest(client: Any) -> None:
    (stats,) = (await client.get_inference_statistics(NAME))["model_stats"]
    assert stats["inference_stats"]["success"]["count"] >= 18
    for call in (
        client.get_trace_settings(),
        client.update_trace_settings(settings={"trace_level": ["OFF"]}),
        client.get_log_settings(),
        client.update_log_settings({"log_verbose_level": 1}),
        client.get_system_shared_memory_status(),
        client.register_system_shared_memory("region", "/key", 16),
        client.unregister_system_shared_memory(),
        client.get_cuda_shared_memory_status(),
        client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 16),
        client.unregister_cuda_shared_memory(),
    ):
        assert "not supported" in await refused(call)
    await client.unload_model(NAME)
    assert not await client.is_model_ready(NAME)


async def main() -> None:
    address, path = sys.argv[1:]
    model = Path(path).read_bytes()  # noqa: ASYNC240 - nothing else runs yet
    async with triton.InferenceServerClient(address) as client:
        await manage(client, model)
        await infer(client)
        await rest(client)


if __name__ == "__main__":
    asyncio.run(main())
