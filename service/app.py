"""The composition root: makes and opens the services in order, closes them in reverse, hands them to the routes."""

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypedDict

import torch
import uvicorn
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware import Middleware
from starlette.routing import Route

from normcore.compilation import load_all
from normcore.normalization import METHODS
from service import __version__
from service.api import (
    calibration,
    checkpoints,
    errors,
    jobs,
    metrics,
    models,
    normalizations,
    openapi,
    operations,
    protocol,
    statistics,
)
from service.api.asgi import Endpoint
from service.api.batches import post_batch
from service.api.connection import Connection
from service.api.infer import InferRoute
from service.api.middleware import Guard, RequestContext
from service.api.shortcut import Shortcut
from service.application.batches import Batches
from service.application.calibration import Calibration
from service.application.checkpoints import Checkpoints
from service.application.folding import Folding
from service.application.health import Health
from service.application.inference import Inference
from service.application.jobs import Jobs
from service.application.models import Models
from service.application.preparation import Preparation
from service.application.statistics import Statistics
from service.codecs import json_numbers
from service.engine.admission import ReceiveBudget
from service.engine.compiler import Compiler
from service.engine.devices import torch_device
from service.engine.normalization import NormalizationEngine
from service.engine.onnx_runtime import OnnxEngine
from service.engine.protocol import Engine, ModelOptions
from service.engine.sandbox import Sandbox
from service.engine.threads import thread_budget, use_one_thread
from service.engine.worker import Worker
from service.settings import Settings
from service.state import Services
from service.storage.blobs import Blobs
from service.storage.metadata import Metadata, database_url
from service.storage.statistics import StatisticsStore
from service.tracing import Tracing

log = logging.getLogger(__name__)


class LifespanState(TypedDict):
    """What every request's scope carries."""

    services: Services
    shortcut: Shortcut


