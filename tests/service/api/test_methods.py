"""Every normalization method over HTTP: the documented example, both surfaces, its description, and the library."""

from typing import Any

import httpx
import numpy as np
import pytest
import torch

from service import datatypes
from service.api.examples import NORMALIZATIONS
from service.application.methods import METHODS

in_session = pytest.mark.asyncio(loop_scope="session")


def tensors_and_parameters(name: str) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """An example's tensors as arrays, and the rest."""
    known = {tensor.name for tensor in METHODS[name].tensors}
    tensors, parameters = {}, {}
    for key, value in NORMALIZATIONS[name].items():
        if key not in known:
            parameters[key] = ",".join(map(str, value)) if isinstance(value, list) and key != "outputs" else value
        elif isinstance(value, dict):
            tensors[key] = np.array(value["data"], datatypes.by_name(value["datatype"]).numpy).reshape(value["shape"])
        else:
            tensors[key] = np.array(value, np.float32)
    return tensors, parameters


def test_every_method_has_an_example() -> None:
    assert set(NORMALIZATIONS) == set(METHODS)


@in_session
@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
async def test_both_surfaces_answer_what_the_library_computes(client: httpx.AsyncClient, name: str) -> None:
    tensors, parameters = tensors_and_parameters(name)
    outputs = parameters.pop("outputs", None)
    expected = METHODS[name]({key: torch.from_numpy(array) for key, array in tensors.items()}, parameters, outputs)
    own = await client.post(f"/v1/normalizations/{name}", json=NORMALIZATIONS[name])
    assert own.status_code == 200, own.text
    document: dict[str, Any] = {
        "inputs": [
            {
                "name": key,
                "shape": array.shape,
                "datatype": datatypes.of(array).name,
                "data": array.reshape(-1).tolist(),
            }
            for key, array in tensors.items()
        ],
        "parameters": parameters,
    }
    if outputs:
        document["outputs"] = [{"name": output} for output in outputs]
    protocol = await client.post(f"/v2/models/normcore.{name}/infer", json=document)
    assert protocol.status_code == 200, protocol.text
    second = {item["name"]: item for item in protocol.json()["outputs"]}
    assert set(own.json()["outputs"]) == set(second) == set(expected.outputs)
    for key, tensor in expected.outputs.items():
        for found in (own.json()["outputs"][key], second[key]):
            assert found["shape"] == list(tensor.shape)
            array = np.array(found["data"], datatypes.by_name(found["datatype"]).numpy).reshape(found["shape"])
            np.testing.assert_array_equal(array, tensor.detach().numpy())


@in_session
@pytest.mark.parametrize("name", sorted(NORMALIZATIONS))
async def test_the_description_is_the_table(client: httpx.AsyncClient, name: str) -> None:
    described = (await client.get(f"/v1/normalizations/{name}")).json()
    assert described == METHODS[name].describe()
    operation = (await client.get("/openapi.json")).json()["paths"][f"/v1/normalizations/{name}"]["post"]
    properties = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {tensor.name for tensor in METHODS[name].tensors} <= set(properties)
    for parameter in METHODS[name].parameters:
        assert parameter.name in properties
        refused = await client.post(f"/v1/normalizations/{name}", json=NORMALIZATIONS[name] | {parameter.name: {}})
        assert refused.status_code == 400, parameter.name
    unknown = await client.post(f"/v1/normalizations/{name}", json=NORMALIZATIONS[name] | {"surely_unknown": 1})
    assert (unknown.status_code, unknown.json()["code"]) == (422, "parameter_invalid")
