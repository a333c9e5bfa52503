"""PyTriton: NVIDIA's Triton in front of this process, the Open Inference Protocol with its binary extension.

Its processes take the libpython of the system, so this one has to run on that too.
"""

from pathlib import Path

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from benchmarks.frameworks.network import Arguments, Network, Rows, read_arguments

_MAX_ROWS = 32  # it joins those that wait already, for which nothing has to wait


def serve(asked: Arguments) -> None:
    network = Network(asked.model, asked.threads)

    def infer(x: Rows) -> dict[str, Rows]:
        return {"y": network(x)}

    config = TritonConfig(http_address="127.0.0.1", http_port=asked.port, allow_grpc=False, allow_metrics=False)
    with Triton(config=config, workspace=Path(asked.model).with_name("workspace")) as triton:
        triton.bind(
            model_name="served",
            infer_func=batch(infer),
            inputs=[Tensor(name="x", dtype=np.float32, shape=network.input_shape)],
            outputs=[Tensor(name="y", dtype=np.float32, shape=network.output_shape)],
            config=ModelConfig(max_batch_size=_MAX_ROWS, batcher=DynamicBatcher()),
        )
        triton.serve()


if __name__ == "__main__":
    serve(read_arguments())
