import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike

from normcore.errors import DtypeError
from service.engine.protocol import Tensor
from service.engine.tensors import from_torch, to_torch

DTYPES = [
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "float32",
    "float64",
]


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (0, 2), ()], ids=str)
def test_round_trip_shares_memory(dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)

    tensor = to_torch(array)
    back = from_torch(tensor)

    assert tuple(tensor.shape) == shape
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    assert array.size == 0 or tensor.data_ptr() == array.ctypes.data == back.ctypes.data


def test_bfloat16_keeps_its_values() -> None:
    array = np.array([1.5, -2.0, np.inf], dtype=ml_dtypes.bfloat16)
    assert torch.equal(to_torch(array), torch.tensor([1.5, -2.0, torch.inf], dtype=torch.bfloat16))


def _read_only() -> Tensor:
    return np.frombuffer(np.arange(4, dtype=np.float32).tobytes(), dtype=np.float32)


def _misaligned() -> Tensor:
    return np.frombuffer(bytearray(1) + np.arange(4, dtype=np.float32).tobytes(), dtype=np.float32, offset=1)


def _field_of_records() -> Tensor:
    records: Tensor = np.zeros(4, dtype=[("flag", "u1"), ("value", "<f4")])
    records["value"] = np.arange(4)
    field: Tensor = records["value"]
    return field


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(_read_only(), id="read-only"),
        pytest.param(_misaligned(), id="misaligned"),
        pytest.param(np.arange(4, dtype=np.float32)[::-1][::-1][:4], id="reversed twice"),
        pytest.param(np.arange(3, -1, -1, dtype=np.float32)[::-1], id="reversed"),
        pytest.param(np.arange(4, dtype=">f4"), id="big-endian"),
        pytest.param(_field_of_records(), id="strides that are no multiple of the item"),
    ],
)
def test_memory_that_torch_cannot_share_is_copied(array: Tensor) -> None:
    tensor = to_torch(array)

    assert torch.equal(tensor, torch.arange(4, dtype=torch.float32))
    assert tensor.data_ptr() % 4 == 0


@pytest.mark.parametrize(
    "array",
    [np.array([b"text"], dtype=object), np.array([1j]), np.array(["text"]), np.array([1.0], dtype=np.longdouble)],
    ids=["BYTES", "complex", "str", "long double"],
)
def test_other_datatypes_are_refused_by_name(array: Tensor) -> None:
    with pytest.raises(DtypeError, match=r"^weight: expected a tensor of numbers"):
        to_torch(array, argument="weight")


def test_tensor_with_gradient_becomes_an_array() -> None:
    np.testing.assert_array_equal(from_torch(torch.ones(2, requires_grad=True) * 2), [2, 2])
