"""A tensor body as a stream: its head says what comes, its data goes to a sink piece by piece."""

from collections.abc import AsyncIterator, Callable
from typing import Protocol

from service.codecs.layout import TensorLayout
from service.errors import PayloadMalformedError

FindLayout = Callable[[bytearray], TensorLayout | None]


class Sink(Protocol):
    """Takes the data of a tensor, and holds the sender back while it is behind."""

    async def write(self, piece: bytes, /) -> None: ...


async def read_head(chunks: AsyncIterator[bytes], find: FindLayout) -> tuple[TensorLayout, bytes, bytes]:
    """The layout, the bytes before the data, and what of the data came with them."""
    head = bytearray()
    async for chunk in chunks:
        head += chunk
        layout = find(head)
        if layout is not None:
            return layout, bytes(head[: layout.offset]), bytes(head[layout.offset :])
    raise PayloadMalformedError(f"body: expected a tensor, received {len(head)} bytes, which is not a whole head")


async def pour(chunks: AsyncIterator[bytes], sink: Sink, layout: TensorLayout, *, first: bytes) -> None:
    """Hand the data to the sink: `first`, then what comes; it has to be exactly the layout's."""
    received_bytes = 0
    piece: bytes | None = first
    while piece is not None:
        received_bytes += len(piece)
        if received_bytes > layout.data_bytes:
            raise _wrong_size(layout, f"{received_bytes} or more")
        await sink.write(piece)
        piece = await anext(chunks, None)
    if received_bytes < layout.data_bytes:
        raise _wrong_size(layout, str(received_bytes))


def _wrong_size(layout: TensorLayout, received: str) -> PayloadMalformedError:
    return PayloadMalformedError(
        f"body: expected {layout.data_bytes} bytes for {layout.datatype.name} of shape {list(layout.tensor_shape)}, "
        f"received {received}"
    )
