"""MLServer: everything in one process, the Open Inference Protocol in JSON, which is all that it takes over HTTP."""

import asyncio
import socket

import uvloop
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.frameworks.network import Arguments, Network, read_arguments


class Served(MLModel):  # type: ignore[misc]  # not installed where types are checked
    async def load(self) -> bool:
        parameters = self.settings.parameters
        self._network = Network(parameters.uri, parameters.extra["threads"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = self._network(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", rows)])


async def serve(asked: Arguments) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        grpc_port = free.getsockname()[1]
    server = MLServer(
        Settings(
            debug=False,
            host="127.0.0.1",
            http_port=asked.port,
            grpc_port=grpc_port,
            metrics_endpoint=None,
            parallel_workers=0,
        )
    )
    batching = {"max_batch_size": asked.rows, "max_batch_time": 0.001} if asked.rows > 1 else {}
    parameters = ModelParameters(uri=asked.model, extra={"threads": asked.threads})
    await server.start([ModelSettings(name="served", implementation=Served, parameters=parameters, **batching)])


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(serve(read_arguments()))
