"""What a codec takes and gives: named tensors with parameters in, chunks of bytes out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from service.codecs.buffers import Buffer
from service.engine.protocol import ParameterValue, Tensor, Tensors
from service.errors import PayloadMalformedError


@dataclass(frozen=True, slots=True)
class TensorBody:
    """A decoded /v1 request. `outputs` None means all that apply."""

    tensors: dict[str, Tensor]
    parameters: dict[str, ParameterValue]
    outputs: tuple[str, ...] | None = None


class EncodedBody(NamedTuple):
    """A response body in chunks to be joined once. `json_length`: of the JSON before binary tensors, None without."""

    chunks: list[bytes | memoryview]
    content_type: str
    json_length: int | None = None
    headers: Mapping[str, str] = MappingProxyType({})

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.chunks))


class Codec(Protocol):
    """A media type of tensor bodies on /v1; a module of this package is one."""

    MEDIA_TYPE: str
    ONLY_OUTPUT: str | None

    def decode(
        self, body: Buffer, /, *, tensor_names: Collection[str], query_parameters: Mapping[str, str]
    ) -> TensorBody:
        """Read named tensors. Raises PayloadMalformedError or PayloadTooLargeError."""
        ...

    def encode(self, method: str, outputs: Tensors, diagnostics: Mapping[str, object]) -> EncodedBody:
        """Write named outputs. Raises NotAcceptableError where the format cannot hold them."""
        ...


def from_query(
    tensors: dict[str, Tensor], *, tensor_names: Collection[str], query_parameters: Mapping[str, str]
) -> TensorBody:
    """Complete the tensors of a format without room for parameters with those of the query string."""
    for name in tensors:
        if name not in tensor_names:
            raise PayloadMalformedError(f"tensor {name[:60]!r}: expected one of {', '.join(sorted(tensor_names))}")
    parameters: dict[str, ParameterValue] = {name: text for name, text in query_parameters.items() if name != "outputs"}
    selected = tuple(part for name in query_parameters.get("outputs", "").split(",") if (part := name.strip()))
    return TensorBody(tensors, parameters, selected or None)