def create_app(settings: Settings, health: Health | None = None) -> FastAPI:
    """The service as an ASGI app; nothing is opened before its lifespan starts. Who stops it shares `health`."""
    health = health or Health()
    tracing = Tracing.open(settings.otlp_endpoint) if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[LifespanState]:
        async with AsyncExitStack() as stack:
            if tracing is not None:
                stack.push_async_callback(asyncio.to_thread, tracing.close)
            services = await _open(settings, health, stack)
            yield {"services": services, "shortcut": Shortcut(services)}

    app = FastAPIOffline(
        title="normserve",
        version=__version__,
        summary="Compute normalization, fold it with proof, serve with frozen statistics.",
        redirect_slashes=False,
        generate_unique_id_function=openapi.operation_id,
        lifespan=lifespan,
        middleware=[
            Middleware(RequestContext, tracing=tracing),
            Middleware(Guard, allowed_hosts=settings.allowed_hosts, allowed_origins=settings.allowed_origins),
            Middleware(InferRoute),
        ],
        telemetry={"tracing": False, "metrics": False, "logs": False},  # RequestContext and /metrics do that
    )
    # Tensor routes are plain ASGI: a declared body would be parsed before any check, and costs a third of the rate.
    app.router.routes.append(Route("/v1/normalizations/{method}", Endpoint(normalizations.normalize), methods=["POST"]))
    app.router.routes.append(Route("/v1/statistics/{statistics_id}/batches", Endpoint(post_batch), methods=["POST"]))
    for module in (protocol, normalizations, statistics, checkpoints, calibration, jobs, models, operations, metrics):
        app.include_router(module.router)
    errors.install(app)
    openapi.install(app)
    return app


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; then turn not ready, drain, and return 0."""
    health = Health()
    config = uvicorn.Config(
        create_app(settings, health),
        host=settings.host,
        port=settings.port,
        root_path=settings.root_path,
        lifespan="on",
        http=Connection.within(settings.body_timeout_s),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_s),
    )
    server = _Server(config, health, drain_s=settings.drain_s)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve())
    return 0 if server.started else 3


class _Server(uvicorn.Server):
    """Owns its signals: uvicorn's would close the listener before readiness has turned false, and end with 143."""

    def __init__(self, config: uvicorn.Config, health: Health, *, drain_s: float) -> None:
        super().__init__(config)
        self._health = health
        self._drain_s = drain_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._drain)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # a full collection walks all that the libraries made, and stops every request for 120 ms
        for listener in self.servers:
            host, port = listener.sockets[0].getsockname()[:2]
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            sys.stdout.write(f"normserve {__version__} listens on {url}, documentation at {url}/docs\n")
            sys.stdout.flush()

    def _drain(self) -> None:
        if self._health.phase == "draining":
            self.should_exit = True
            return
        log.info("draining", extra={"drain_s": self._drain_s})
        self._health.phase = "draining"
        asyncio.get_running_loop().call_later(self._drain_s, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


async def _open(settings: Settings, health: Health, stack: AsyncExitStack) -> Services:
    threads = thread_budget(settings.threads)
    torch.set_num_threads(threads)
    compiler = Compiler(settings)
    json_thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="json"))
    await asyncio.to_thread(settings.data_dir.mkdir, parents=True, exist_ok=True)
    blobs = Blobs(settings.data_dir)
    await asyncio.to_thread(blobs.open)
    stack.callback(blobs.close)
    metadata = Metadata(database_url(settings.database_url, settings.data_dir))
    await metadata.open()
    stack.push_async_callback(metadata.close)
    sandbox = Sandbox(
        memory_bytes=settings.sandbox_memory_bytes,
        deadline_s=settings.sandbox_deadline_s,
        slots=settings.sandbox_slots,
        queue=settings.sandbox_queue,
    )
    work = Jobs(
        max_running=settings.max_running_jobs,
        max_finished=settings.max_finished_jobs,
        max_result_bytes=settings.max_job_result_bytes,
        reserve=sandbox.reserve,
    )
    stack.push_async_callback(work.close)  # after the sandbox, without which no job waits for long
    await sandbox.start()
    stack.push_async_callback(sandbox.close)
    checkpoints = Checkpoints(blobs=blobs, metadata=metadata, sandbox=sandbox, settings=settings)
    folding = Folding(checkpoints=checkpoints, blobs=blobs, metadata=metadata, sandbox=sandbox, settings=settings)
    models = await _open_models(settings, blobs, metadata, checkpoints, folding, sandbox, threads, compiler, stack)
    statistics_store = StatisticsStore(metadata, limit=settings.max_statistics)
    await statistics_store.open()
    kept = Statistics(store=statistics_store, settings=settings)
    reducer = Worker("statistics", settings.queue_size, excuse=compiler.excuse)
    stack.push_async_callback(reducer.close)
    # Threads that wait for each other are slower than one, beside the event loop and its senders.
    await reducer.submit(use_one_thread, deadline_s=settings.infer_deadline_s)
    await metadata.transact(lambda _: use_one_thread())
    await compiler.start()
    stack.push_async_callback(compiler.close)
    restoring = asyncio.create_task(_restore(models, health, compiler, warms_up=settings.warm_up))
    stack.callback(restoring.cancel)
    return Services(
        settings=settings,
        threads=threads,
        health=health,
        compiler=compiler,
        budget=ReceiveBudget(settings.receive_budget_bytes),
        json_thread=json_thread,
        checkpoints=checkpoints,
        folding=folding,
        calibration=Calibration(
            checkpoints=checkpoints, blobs=blobs, metadata=metadata, sandbox=sandbox, settings=settings
        ),
        jobs=work,
        models=models,
        inference=Inference(kept, deadline_s=settings.infer_deadline_s),
        statistics=kept,
        batches=Batches(reducer, deadline_s=settings.infer_deadline_s, histogram_values=settings.histogram_values),
    )


async def _restore(models: Models, health: Health, compiler: Compiler, *, warms_up: bool) -> None:
    if warms_up:
        await compiler.fill(is_urgent=True)
        await asyncio.to_thread(load_all)
        await asyncio.to_thread(json_numbers.warm_up)
    await models.restore()
    if health.phase == "starting":
        health.phase = "serving"
    if not warms_up:
        await compiler.fill(is_urgent=False)


async def _open_models(
    settings: Settings,
    blobs: Blobs,
    metadata: Metadata,
    checkpoints: Checkpoints,
    folding: Folding,
    sandbox: Sandbox,
    threads: int,
    compiler: Compiler,
    stack: AsyncExitStack,
) -> Models:
    async def load_engine(path: Path, name: str, version: str, options: ModelOptions) -> Engine:
        return await OnnxEngine.load(
            path,
            name=name,
            version=version,
            threads=threads,
            queue_size=settings.queue_size,
            deadline_s=settings.sandbox_deadline_s,
            max_batch_bytes=settings.max_batch_bytes,
            has_arena=settings.arena,
            options=options,
        )

    models = Models(
        metadata=metadata,
        checkpoints=checkpoints,
        preparation=Preparation(
            checkpoints=checkpoints, blobs=blobs, folding=folding, sandbox=sandbox, settings=settings
        ),
        load_engine=load_engine,
    )
    stack.push_async_callback(models.close)
    worker = Worker("normalization", settings.queue_size, excuse=compiler.excuse)
    device = torch_device(settings.device)
    for method in METHODS.values():
        models.add_builtin(NormalizationEngine(method, worker, device))
    await models.open()
    return models
