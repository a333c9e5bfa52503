"""Checkpoints without a graph over HTTP: upload, plan, fold, download; and what they cannot be asked for."""

import io
import json
from collections import OrderedDict
from typing import Any

import httpx
import onnx
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tests.service import hostile

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAIRS = {"bn1": {"linear": "conv1"}, "bn2": {"linear": "conv2", "kind": "conv"}}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, 8, 3, bias=False),
        bn1=nn.BatchNorm2d(8),
        relu=nn.ReLU(),
        conv2=nn.Conv2d(8, 6, 3, bias=False),
        bn2=nn.BatchNorm2d(6),
    )
    for layer in layers.values():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.bias)
            nn.init.uniform_(layer.weight, 0.5, 2)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return nn.Sequential(layers).eval()


def saved(model: nn.Module, kind: str) -> bytes:
    if kind == "safetensors":
        return save(model.state_dict())
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.getvalue()


async def upload(client: httpx.AsyncClient, content: bytes, **query: str) -> dict[str, Any]:
    answer = await client.post("/v1/checkpoints", content=content, params=query)
    assert answer.status_code in (200, 201), answer.text
    found: dict[str, Any] = answer.json()
    return found


KINDS = {"safetensors": "checkpoint.safetensors", "torch_zip": "checkpoint.pt"}


@pytest.mark.parametrize(("kind", "name"), KINDS.items(), ids=KINDS)
async def test_an_upload_lists_every_norm_with_its_evidence(client: httpx.AsyncClient, kind: str, name: str) -> None:
    found = await upload(client, saved(network(1), kind))
    assert (found["format"], found["filename"], found["tensors"]) == (kind, name, 12)
    assert [entry["normalization"] for entry in found["normalizations"]] == ["bn1", "bn2"]
    for entry in found["normalizations"]:
        assert entry["standing"]
        assert entry["evidence"]
        assert entry["status"] != "foldable"


@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_caller_vouches_for_is_folded(client: httpx.AsyncClient, kind: str) -> None:
    model = network(20 + len(kind))
    path = f"/v1/checkpoints/{(await upload(client, saved(model, kind), filename='net.pt'))['id']}"
    planned = await client.get(f"{path}/plan", params={"eps": "1e-5", "pairs": json.dumps(PAIRS)})
    assert planned.json()["foldable"] == 2
    answer = await client.post(f"{path}/fold", json={"eps": 1e-5, "pairs": PAIRS})
    assert answer.status_code == 201, answer.text
    report, made = answer.json()["report"], answer.json()["checkpoint"]
    assert (report["folded"], report["form"], report["options"]["eps"]) == (2, "deploy", 1e-5)
    assert {entry["eps_source"] for entry in report["entries"]} == {"given by the caller"}
    assert "conv1.bias" in {change["key"] for change in report["manifest"]}
    assert "def load_folded" in report["loader"]
    assert (await client.get(f"/v1/checkpoints/{made['id']}/report")).json() == report
    download = await client.get(f"/v1/checkpoints/{made['id']}/content")
    assert download.headers["content-type"] == "application/vnd.safetensors"
    assert "net.folded.safetensors" in download.headers["content-disposition"]
    check_deployed(model, load(download.content))


def check_deployed(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    folded = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 8, 3), relu=nn.ReLU(), conv2=nn.Conv2d(8, 6, 3))).eval()
    folded.load_state_dict(state)
    x = torch.randn(2, 3, 9, 8)
    with torch.inference_mode():
        assert torch.allclose(folded(x), model(x), atol=1e-5)


async def test_the_shape_preserving_form_loads_into_the_same_class(client: httpx.AsyncClient) -> None:
    model, other = network(3), network(4)
    query = {"eps": "1e-5", "pairs": json.dumps(PAIRS), "form": "shape_preserving"}
    answer = await client.post("/v1/fold", content=saved(model, "safetensors"), params=query)
    assert answer.status_code == 200, answer.text
    assert (answer.headers["normserve-verdict"], answer.headers["normserve-folded"]) == ("unproven", "2")
    assert 'filename="folded.safetensors"' in answer.headers["content-disposition"]
    other.load_state_dict(load(answer.content))
    x = torch.randn(2, 3, 9, 8)
    with torch.inference_mode():
        assert torch.allclose(other(x), model(x), atol=1e-5)


