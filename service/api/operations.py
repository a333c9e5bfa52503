"""/ and /v1/info: what runs here and within which bounds."""

from typing import Any

import onnx
import onnxruntime
import torch
from fastapi import APIRouter
from fastapi.responses import RedirectResponse

from service import __version__
from service.api.dependencies import ServicesDep
from service.engine.devices import torch_device

router = APIRouter(tags=["operations"])

_LIMITS = (
    "max_body_bytes",
    "max_json_bytes",
    "max_checkpoint_bytes",
    "receive_budget_bytes",
    "body_timeout_s",
    "queue_size",
    "infer_deadline_s",
    "sandbox_memory_bytes",
    "sandbox_deadline_s",
    "max_graph_nodes",
    "max_tensor_bytes",
    "max_running_jobs",
    "max_finished_jobs",
)


@router.get("/", include_in_schema=False)
async def show_documentation() -> RedirectResponse:
    """Whoever has nothing but the address; relative, for a proxy may serve it under a prefix."""
    return RedirectResponse("docs")


@router.get("/v1/info")
async def read_info(services: ServicesDep) -> dict[str, Any]:
    """Versions, devices, compute threads and limits of this service."""
    settings = services.settings.model_dump()
    return {
        "name": "normserve",
        "version": __version__,
        "libraries": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "devices": onnxruntime.get_available_providers(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "normalization_device": str(torch_device(services.settings.device)),
        "threads": services.threads,
        "limits": {name: settings[name] for name in _LIMITS},
    }
