"""torch.save's zip archives: a pickle that names tensors, and one stored entry per storage.

torch.load is never used: the archive's directory, the pickle and every tensor's layout are checked here, and the
tensors' bytes stay in the file until somebody reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from normcore.checkpoints.pickle_machine import PickleMachine
from normcore.checkpoints.state_groups import choose_group
from normcore.checkpoints.tensors import (
    DATATYPES,
    Tensor,
    TensorFile,
    TensorLimits,
    check_shape,
    check_total,
    quote,
)
from normcore.checkpoints.zip_directory import ZipEntry, read_directory
from normcore.errors import CheckpointError

_CONTAINERS_PER_TENSOR = 16  # 6 for a tensor, 9 for a parameter, 1 for its module's version
_RESAVE = "save the tensors alone: torch.save(model.state_dict(), path)"
_ONNX = "or export the model to ONNX"
_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "ComplexFloatStorage": "C64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_REFUSED = {
    "torch._utils _rebuild_qtensor": "a quantized tensor; save the model before it is quantized",
    "torch._utils _rebuild_sparse_tensor": "a sparse tensor; call .to_dense() before saving",
    "torch._utils _rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "torch._utils _rebuild_wrapper_subclass": "a tensor subclass; save plain tensors",
    "torch._utils _rebuild_nested_tensor": "a nested tensor; save plain tensors",
    "torch._tensor _rebuild_from_type_v2": "a tensor subclass; save plain tensors",
    "torch._utils _rebuild_device_tensor_from_numpy": "a tensor of another device; call .cpu() before saving",
    "torch._utils _rebuild_tensor_v3": "a tensor whose datatype has no storage class (an unsigned or 8-bit float one)",
}


@dataclass(frozen=True, slots=True)
class _StorageType:
    datatype: str | None  # None: untyped, counted in bytes


@dataclass(frozen=True, slots=True)
class _Storage:
    entry: ZipEntry
    datatype: str | None


class _Opaque:
    """Stands for a value that is no tensor and no plain data, such as a torch.dtype."""


def open_torch_zip(path: Path, *, limits: TensorLimits, group: str | None = None) -> TensorFile:
    """Where every tensor of a saved state_dict lies, once the archive is known to be sound.

    Args:
        path: a file that `torch.save` wrote in its zip format.
        limits: what the file may declare.
        group: which state_dict to take where the file has several, such as `model` or `ema`.

    Raises:
        CheckpointError: the archive is damaged, holds anything but plain data, or declares tensors that its storages
            do not cover one to one.
    """
    with path.open("rb") as file:
        entries = read_directory(file, max_entries=limits.max_tensors + 100)
        prefix = _find_prefix(entries)
        content = _read_pickle(file, entries[f"{prefix}data.pkl"], limits)
        _check_byte_order(file, entries.get(f"{prefix}byteorder"))
    builder = _Builder(entries, prefix)
    machine = PickleMachine(
        content,
        max_containers=_CONTAINERS_PER_TENSOR * (limits.max_tensors + 100),
        globals=builder.globals,
        refuse=_refuse_global,
        persistent=builder.persistent,
    )
    chosen = choose_group(machine.run(), group=group, limits=limits)
    check_total(chosen.tensors, limits)
    return TensorFile(
        path=path,
        format="torch_zip",
        tensors=chosen.tensors,
        keeps_order=True,
        group=chosen.name,
        other=chosen.other,
        notes=chosen.notes,
    )


def _find_prefix(entries: Mapping[str, ZipEntry]) -> str:
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"the archive has no single data.pkl and is no PyTorch checkpoint; {_RESAVE}")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries or any(name.startswith(f"{prefix}code/") for name in entries):
        raise CheckpointError(
            f"this is a TorchScript archive, which holds a program; load it with torch.jit.load and {_RESAVE}, {_ONNX}"
        )
    return prefix


def _read_pickle(file: BinaryIO, entry: ZipEntry, limits: TensorLimits) -> bytes:
    if entry.size > limits.max_header_bytes:
        raise CheckpointError(
            f"the checkpoint's data.pkl has {entry.size} bytes, more than the {limits.max_header_bytes} allowed; "
            f"{_RESAVE}"
        )
    file.seek(entry.offset)
    return file.read(entry.size)


def _check_byte_order(file: BinaryIO, entry: ZipEntry | None) -> None:
    if entry is None:
        return
    file.seek(entry.offset)
    if file.read(min(entry.size, 16)) != b"little":
        raise CheckpointError("the checkpoint was saved in big-endian byte order; save it again on a usual machine")


def _refuse_global(path: str) -> NoReturn:
    if path in _REFUSED:
        raise CheckpointError(f"the checkpoint holds {_REFUSED[path]}, {_ONNX}")
    raise CheckpointError(
        f"the checkpoint holds Python objects ({quote(path.replace(' ', '.'))}), which are never loaded; "
        f"{_RESAVE}, {_ONNX}"
    )


class _Builder:
    """What the pickle may call, bound to one archive."""

    def __init__(self, entries: Mapping[str, ZipEntry], prefix: str) -> None:
        self._entries = entries
        self._prefix = prefix
        self.globals: dict[str, object] = {
            "collections OrderedDict": _ordered_dict,
            "torch Size": _only_argument,
            "torch._utils _rebuild_tensor_v2": self._tensor,
            "torch._utils _rebuild_parameter": _parameter,
            "torch.storage UntypedStorage": _StorageType(None),
        }
        self.globals |= {f"torch {name}": _StorageType(datatype) for name, datatype in _STORAGES.items()}
        opaque = _Opaque()
        names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
        self.globals |= {f"torch {name}": opaque for name in names}

    def persistent(self, pid: object) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise CheckpointError("the pickle of the checkpoint is damaged: a persistent id is no storage")
        _, kind, key, location, elements = pid
        if type(kind) is not _StorageType or type(key) is not str or type(elements) is not int:
            raise CheckpointError("the pickle of the checkpoint is damaged: a persistent id is no storage")
        if location == "meta":
            raise CheckpointError("the checkpoint holds a tensor on the meta device, which has no values")
        entry = self._entries.get(f"{self._prefix}data/{key}")
        if entry is None:
            raise CheckpointError(f"the archive lacks the storage {quote(key)} that its pickle names")
        itemsize = DATATYPES[kind.datatype].itemsize if kind.datatype else 1
        if elements * itemsize != entry.size:
            raise CheckpointError(
                f"storage {quote(key)} should have {elements} elements of {itemsize} bytes, and has {entry.size} bytes"
            )
        return _Storage(entry, kind.datatype)

    def _tensor(self, arguments: tuple[Any, ...]) -> Tensor:
        """_rebuild_tensor_v2(storage, storage_offset, size, stride, requires_grad, backward_hooks[, metadata])."""
        if len(arguments) not in (6, 7) or type(arguments[0]) is not _Storage:
            raise CheckpointError("the pickle of the checkpoint is damaged: a tensor without a storage")
        storage, start, shape, strides = arguments[:4]
        if storage.datatype is None:
            raise CheckpointError("the checkpoint holds a tensor on an untyped storage")
        if len(arguments) == 7 and arguments[6]:
            raise CheckpointError("the checkpoint holds a tensor marked as conjugated or negated; save .clone() of it")
        sizes = check_shape("of the checkpoint", shape)
        steps = check_shape("of the checkpoint", strides)
        if type(start) is not int or start < 0 or len(steps) != len(sizes):
            raise CheckpointError("the pickle of the checkpoint is damaged: a tensor without a layout")
        itemsize = DATATYPES[storage.datatype].itemsize
        tensor = Tensor(storage.datatype, sizes, storage.entry.offset + start * itemsize, steps)
        _check_layout(tensor)
        if tensor.elements and start * itemsize + tensor.span_bytes > storage.entry.size:
            raise CheckpointError(f"a tensor of shape {list(sizes)} reaches beyond its storage")
        return tensor


def _check_layout(tensor: Tensor) -> None:
    """Every element has bytes of its own: a stride of 0 makes a terabyte out of a kilobyte."""
    expected = 1
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size <= 1:
            continue
        if stride < expected:
            raise CheckpointError(
                f"a tensor of shape {list(tensor.shape)} is an expanded view (strides {list(tensor.strides)}); "
                "save .contiguous() of it"
            )
        expected = stride * size


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """OrderedDict() or OrderedDict([[key, value], ...])."""
    found: dict[Any, Any] = {}
    for pair in arguments[0] if arguments else ():
        key, value = pair
        if type(key) is not str:
            raise CheckpointError("the pickle of the checkpoint is damaged: an OrderedDict with a key that is no text")
        found[key] = value
    return found


def _only_argument(arguments: tuple[Any, ...]) -> object:
    return arguments[0] if arguments else ()


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    """_rebuild_parameter(data, requires_grad, backward_hooks)."""
    if len(arguments) != 3 or type(arguments[0]) is not Tensor:
        raise CheckpointError("the pickle of the checkpoint is damaged: a parameter without a tensor")
    return arguments[0]


__all__ = ["open_torch_zip"]
