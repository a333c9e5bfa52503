import numpy as np
import pytest
import safetensors.numpy
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from service import datatypes
from service.datatypes import BYTES, DATATYPES, Datatype
from service.errors import PayloadMalformedError, UnsupportedError
from tests.service.codecs.strategies import NUMERIC

by_datatype = pytest.mark.parametrize("datatype", DATATYPES, ids=lambda datatype: datatype.name)


@by_datatype
def test_names_agree_with_the_protocol_client(datatype: Datatype) -> None:
    assert np_to_triton_dtype(datatype.numpy) == datatype.name
    assert triton_to_np_dtype(datatype.name) == datatype.numpy
    assert datatypes.by_name(datatype.name) is datatype
    assert datatypes.of(np.empty(0, datatype.numpy)) is datatype


@pytest.mark.parametrize("datatype", NUMERIC, ids=lambda datatype: datatype.name)
def test_itemsize_and_safetensors_names_agree_with_their_libraries(datatype: Datatype) -> None:
    assert datatype.itemsize == datatype.numpy.itemsize
    saved = safetensors.numpy.save({"x": np.zeros(1, datatype.numpy)})
    assert f'"dtype":"{datatype.safetensors}"'.encode() in saved


def test_triton_names_are_type_and_the_name_but_for_strings() -> None:
    assert BYTES.triton == "TYPE_STRING"
    assert [row.triton for row in NUMERIC] == [f"TYPE_{row.name}" for row in NUMERIC]


@pytest.mark.parametrize("name", ["FP8", "fp32", "", None, 7, ["FP32"]], ids=repr)
def test_by_name_refuses_unknown_names_and_lists_the_known(name: object) -> None:
    with pytest.raises(
        PayloadMalformedError, match=r"input 'x'.datatype: expected one of BOOL, UINT8, .*BYTES, received"
    ):
        datatypes.by_name(name, field="input 'x'.datatype")


@pytest.mark.parametrize("dtype", ["complex64", ">f4", "datetime64[s]"])
def test_of_refuses_numpy_types_without_a_name(dtype: str) -> None:
    with pytest.raises(UnsupportedError, match="expected one of BOOL"):
        datatypes.of(np.zeros(1, dtype))
