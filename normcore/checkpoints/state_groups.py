"""Which of a checkpoint's dictionaries is the model's: training scripts wrap it in others."""

from collections.abc import Iterator
from dataclasses import dataclass

from normcore.checkpoints.tensors import Tensor, TensorLimits, check_name, quote
from normcore.errors import CheckpointError, FoldError

_MAX_DEPTH = 3
_TRAINING = ("optim", "scheduler", "lr_scheduler", "scaler")


@dataclass(frozen=True, slots=True)
class Group:
    """One state_dict; `name` is its path in the file, empty at the top."""

    name: str
    tensors: dict[str, Tensor]
    other: tuple[str, ...]
    notes: tuple[str, ...]


def choose_group(root: object, *, group: str | None, limits: TensorLimits) -> Group:
    """The one state_dict of a checkpoint, or the one the caller names.

    Raises:
        CheckpointError: there is none, or there are several and none was named.
        FoldError: the named one does not exist.
    """
    if type(root) is Tensor:
        raise CheckpointError("the file holds a single tensor; save model.state_dict()")
    groups = dict(_groups(root))
    if group is not None:
        if group not in groups:
            raise FoldError(f"group: the checkpoint has no group {quote(group)}; it has {_listed(list(groups))}")
        name = group
    else:
        name = _only(groups)
    tensors, dropped = groups[name]
    if len(tensors) > limits.max_tensors:
        raise CheckpointError(f"the file names {len(tensors)} tensors, more than the {limits.max_tensors} allowed")
    for key in tensors:
        check_name(key)
    notes = [f"{dropped} entries beside the tensors are left out"] if dropped else []
    other = tuple(each for each in groups if each != name)
    return Group(name, tensors, other, tuple(notes))


def _groups(root: object) -> Iterator[tuple[str, tuple[dict[str, Tensor], int]]]:
    """Every dictionary, down to a few levels, that maps texts to tensors; and how many other entries it has."""
    pending: list[tuple[str, object, int]] = [("", root, 0)]
    seen: set[int] = set()
    while pending:
        name, value, depth = pending.pop(0)
        if type(value) is not dict or id(value) in seen:
            continue
        seen.add(id(value))
        tensors = {key: entry for key, entry in value.items() if type(key) is str and type(entry) is Tensor}
        if tensors:
            yield name, (tensors, len(value) - len(tensors))
        if depth < _MAX_DEPTH:
            pending += [
                (f"{name}.{key}" if name else key, entry, depth + 1)
                for key, entry in value.items()
                if type(key) is str and type(entry) is dict
            ]


def _only(groups: dict[str, tuple[dict[str, Tensor], int]]) -> str:
    models = [name for name in groups if not any(part.startswith(_TRAINING) for part in name.split("."))]
    if not models:
        raise CheckpointError("the checkpoint holds no tensors by name; save model.state_dict()")
    if len(models) > 1:
        raise CheckpointError(
            f"the checkpoint holds several groups of tensors ({_listed(models)}); name the one to read as `group`"
        )
    return models[0]


def _listed(names: list[str]) -> str:
    shown = ", ".join(quote(name) if name else "the top level ''" for name in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


__all__ = ["Group", "choose_group"]
