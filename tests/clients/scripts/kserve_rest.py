"""KServe's InferenceRESTClient against a running server: `kserve_rest.py ADDRESS`."""

import asyncio
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

MODEL = "normcore.layer_norm"


def request(*, is_binary: bool, shape: str = "4") -> InferRequest:
    given = InferInput("input", [2, 4], "FP32")
    given.set_data_from_numpy(np.arange(8, dtype=np.float32).reshape(2, 4), binary_data=is_binary)
    return InferRequest(MODEL, [given], parameters={"normalized_shape": shape}, request_id="a-7")


async def main() -> None:
    url = f"http://{sys.argv[1]}"
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=30))
    assert await client.is_server_live(url)
    assert await client.is_server_ready(url)
    assert await client.is_model_ready(url, MODEL)
    assert not await client.is_model_ready(url, "nobody")
    expected = np.array([-1.3416354, -0.4472118, 0.4472118, 1.3416354], dtype=np.float32)
    for is_binary in (True, False):
        answer = await client.infer(url, request(is_binary=is_binary), model_name=MODEL)
        assert (answer.model_name, answer.id) == (MODEL, "a-7")
        (output,) = [output for output in answer.outputs if output.name == "output"]
        np.testing.assert_allclose(output.as_numpy(), [expected, expected], rtol=1e-6)
    sentence = ""
    try:
        await client.infer(url, request(is_binary=True, shape="5"), model_name=MODEL)
    except httpx.HTTPStatusError as error:
        sentence = str(error)
    assert "normalized_shape" in sentence  # the client could read ours
    await client.close()


if __name__ == "__main__":
    asyncio.run(main())
