"""Files of named tensors: sound ones are read exactly, damaged and hostile ones are refused with a CheckpointError."""

import io
import json
import pickle
import resource
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from normcore.checkpoints.tensor_file import open_tensors
from normcore.checkpoints.tensors import TensorFile, TensorLimits
from normcore.errors import CheckpointError

STATE = {
    "conv.weight": torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)),
    "conv.bias": torch.arange(4, dtype=torch.float16),
    "steps": torch.tensor(7),
    "half": torch.ones(3, dtype=torch.bfloat16) / 3,
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 5),
    "nothing": torch.empty(2, 0, dtype=torch.int64),
    "double": torch.tensor([[1.5, 2.5]], dtype=torch.float64),
}


def zipped(state: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def opened(content: bytes, folder: Path, **options: Any) -> TensorFile:
    path = folder / "file.bin"
    path.write_bytes(content)
    return open_tensors(path, **options)


def refused(content: bytes, folder: Path, reason: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=reason):
        opened(content, folder, **options)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(zipped(STATE), id="torch"),
        pytest.param(zipped(OrderedDict(STATE), pickle_protocol=4), id="torch-protocol-4"),
        pytest.param(safetensors.torch.save(STATE), id="safetensors"),
    ],
)
def test_reads_every_tensor_exactly(content: bytes, tmp_path: Path) -> None:
    file = opened(content, tmp_path)
    assert set(file.tensors) == set(STATE)
    for key, tensor in STATE.items():
        array = file.read(key)
        assert array.shape == tuple(tensor.shape)
        assert torch.equal(torch.from_numpy(array.astype(np.float64)), tensor.double())


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.permute(2, 0, 1), id="permuted"),
        pytest.param(lambda x: x[1:, ::2], id="strided"),
        pytest.param(lambda x: x[:, :, 1], id="column"),
        pytest.param(lambda x: x.t() if x.ndim == 2 else x.transpose(0, 1), id="transposed"),
        pytest.param(lambda x: x[:0], id="empty"),
        pytest.param(lambda x: x[2, 3, 1], id="scalar"),
    ],
)
def test_reads_views(view: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    tensor = view(torch.randn(5, 6, 7))
    file = opened(zipped({"x": tensor, "rest": nn.Parameter(torch.ones(2))}), tmp_path)
    assert np.array_equal(file.read("x"), tensor.numpy())
    assert file.read("rest").tolist() == [1, 1]


def test_old_groups_of_training_are_skipped(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    momentum = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(4, 3)}}
    optimizer = {"state": momentum, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}]}
    content = zipped({"epoch": 4, "loss": 0.5, "name": "run", "model": model.state_dict(), "optimizer": optimizer})
    file = opened(content, tmp_path)
    assert file.group == "model"
    assert list(file.tensors) == list(model.state_dict())


