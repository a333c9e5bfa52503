"""Loading a `deploy` file into the class it came from; stands alone, so that it can be copied out."""

import inspect
import json

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize

_IMPORTS = """\
import json

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrize
"""


def load_folded(model: nn.Module, path: str) -> nn.Module:
    """Replace the folded batch norms of `model` by Identity, give their operators a bias, and load the file."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["normserve.manifest"])
        state = {key.removeprefix(manifest["prefix"]): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    for name in manifest["baked"]:
        remove_reparametrization(model.get_submodule(name))
    for fold in manifest["folds"]:
        norm, linear = model.get_submodule(fold["norm"]), model.get_submodule(fold["linear"])
        if not type(linear).__module__.startswith("torch.nn.") or type(norm).__name__ not in fold["norm_types"]:
            raise TypeError(f"{fold['norm']} or {fold['linear']} is of a class that does more than its keys say")
        if getattr(norm, "eps", fold["eps"]) != fold["eps"]:
            raise ValueError(f"{fold['norm']} has eps {norm.eps}, and was folded with {fold['eps']}")
        linear.bias = nn.Parameter(torch.zeros(fold["channels"]))
        model.set_submodule(fold["norm"], nn.Identity())
    versioned = model.state_dict()  # carries the versions of the modules, which some classes ask for
    versioned.clear()
    versioned.update(state)
    model.load_state_dict(versioned, strict=True, assign=True)
    return model


def remove_reparametrization(linear: nn.Module) -> None:
    """Weight norm and spectral norm, of either style, to a plain weight."""
    if parametrize.is_parametrized(linear):
        parametrize.remove_parametrizations(linear, "weight")
    elif hasattr(linear, "weight_g"):
        nn.utils.remove_weight_norm(linear)
    elif hasattr(linear, "weight_orig"):
        nn.utils.remove_spectral_norm(linear)
        linear._load_state_dict_pre_hooks.clear()  # torch leaves its own behind, which asks for weight_orig


def loader_source() -> str:
    """The Python above, as text."""
    parts = (_IMPORTS, inspect.getsource(load_folded), inspect.getsource(remove_reparametrization))
    return "\n\n".join(parts)


__all__ = ["load_folded", "loader_source"]
