"""Where a tensor lies in a body that is read as a stream: known from its first bytes, before the data is there."""

import math
from dataclasses import dataclass

import orjson

from service.codecs import oip
from service.codecs.buffers import Buffer, check_shape
from service.codecs.json_text import describe, expect_list, expect_object, expect_string, parse_object
from service.datatypes import BYTES, Datatype, by_name
from service.errors import PayloadMalformedError, PayloadTooLargeError

_MAX_JSON_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor's data in a body: from byte `offset` to the body's end, in C order of `shape`.

    Attributes:
        is_transposed: whether the tensor's own axes are those of `shape` reversed (Fortran order).
        is_swapped: whether its elements are in the other byte order.
    """

    datatype: Datatype
    shape: tuple[int, ...]
    offset: int
    is_transposed: bool = False
    is_swapped: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's own."""
        return self.shape[::-1] if self.is_transposed else self.shape

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.datatype.itemsize


def of_protocol(head: Buffer, json_length: int) -> TensorLayout | None:
    """The layout of the protocol's binary form with the one input `input`; None while the JSON is not all here."""
    if json_length > _MAX_JSON_BYTES:
        raise PayloadTooLargeError(f"{oip.HEADER}: expected at most {_MAX_JSON_BYTES}, received {json_length}")
    if len(head) < json_length:
        return None
    document = parse_object(memoryview(head)[:json_length])
    inputs = expect_list(document.get("inputs"), field="inputs")
    if len(inputs) != 1 or document.keys() != {"inputs"}:
        raise PayloadMalformedError(
            "body: expected an object of inputs, one of them (a mask goes with JSON, npz or safetensors), received "
            f"{orjson.dumps(list(document)).decode()[:80]} with {len(inputs)} inputs"
        )
    entry = expect_object(inputs[0], field="inputs[0]")
    if expect_string(entry.get("name"), field="inputs[0].name") != "input":
        raise PayloadMalformedError(f"inputs[0].name: expected 'input', received {describe(entry['name'])}")
    datatype = by_name(entry.get("datatype"), field="inputs[0].datatype")
    if datatype is BYTES:
        raise PayloadMalformedError("inputs[0].datatype: expected a number or BOOL, received BYTES")
    layout = TensorLayout(datatype, check_shape(entry.get("shape"), field="inputs[0].shape"), json_length)
    parameters = expect_object(entry.get("parameters"), field="inputs[0].parameters")
    if parameters.get("binary_data_size") != layout.data_bytes:
        raise PayloadMalformedError(
            f"inputs[0].parameters.binary_data_size: expected {layout.data_bytes} for {datatype.name} of shape "
            f"{list(layout.shape)}, received {describe(parameters.get('binary_data_size'))}"
        )
    return layout
