"""Which modules a state_dict's keys belong to: batch norms by their statistics, linear operators by their weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from normcore.checkpoints.tensors import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")

Recipe = Literal["plain", "weight_norm", "spectral_norm"]

_RECIPES: tuple[tuple[Recipe, tuple[str, ...]], ...] = (
    ("weight_norm", ("weight_g", "weight_v")),
    ("weight_norm", ("parametrizations.weight.original0", "parametrizations.weight.original1")),
    ("spectral_norm", ("weight_orig", "weight_u", "weight_v")),
    (
        "spectral_norm",
        ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"),
    ),
    ("plain", ("weight",)),
)
_NORM_KEYS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm: a module with running statistics; `keys` are all that the file has of it."""

    name: str
    running_mean: str
    running_var: str
    weight: str | None
    bias: str | None
    num_batches_tracked: str | None
    keys: tuple[str, ...]
    num_features: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Linear:
    """A module with a weight of rank 2 or more: a linear layer or a convolution; nothing says which.

    Attributes:
        recipe: how the weight is stored: as it is, or as the parts that a reparametrization computes it from.
        parts: keys of the weight, or of those parts.
        shape: of the weight that takes part in the computation.
        problem: why nothing folds into it.
    """

    name: str
    recipe: Recipe
    parts: tuple[str, ...]
    bias: str | None
    shape: tuple[int, ...]
    datatype: str
    problem: str | None

    @property
    def weight(self) -> str:
        """The key that a plain weight has, or will have."""
        return self.parts[0] if self.recipe == "plain" else join(self.name, "weight")

    @property
    def keys(self) -> tuple[str, ...]:
        return self.parts if self.bias is None else (*self.parts, self.bias)


@dataclass(frozen=True, slots=True)
class Modules:
    """All modules of a state_dict that a fold knows, each group in the file's order.

    Attributes:
        positions: place of each module with tensors, in the order of first appearance.
    """

    norms: Mapping[str, Norm]
    linears: Mapping[str, Linear]
    positions: Mapping[str, int]


def find_modules(tensors: Mapping[str, Tensor]) -> Modules:
    """Modules by the prefix of their keys."""
    keys: dict[str, list[str]] = {}
    for key in tensors:
        keys.setdefault(module_of(key), []).append(key)
    norms, linears = {}, {}
    for name, own in keys.items():
        norm = _norm(name, own, tensors)
        if norm is not None:
            norms[name] = norm
            continue
        linear = _linear(name, own, tensors)
        if linear is not None:
            linears[name] = linear
    return Modules(norms, linears, {name: place for place, name in enumerate(keys)})


def module_of(key: str) -> str:
    """The module that a tensor belongs to; parametrizations belong to the module they serve."""
    head, marker, _ = key.partition("parametrizations.")
    if marker and (not head or head.endswith(".")):
        return head.removesuffix(".")
    return key.rpartition(".")[0]


def join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def parent_of(module: str) -> str:
    return module.rpartition(".")[0]


def leaf_of(module: str) -> str:
    return module.rpartition(".")[2]


def _norm(name: str, own: Sequence[str], tensors: Mapping[str, Tensor]) -> Norm | None:
    keys = {leaf: join(name, leaf) for leaf in _NORM_KEYS if join(name, leaf) in tensors}
    if "running_mean" not in keys and "running_var" not in keys:
        return None
    mean = tensors.get(join(name, "running_mean"))
    shape = mean.shape if mean is not None else tensors[keys["running_var"]].shape
    vectors = {leaf: tensors[key] for leaf, key in keys.items() if leaf != "num_batches_tracked"}
    problem = None
    if len(keys.keys() & {"running_mean", "running_var"}) == 1:
        problem = "it has only one of running_mean and running_var"
    elif len(shape) != 1 or any(vector.shape != shape for vector in vectors.values()):
        shapes = {leaf: list(vector.shape) for leaf, vector in vectors.items()}
        problem = f"its parameters are not vectors of one length: {shapes}"
    elif any(vector.datatype not in FLOATS for vector in vectors.values()):
        problem = "its parameters are not all floating point"
    elif set(own) - set(keys.values()):
        problem = f"it is no plain batch norm: it also has {_listed(set(own) - set(keys.values()))}"
    return Norm(
        name=name,
        running_mean=join(name, "running_mean"),
        running_var=join(name, "running_var"),
        weight=keys.get("weight"),
        bias=keys.get("bias"),
        num_batches_tracked=keys.get("num_batches_tracked"),
        keys=tuple(keys.values()),
        num_features=shape[0] if shape else 0,
        problem=problem,
    )


def _linear(name: str, own: Sequence[str], tensors: Mapping[str, Tensor]) -> Linear | None:
    for recipe, leaves in _RECIPES:
        parts = tuple(join(name, leaf) for leaf in leaves)
        if not all(part in tensors for part in parts):
            continue
        main = tensors[parts[1] if recipe == "weight_norm" else parts[0]]
        if len(main.shape) < 2 or not all(main.shape):
            continue
        bias = join(name, "bias") if join(name, "bias") in tensors else None
        extra = set(own) - {*parts, bias}
        problem = None
        if extra:
            problem = f"{name} also has {_listed(extra)}, so its weight may be computed in a way that no key tells"
        elif any(tensors[part].datatype not in FLOATS for part in parts):
            problem = f"{name} has a weight of datatype {main.datatype}, and only floating point weights fold"
        elif bias is not None and (len(tensors[bias].shape) != 1 or tensors[bias].datatype not in FLOATS):
            problem = f"{name} has a bias that is no floating point vector"
        return Linear(name, recipe, parts, bias, main.shape, main.datatype, problem)
    return None


def _listed(keys: Collection[str]) -> str:
    return ", ".join(sorted(keys)[:4])


__all__ = ["FLOATS", "Linear", "Modules", "Norm", "Recipe", "find_modules", "join", "leaf_of", "module_of", "parent_of"]