def header(entries: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(header({"a": entry(0, 8)}, b"\0" * 4), "truncated: 4 bytes, 8 declared", id="truncated"),
        pytest.param(header({"a": entry(0, 8)}, b"\0" * 12), "followed by bytes", id="trailing"),
        pytest.param(header({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "overlaps", id="overlap"),
        pytest.param(header({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12), "leaves a hole", id="hole"),
        pytest.param(header('{"a":1,"a":2}'), "names 'a' twice", id="duplicate"),
        pytest.param(header('{"a":{"dtype":"F32","dtype":"F32"}}'), "names 'dtype' twice", id="duplicate-field"),
        pytest.param(header({"a": entry(0, 8, "F4")}, b"\0" * 8), "'F4' is not one of", id="datatype"),
        pytest.param(header({"a": entry(0, 8, ["F32"])}, b"\0" * 8), "is not one of", id="datatype-list"),
        pytest.param(
            header({"a": entry(0, 8, shape=[3])}, b"\0" * 8), "takes 12 bytes, and its range has 8", id="size"
        ),
        pytest.param(header({"a": entry(0, 8, shape=[-2])}, b"\0" * 8), "'-2' is no size", id="negative"),
        pytest.param(header({"a": entry(0, 8, shape=[2.0])}, b"\0" * 8), "'2.0' is no size", id="float"),
        pytest.param(header({"a": entry(0, 8, shape=[True, 2])}, b"\0" * 8), "'True' is no size", id="bool"),
        pytest.param(header({"a": entry(0, 4, shape=[1] * 40)}, b"\0" * 4), "at most 16 sizes", id="rank"),
        pytest.param(header({"a": entry(0, 8, shape=[2**40, 2**40])}, b"\0" * 8), "takes", id="huge"),
        pytest.param(header({"a": entry(8, 0, shape=[0])}, b"\0" * 8), "no range", id="backwards"),
        pytest.param(header({"a": {"dtype": "F32"}}), "not exactly", id="fields"),
        pytest.param(header({"a": [1]}), "not exactly", id="no-entry"),
        pytest.param(header({"__metadata__": {"a": 1}}), "does not map texts to texts", id="metadata"),
        pytest.param(header('{"a":'), "not valid JSON", id="json"),
        pytest.param(header({"\ud800": entry(0, 4)}, b"\0" * 4), "not valid Unicode", id="surrogate"),
        pytest.param(header({"a" * 2000: entry(0, 4)}, b"\0" * 4), "has 2000 bytes, more than 1024", id="long-name"),
        pytest.param(header('{"a":NaN}'), "not valid JSON", id="nan"),
        pytest.param(header("{" + '"a":[' * 5000), "not valid JSON", id="deep"),
        pytest.param((2**31).to_bytes(8, "little") + b"{}", "truncated", id="header-length"),
        pytest.param(header('{"a":1' + " " * (17 << 20) + "}"), "more than the 16777216 allowed", id="header-bloat"),
    ],
)
def test_refuses_damaged_safetensors(content: bytes, reason: str, tmp_path: Path) -> None:
    refused(content, tmp_path, reason)


def test_refuses_more_than_the_limits(tmp_path: Path) -> None:
    for content in (safetensors.torch.save(STATE), zipped(STATE)):
        refused(content, tmp_path, "8 tensors, more than the 3 allowed|entries", limits=TensorLimits(max_tensors=3))
        refused(content, tmp_path, "bytes together, more than the 10 allowed", limits=TensorLimits(max_bytes=10))
        refused(content, tmp_path, "more than the 60 allowed", limits=TensorLimits(max_header_bytes=60))


def test_counts_tensors_with_two_names_twice(tmp_path: Path) -> None:
    tensor = torch.ones(1000)
    content = zipped({f"name{index}": tensor for index in range(50)})
    assert len(content) < 30_000
    refused(content, tmp_path, "200000 bytes together", limits=TensorLimits(max_bytes=100_000))


class Wrapped(torch.Tensor):
    """A subclass."""


class Evil:
    """Runs code when it is unpickled, where somebody unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/normserve-evil"),))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda: {"x": torch.zeros(1).expand(10**6, 10**6)}, "expanded view", id="stride-bomb"),
        pytest.param(
            lambda: {"x": torch.ones(8).as_strided((7, 2), (1, 1))}, "expanded view", id="overlapping-strides"
        ),
        pytest.param(lambda: {"x": torch.empty(3, device="meta")}, "meta device", id="meta"),
        pytest.param(lambda: {"x": torch.eye(3).to_sparse()}, "a sparse tensor; call .to_dense", id="sparse"),
        pytest.param(
            lambda: {"x": torch.ones(3).as_subclass(Wrapped)}, "tensor subclass|Python objects", id="subclass"
        ),
        pytest.param(lambda: {"x": torch.ones(3, dtype=torch.cfloat).conj()}, "conjugated", id="conjugated"),
        pytest.param(lambda: {"x": torch.ones(3, dtype=torch.uint16)}, "no storage class", id="uint16"),
        pytest.param(lambda: nn.Linear(2, 2), r"Python objects .*never loaded; save the tensors alone", id="module"),
        pytest.param(lambda: {"x": torch.ones(3), "y": Evil()}, "Python objects", id="code"),
        pytest.param(lambda: {"x": torch.ones(3), "y": Path("a")}, "Python objects", id="path"),
        pytest.param(lambda: {"x": torch.ones(3), "y": np.float64(1)}, "Python objects", id="numpy-scalar"),
        pytest.param(lambda: {"x": torch.ones(3), "y": {(1, 2): 3}}, "a key of type tuple", id="tuple-key"),
        pytest.param(lambda: torch.ones(3), "a single tensor", id="tensor"),
        pytest.param(lambda: {"x" * 2000: torch.ones(3)}, "has 2000 bytes, more than 1024", id="long-name"),
        pytest.param(lambda: {"\ud800": torch.ones(3)}, "damaged", id="surrogate"),
        pytest.param(lambda: {"epoch": 3}, "no tensors by name", id="no-tensors"),
        pytest.param(lambda: [torch.ones(3)], "no tensors by name", id="list"),
        pytest.param(lambda: {"x": torch.ones(3), "y": 2**9000}, "the instruction", id="long-number"),
    ],
)
def test_refuses_what_is_no_plain_state_dict(make: Callable[[], object], reason: str, tmp_path: Path) -> None:
    refused(zipped(make()), tmp_path, reason)
    assert not Path("/tmp/normserve-evil").exists()


def archived(entries: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def contents(state: object) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(zipped(state))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def changed(**changes: bytes | None) -> bytes:
    entries: dict[str, bytes | None] = {**contents({"x": torch.ones(6)})}
    entries |= {f"archive/{name.replace('__', '/')}": value for name, value in changes.items()}
    return archived({name: value for name, value in entries.items() if value is not None})


def scripted() -> bytes:
    entries = contents({"x": torch.ones(2)})
    return archived(entries | {"archive/code/__torch__.py": b"", "archive/constants.pkl": b"\x80\x02)."})


def twice() -> bytes:
    """The name of another entry of the same length, changed in both places."""
    content = archived(contents({"x": torch.ones(2)}) | {"archive/data.pkx": b""})
    return content.replace(b"data.pkx", b"data.pkl")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(
            lambda: archived(contents({"x": torch.ones(6)}), compression=zipfile.ZIP_DEFLATED),
            "compressed",
            id="deflated",
        ),
        pytest.param(twice, "'archive/data.pkl' twice", id="duplicate"),
        pytest.param(
            lambda: archived(contents({"x": torch.ones(2)}) | {"archive/../x": b""}), "leaves its folder", id="parent"
        ),
        pytest.param(lambda: archived(contents({"x": torch.ones(2)}) | {"/x": b""}), "leaves its folder", id="root"),
        pytest.param(scripted, "TorchScript archive, which holds a program", id="torchscript"),
        pytest.param(lambda: changed(byteorder=b"big"), "big-endian", id="byte-order"),
        pytest.param(lambda: changed(data__0=None), "lacks the storage '0'", id="missing-storage"),
        pytest.param(lambda: changed(data__0=b"\0" * 20), "has 20 bytes", id="short-storage"),
        pytest.param(lambda: zipped({"x": torch.ones(6)}) + b"tail", "bytes follow its directory", id="tail"),
        pytest.param(lambda: zipped({"x": torch.ones(6)})[:-5], "truncated", id="truncated"),
    ],
)
def test_refuses_damaged_archives(make: Callable[[], bytes], reason: str, tmp_path: Path) -> None:
    refused(make(), tmp_path, reason)


def with_pickle(content: bytes) -> bytes:
    entries = contents({"x": torch.ones(6)})
    return archived({"archive/data.pkl": content} | {name: entries[name] for name in list(entries)[1:]})


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"


def rebuilt(offset: bytes, shape: bytes, strides: bytes) -> bytes:
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + offset + shape + strides + b"\x89)tR"
    return with_pickle(b"\x80\x02}X\x01\x00\x00\x00x" + tensor + b"s.")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(rebuilt(b"K\x01", b"K\x06\x85", b"K\x01\x85"), "beyond its storage", id="offset"),
        pytest.param(
            rebuilt(b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"), "without a layout", id="negative-offset"
        ),
        pytest.param(rebuilt(b"K\x00", b"K\x07\x85", b"K\x01\x85"), "beyond its storage", id="size"),
        pytest.param(rebuilt(b"K\x00", b"K\x02\x85", b"K\x06\x85"), "beyond its storage", id="stride"),
        pytest.param(rebuilt(b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "no size", id="negative-stride"),
        pytest.param(rebuilt(b"K\x00", b"K\x02\x85", b")"), "without a layout", id="rank"),
        pytest.param(rebuilt(b"K\x00", b"X\x01\x00\x00\x00a\x85", b"K\x01\x85"), "'a' is no size", id="text"),
        pytest.param(rebuilt(b"N", b"K\x02\x85", b"K\x01\x85"), "without a layout", id="no-offset"),
        pytest.param(with_pickle(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."), r"'os\.system'", id="system"),
        pytest.param(with_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93."), r"'os\.system'", id="stack-global"),
        pytest.param(with_pickle(b"\x80\x02(K\x01ios\nsystem\n."), "the instruction b'i'", id="inst"),
        pytest.param(with_pickle(b"\x80\x02}}s."), "damaged", id="short-stack"),
        pytest.param(with_pickle(b"\x80\x02h\x07."), "damaged", id="memo"),
        pytest.param(with_pickle(b"\x80\x02."), "damaged", id="nothing"),
        pytest.param(with_pickle(b"\x80\x02}"), "ends early", id="no-stop"),
        pytest.param(with_pickle(b"\x80\x02X\xff\xff\xff\x7fa."), "ends early", id="long-text"),
        pytest.param(with_pickle(b"\x80\x00}."), "protocol 0", id="protocol"),
        pytest.param(with_pickle(b"\x80\x02" + b"}" * 3_300_000 + b"."), "more containers", id="containers"),
        pytest.param(with_pickle(b"\x80\x02K\x01K\x02R."), "damaged", id="call-number"),
        pytest.param(with_pickle(b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R."), "damaged", id="ordered-dict"),
        pytest.param(with_pickle(b"\x80\x02X\x01\x00\x00\x00aQ."), "no storage", id="persistent-id"),
    ],
)
def test_refuses_hostile_pickles(content: bytes, reason: str, tmp_path: Path) -> None:
    refused(content, tmp_path, reason)


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(zipped(STATE, _use_new_zipfile_serialization=False), "format before 1.6", id="legacy"),
        pytest.param(pickle.dumps({"a": 1}), r"torch\.save\(model\.state_dict\(\), path\)", id="pickle"),
        pytest.param(tarred(), "tar archive", id="tar"),
        pytest.param(archived({"readme.txt": b"hello"}), "no PyTorch checkpoint", id="zip"),
        pytest.param(b"", "no known format", id="empty"),
        pytest.param(b"\x08\x08\x12\x00", "may be an ONNX model", id="onnx"),
    ],
)
def test_other_formats_are_refused_with_advice(content: bytes, reason: str, tmp_path: Path) -> None:
    refused(content, tmp_path, reason)


def try_to_read(content: bytes, path: Path) -> None:
    """Either a file whose every tensor can be read, or a CheckpointError."""
    path.write_bytes(content)
    try:
        file = open_tensors(path, limits=TensorLimits(max_bytes=1 << 20))
    except CheckpointError:
        return
    for key in file.tensors:
        file.read(key)


SOUND = (safetensors.torch.save(STATE), zipped(STATE), zipped({"model": STATE, "n": 1}, pickle_protocol=4))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    which=st.integers(0, 2),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0, 1),
)
@example(which=1, edits=[], keep=0.999)
def test_damaged_bytes_never_raise_anything_else(
    which: int, edits: list[tuple[float, int]], keep: float, tmp_path: Path
) -> None:
    content = bytearray(SOUND[which])
    for place, value in edits:
        content[int(place * len(content))] = value
    length = len(content) if keep > 0.3 else int(keep / 0.3 * len(content))
    try_to_read(bytes(content[:length]), tmp_path / "file.bin")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.sampled_from(
            [bytes([code]) for code in b"\x80}])(tlduse0QRb.NKMJGXcqhr\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95a"]
        )
        | st.binary(max_size=4)
        | st.sampled_from([STORAGE, b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]),
        max_size=40,
    )
)
def test_random_pickles_never_raise_anything_else(pieces: list[bytes], tmp_path: Path) -> None:
    try_to_read(with_pickle(b"\x80\x02" + b"".join(pieces) + b"."), tmp_path / "file.bin")


@pytest.mark.parametrize("place", ["end", "directory"])
def test_every_number_of_the_directory_is_checked(place: str, tmp_path: Path) -> None:
    """Each 32-bit word of the zip's directory in turn, set to its extremes."""
    content = SOUND[1]
    start = content.index(b"PK\x01\x02")
    end = len(content) - 22
    for position in range(*((start, start + 140, 3) if place == "directory" else (end - 76, len(content) - 3, 2))):
        for value in (0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF):
            hostile = bytearray(content)
            struct.pack_into("<L", hostile, position, value)
            try_to_read(bytes(hostile), tmp_path / "file.bin")


def test_hostile_headers_take_bounded_memory(tmp_path: Path) -> None:
    """The densest files that the limits on headers let through."""
    limits = TensorLimits(max_header_bytes=1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in (
        header('{"a":[' + "{}," * 300_000 + "{}]}"),
        with_pickle(b"\x80\x02" + b"]" * 1_000_000 + b"."),
        with_pickle(b"\x80\x02" + b"K\x01" * 500_000 + b"."),
        with_pickle(b"\x80\x02]" + b"(" * 1_000_000 + b"."),
    ):
        with pytest.raises(CheckpointError):
            opened(content, tmp_path, limits=limits)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 100 * limits.max_header_bytes
