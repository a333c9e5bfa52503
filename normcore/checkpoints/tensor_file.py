"""One door for files of named tensors: what the content is decides who reads it."""

from pathlib import Path

from normcore.checkpoints.formats import HEAD_BYTES, TENSOR_ADVICE, sniff
from normcore.checkpoints.safetensors import open_safetensors
from normcore.checkpoints.tensors import TensorFile, TensorLimits
from normcore.checkpoints.torch_zip import open_torch_zip
from normcore.errors import CheckpointError, FoldError

_DEFAULT_LIMITS = TensorLimits()


def open_tensors(path: Path, *, limits: TensorLimits = _DEFAULT_LIMITS, group: str | None = None) -> TensorFile:
    """The tensors of a safetensors file or a PyTorch checkpoint, described without reading them.

    Args:
        path: file of any name and origin.
        limits: what the file may declare.
        group: which state_dict to take where a PyTorch checkpoint has several, such as `model` or `ema`.

    Raises:
        CheckpointError: the file is something else, damaged, or larger than allowed.
        FoldError: the group does not exist.
    """
    with path.open("rb") as file:
        found = sniff(file.read(HEAD_BYTES))
    if found == "torch_zip":
        return open_torch_zip(path, limits=limits, group=group)
    if found != "safetensors":
        raise CheckpointError(TENSOR_ADVICE[found])
    if group is not None:
        raise FoldError("group: a safetensors file has no groups")
    return open_safetensors(path, limits=limits)


__all__ = ["open_tensors"]
