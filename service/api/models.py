"""/v1/models: what is served."""

from urllib.parse import quote

from fastapi import APIRouter, Request, Response

from service.api.curl import infer_lines
from service.api.dependencies import ServicesDep, document_schema, read_document
from service.api.schemas import Model, ModelList, ModelRequest, ServedModel, ServedModelList

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.post("", status_code=201, openapi_extra=document_schema(ModelRequest))
async def serve_model(request: Request, response: Response, services: ServicesDep) -> Model:
    """Serve a checkpoint under a name, over the Open Inference Protocol.

    With `fold` (the default) the certified fold is served where there is one; otherwise the checkpoint as it is, and
    the answer says why. The model is first loaded and run in a child process with limits.
    """
    services.health.refuse_while_draining()
    wanted = await read_document(request, ModelRequest)
    entry = await services.models.register(
        wanted.name,
        checkpoint=wanted.checkpoint,
        version=wanted.version,
        fold=wanted.fold,
        freeze_training=wanted.freeze_training,
        options=wanted.options(),
        is_batch_size_automatic=wanted.max_batch_size is None,
    )
    response.headers["Location"] = f"/v1/models/{quote(entry.name)}"
    return Model.of(entry)


@router.get("")
async def list_models(services: ServicesDep) -> ModelList:
    """List every version of every model, the built-in ones included."""
    return ModelList(models=[Model.of(entry) for entry in services.models.entries()])


@router.get("/{name}")
async def read_model(name: str, request: Request, services: ServicesDep) -> ServedModelList:
    """Read the versions of one model: inputs, outputs, and infer requests to copy, in JSON and binary."""
    services.models.find(name)
    base = str(request.base_url)
    return ServedModelList(
        models=[
            ServedModel(**Model.of(entry).model_dump(), requests=infer_lines(entry, base) if entry.loaded else {})
            for entry in services.models.entries()
            if entry.name == name
        ]
    )


@router.delete("/{name}/versions/{version}", status_code=204)
async def delete_model(name: str, version: int, services: ServicesDep) -> None:
    """Stop serving a version and forget it; its checkpoint stays."""
    await services.models.delete(name, version)