async def test_nothing_to_fold_gives_the_file_back(client: httpx.AsyncClient) -> None:
    content = saved(network(5), "torch_zip")
    once = await client.post("/v1/fold", content=content)
    assert (once.headers["normserve-verdict"], once.content) == ("unchanged", content)
    uploaded = await upload(client, content)
    kept = await client.post(f"/v1/checkpoints/{uploaded['id']}/fold")
    assert (kept.status_code, kept.json()["checkpoint"]["id"]) == (200, uploaded["id"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "assumed_without_eps": ({"accept_assumed": True}, "accept_assumed: expected together with eps"),
    "unknown_class": ({"architecture": "nobody/net"}, "architecture: 'nobody/net' is not known"),
    "unknown_pair": ({"eps": 1e-5, "pairs": {"bn9": {"linear": "conv1"}}}, "bn9"),
    "of_a_graph": ({"affine": True}, "affine: expected for another kind of checkpoint"),
    "of_a_graph_too": ({"zero_padding": "map"}, "zero_padding: expected for another kind"),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
async def test_an_option_that_cannot_be_honoured_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], message: str
) -> None:
    uploaded = await upload(client, saved(network(6), "safetensors"))
    answer = await client.post(f"/v1/checkpoints/{uploaded['id']}/fold", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "fold_refused"), answer.text
    assert message in answer.json()["error"]


async def test_options_of_named_tensors_are_refused_for_a_graph(client: httpx.AsyncClient) -> None:
    uploaded = await upload(client, hostile.small_conv())
    for query in ({"eps": "1e-5"}, {"architecture": "x"}, {"form": "shape_preserving"}, {"bake": "true"}):
        answer = await client.get(f"/v1/checkpoints/{uploaded['id']}/plan", params=query)
        assert (answer.status_code, answer.json()["code"]) == (422, "fold_refused"), answer.text


MALFORMED = (
    {"eps": "nan"},
    {"eps": "-1"},
    {"pairs": "[1]"},
    {"pairs": "{"},
    {"pairs": '{"bn1": "conv1"}'},
    {"form": "x"},
    {"zero_padding": "y"},
    {"what": "1"},
    {"accept_assumed": "maybe"},
)


@pytest.mark.parametrize("query", MALFORMED, ids=str)
async def test_malformed_options_name_themselves(client: httpx.AsyncClient, query: dict[str, str]) -> None:
    uploaded = await upload(client, saved(network(6), "safetensors"))
    for answer in (
        await client.get(f"/v1/checkpoints/{uploaded['id']}/plan", params=query),
        await client.post("/v1/fold", params=query, content=b"x"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "parameter_invalid"), answer.text
        assert next(iter(query)) in answer.json()["error"]


async def test_tensors_without_a_graph_are_not_served_or_compared(client: httpx.AsyncClient) -> None:
    uploaded = (await upload(client, saved(network(7), "safetensors")))["id"]
    served = await client.post("/v1/models", json={"name": "tensors", "checkpoint": uploaded})
    assert (served.status_code, served.json()["code"]) == (400, "checkpoint_invalid")
    assert "without a graph; export the model to ONNX" in served.json()["error"]
    compared = await client.post(f"/v1/checkpoints/{uploaded}/compare/{uploaded}")
    assert (compared.status_code, compared.json()["code"]) == (400, "checkpoint_invalid")


async def test_damaged_files_are_refused(client: httpx.AsyncClient) -> None:
    for kind in KINDS:
        content = saved(network(8), kind)
        for damaged in (content[: len(content) // 2], content[:60], content[:8] + b"\xff" * 40 + content[48:]):
            for path in ("/v1/checkpoints", "/v1/fold"):
                answer = await client.post(path, content=damaged)
                assert (answer.status_code, answer.json()["code"]) == (400, "checkpoint_invalid"), answer.text


async def test_a_plan_writes_nothing(client: httpx.AsyncClient) -> None:
    uploaded = (await upload(client, saved(network(9), "safetensors")))["id"]
    before = (await client.get("/v1/checkpoints")).json()
    await client.get(f"/v1/checkpoints/{uploaded}/plan", params={"eps": "1e-3", "pairs": json.dumps(PAIRS)})
    assert (await client.get("/v1/checkpoints")).json() == before


async def test_a_model_serves_the_fold_that_is_kept(client: httpx.AsyncClient) -> None:
    model = onnx.load_from_string(hostile.small_conv())
    model.producer_name = "kept fold"
    uploaded = (await upload(client, model.SerializeToString()))["id"]
    kept = (await client.post(f"/v1/checkpoints/{uploaded}/fold")).json()
    before = kept["report"]["certificate"]["sentence"]
    served = (await client.post("/v1/models", json={"name": "kept-fold", "checkpoint": uploaded})).json()
    assert served["served_checkpoint"] == kept["checkpoint"]["id"]
    assert served["fold"]["reason"] == before
