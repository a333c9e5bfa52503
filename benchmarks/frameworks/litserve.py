"""LitServe: a process that listens and one that computes, JSON in and out."""

from typing import Any

import litserve
import numpy as np

from benchmarks.frameworks.network import Network, Rows, read_arguments


class Served(litserve.LitAPI):  # type: ignore[misc]  # not installed where types are checked
    """One row in each request; `predict` gets one, or several that were joined."""

    def __init__(self, model: str, *, threads: int, rows: int) -> None:
        super().__init__(max_batch_size=rows, batch_timeout=0.001 if rows > 1 else 0.0)
        self._model = model
        self._threads = threads
        self._is_joined = rows > 1

    def setup(self, device: str) -> None:
        self._network = Network(self._model, self._threads)

    def decode_request(self, request: dict[str, Any]) -> Rows:
        return np.asarray(request["x"], np.float32)

    def predict(self, x: Rows) -> Rows:
        return self._network(x) if self._is_joined else self._network(x[None])[0]

    def encode_response(self, output: Rows) -> dict[str, Any]:
        return {"y": output.tolist()}


if __name__ == "__main__":
    asked = read_arguments()
    api = Served(asked.model, threads=asked.threads, rows=asked.rows)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=asked.port, log_level="warning", generate_client_file=False)
