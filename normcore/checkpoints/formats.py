"""What a file is, told by its first bytes and never by its name."""

from typing import Literal

Format = Literal["onnx", "safetensors", "torch_zip", "pickle", "tar", "exported_program", "zip", "unknown"]

HEAD_BYTES = 512
"""How many bytes of a file `sniff` wants."""

ADVICE: dict[Format, str] = {
    "safetensors": "this is a safetensors file, which holds tensors without a graph; export the model to ONNX",
    "torch_zip": "this is a PyTorch checkpoint (torch.save), which holds tensors without a graph; "
    "export the model to ONNX",
    "pickle": "this is a Python pickle; export the model to ONNX",
    "tar": "this is a tar archive, PyTorch's format before 2017; export the model to ONNX",
    "exported_program": "this is a PyTorch exported program (.pt2); export the model to ONNX",
    "zip": "this is a zip archive; upload the ONNX file itself",
    "unknown": "the content is of no known format; upload an ONNX model, a safetensors file or a PyTorch checkpoint",
}
"""What to tell the owner of a file that is not ONNX."""

_RESAVE = (
    "load it where you trust it and save the tensors alone, torch.save(model.state_dict(), path) with torch 1.6 or "
    "later, or as safetensors; or export the model to ONNX"
)
TENSOR_ADVICE: dict[Format, str] = {
    "onnx": "this may be an ONNX model, which has a graph and is folded as such",
    "pickle": f"this is a Python pickle (PyTorch's format before 1.6), which is never loaded; {_RESAVE}",
    "tar": f"this is a tar archive (PyTorch's format before 2017), which is never loaded; {_RESAVE}",
    "exported_program": f"this is a PyTorch exported program (.pt2), which is never loaded; {_RESAVE}",
    "zip": f"this is a zip archive, but no PyTorch checkpoint; {_RESAVE}",
    "unknown": "the content is of no known format; upload a safetensors file, a PyTorch checkpoint or an ONNX model",
}
"""What to tell the owner of a file that holds no named tensors."""

_FIRST_ENTRY_NAME = 30
_MODEL_PROTO_FIRST_TAGS = b"\x08\x12\x1a\x22\x28\x32\x3a\x42\x72\xa2\xca\xd2"


def sniff(head: bytes) -> Format:
    r"""Format of a file from its first `HEAD_BYTES` bytes.

    ONNX has no magic number: a file counts as ONNX when it may be the start of a model message, and the parser
    decides.

    >>> sniff(b"\x80\x02}q")
    'pickle'
    """
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(head)
    if _is_safetensors(head):  # before pickle: the length of its header may look like a pickle's first instructions
        return "safetensors"
    if head[257:262] == b"ustar":
        return "tar"
    if _is_pickle(head):
        return "pickle"
    if head[:1] and head[0] in _MODEL_PROTO_FIRST_TAGS:
        return "onnx"
    return "unknown"


def _sniff_zip(head: bytes) -> Format:
    """The name of the first entry tells torch's archives apart: NAME/data.pkl, NAME/data/weights/weight_0, ...

    TorchScript begins with NAME/data/0; who reads PyTorch checkpoints knows what to say of it.
    """
    length = int.from_bytes(head[26:28], "little")
    entry = head[_FIRST_ENTRY_NAME : _FIRST_ENTRY_NAME + length]
    inner = entry.partition(b"/")[2]
    if inner == b"data.pkl":
        return "torch_zip"
    if inner.startswith((b"data/weights/", b"data/constants/", b"models/", b"archive_")):
        return "exported_program"
    if inner.startswith(b"data/"):
        return "torch_zip"
    return "zip"


def _is_pickle(head: bytes) -> bool:
    """Protocol 2 and later open with the PROTO opcode; 0 and 1 with a mark, a global or a container."""
    if head[:1] == b"\x80":
        return head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    return head[:2] in (b"(d", b"(l", b"(i", b"cc", b"]q", b"}q") or head.startswith(b"c__")


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of header length, then the header, which is a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


__all__ = ["ADVICE", "HEAD_BYTES", "TENSOR_ADVICE", "Format", "sniff"]
