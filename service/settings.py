"""All settings of the service, read once from the environment with the prefix `NORMSERVE_`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    """Immutable; tests pass an instance, nothing reads the environment afterwards."""

    model_config = SettingsConfigDict(
        env_prefix="NORMSERVE_", env_ignore_empty=True, frozen=True, extra="forbid", allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(Path("data"), description="Folder of checkpoint files and the default database.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the metadata; empty means SQLite inside data_dir."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log level; a request that went well is logged at debug, others at info."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern="^https?://",
        description="OTLP/HTTP collector for traces, such as http://host:4318; empty sends none.",
    )
    root_path: str = Field("", description="Path prefix under which a proxy publishes the service; empty: none.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Host names a request may ask for, comma separated; empty allows every host."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins of web pages that may call the service, comma separated; empty allows only its own.",
    )

    max_body_bytes: int = Field(256 * MIB, gt=0, description="Largest body with tensors, in bytes.")
    max_json_bytes: int = Field(64 * MIB, gt=0, description="Largest JSON document, in bytes.")
    max_checkpoint_bytes: int = Field(1024 * MIB, gt=0, description="Largest uploaded checkpoint, in bytes.")
    receive_budget_bytes: int = Field(
        1024 * MIB,
        gt=0,
        description="Bytes of tensor bodies that may be held at once; beyond it requests get 429.",
    )
    body_timeout_s: float = Field(
        30.0, gt=0, description="Longest silence of a client that sends a request or takes an answer, in seconds."
    )

    warm_up: bool = Field(
        False, description="Compile all kernels on the CPU before turning ready, some minutes the first time."
    )
    compile_s: float = Field(
        60.0,
        ge=0,
        le=3600,
        description="Longest time that a call waits for another process to compile a kernel, which its deadline does"
        " not count, in seconds; after that, or at 0, which starts no such processes, the service compiles it itself.",
    )
    threads: int = Field(0, ge=0, description="Compute threads of the process; 0 takes the cgroup's CPU quota.")
    device: str = Field(
        "cpu", description="Where normalization is computed: cpu, cuda:N, or auto, a GPU if there is one."
    )
    queue_size: int = Field(128, gt=0, description="Requests that may wait for one model; beyond it requests get 429.")
    max_batch_bytes: int = Field(
        64 * MIB, gt=0, description="Bytes of the inputs of requests that are run together, at most."
    )
    arena: bool = Field(
        True,
        description="Models keep the memory of their intermediate results between runs; false gives it back each time.",
    )
    infer_deadline_s: float = Field(
        30.0,
        gt=0,
        description="Longest time an inference may wait and run, in seconds; a request may ask for less.",
    )
    drain_s: float = Field(1.0, ge=0, description="Seconds between turning not ready and closing the listener.")
    shutdown_s: float = Field(30.0, gt=0, description="Seconds that work in flight may take after the listener closed.")

    sandbox_memory_bytes: int = Field(
        4096 * MIB,
        gt=0,
        description="Memory of the process that touches an uploaded graph, in bytes; its libraries take 240 MB of it.",
    )
    sandbox_deadline_s: float = Field(
        120.0, gt=0, description="Longest time of one operation on an uploaded graph, in seconds."
    )
    sandbox_slots: int = Field(1, gt=0, description="Operations on uploaded graphs that may run at once.")
    sandbox_queue: int = Field(16, ge=0, description="Operations on uploaded graphs that may wait; beyond it 429.")
    max_graph_nodes: int = Field(100_000, gt=0, description="Nodes that an uploaded graph may have.")
    max_tensor_bytes: int = Field(
        1024 * MIB,
        gt=0,
        description="Largest tensor that a constant of an uploaded graph may expand to, in bytes.",
    )
    max_tensors: int = Field(200_000, gt=0, description="Named tensors that an uploaded checkpoint may have.")
    max_header_bytes: int = Field(
        16 * MIB, gt=0, description="Header of a safetensors file, or pickle of a PyTorch checkpoint, in bytes."
    )
    max_state_bytes: int = Field(
        4096 * MIB,
        gt=0,
        description="Named tensors of a checkpoint together, in bytes; those that share storage count each.",
    )
    verify_probes: int = Field(6, ge=4, le=64, description="Seeded probes of a fold's certificate.")

    max_calibration_batches: int = Field(
        1000, gt=0, description="Batches of data that one recalibration or look at drift may bring."
    )
    calibration_budget_bytes: int = Field(
        4096 * MIB,
        gt=0,
        description="Bytes of such data that may lie on the disk for their operations at once; beyond it 429.",
    )
    max_running_jobs: int = Field(8, gt=0, description="Jobs that may run or wait at once; beyond it 429.")
    max_finished_jobs: int = Field(
        100, gt=0, description="Finished jobs that are remembered; beyond it the oldest is forgotten."
    )
    max_job_result_bytes: int = Field(
        256 * MIB, gt=0, description="Results of finished jobs that are remembered, in bytes of JSON together."
    )

    max_stream_bytes: int = Field(
        16 * 1024 * MIB,
        gt=0,
        description="Largest batch that is posted to statistics as a stream (npy, or the protocol's binary), in bytes.",
    )
    max_statistics: int = Field(1000, gt=0, description="Statistics resources that may be kept.")
    max_num_features: int = Field(65_536, gt=0, le=2**20, description="Channels that statistics may have.")
    max_histogram_bins: int = Field(1000, gt=0, le=10_000, description="Bins that a histogram may be asked for.")
    histogram_values: int = Field(
        65_536, gt=0, description="Values of a batch that enter a histogram; of a larger batch an even sample."
    )
    max_name_length: int = Field(128, gt=0, le=1024, description="Longest name of statistics, in characters.")
    max_idempotency_key_length: int = Field(255, gt=0, le=1024, description="Longest Idempotency-Key, in characters.")

    @field_validator("allowed_hosts", "allowed_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
