import io
import pickle
import zipfile
from collections.abc import Callable

import pytest
import safetensors.torch
import torch

from normcore.checkpoints.formats import ADVICE, HEAD_BYTES, TENSOR_ADVICE, Format, sniff
from tests.normcore.folding.builder import Net

TENSORS = {"weight": torch.ones(2)}


def saved(write: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()[:HEAD_BYTES]


def zipped(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")


def exported(buffer: io.BytesIO) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), buffer)


def onnx_head() -> bytes:
    net = Net()
    content: bytes = net.model({"x": (1, 3)}, net.op("Relu", "x")).SerializeToString()
    return content[:HEAD_BYTES]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        pytest.param(onnx_head(), "onnx", id="onnx"),
        pytest.param(safetensors.torch.save(TENSORS)[:HEAD_BYTES], "safetensors", id="safetensors"),
        pytest.param(saved(lambda buffer: torch.save(TENSORS, buffer)), "torch_zip", id="torch"),
        pytest.param(
            saved(lambda buffer: torch.save(TENSORS, buffer, _use_new_zipfile_serialization=False)),
            "pickle",
            id="torch-legacy",
        ),
        *(pytest.param(pickle.dumps({"a": [1]}, version), "pickle", id=f"pickle-{version}") for version in range(6)),
        pytest.param(pickle.dumps([1.5], 0), "pickle", id="pickle-0-list"),
        pytest.param(saved(zipped), "zip", id="zip"),
        pytest.param((0x380).to_bytes(8, "little") + b'{"a":', "safetensors", id="safetensors-like-pickle"),
        pytest.param((0x6428).to_bytes(8, "little") + b'{"a":', "safetensors", id="safetensors-like-pickle-0"),
        pytest.param(b"a".ljust(257, b"\0") + b"ustar", "tar", id="tar"),
        pytest.param(b"", "unknown", id="empty"),
        pytest.param(b"<html>", "unknown", id="html"),
        pytest.param(b"PK\x03\x04", "zip", id="truncated-zip"),
    ],
)
def test_tells_format_by_content(head: bytes, expected: Format) -> None:
    assert sniff(head) == expected


def test_tells_exported_program() -> None:
    assert sniff(saved(exported)) == "exported_program"


def test_advises_on_every_format_but_onnx() -> None:
    assert {"safetensors", "torch_zip", *TENSOR_ADVICE} == {"onnx", *ADVICE}
    assert {"onnx", *ADVICE} == set(Format.__args__)  # type: ignore[attr-defined]  # typing.Literal keeps its names there
