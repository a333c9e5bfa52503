"""Loading a `deploy` file into the class it came from; stands alone, so that it can be copied out."""

import inspect
import json

import torch
from safetensors import safe_open
from torch import nn


def load_folded(model: nn.Module, path: str) -> nn.Module:
    """Replace the folded batch norms of `model` by Identity, give their operators a bias, and load the file."""
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["normserve.manifest"])
        state = {key.removeprefix(manifest["prefix"]): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
    for fold in manifest["folds"]:
        norm, linear = model.get_submodule(fold["norm"]), model.get_submodule(fold["linear"])
        if not type(linear).__module__.startswith("torch.nn.") or type(norm).__name__ not in fold["norm_types"]:
            raise TypeError(f"{fold['norm']} or {fold['linear']} is of a class that does more than its keys say")
        if getattr(norm, "eps", fold["eps"]) != fold["eps"]:
            raise ValueError(f"{fold['norm']} has eps {norm.eps}, and was folded with {fold['eps']}")
        linear.bias = nn.Parameter(torch.zeros(fold["channels"]))
        model.set_submodule(fold["norm"], nn.Identity())
    model.load_state_dict(state, strict=True, assign=True)
    return model


def loader_source() -> str:
    """The Python above, as text."""
    imports = "import json\n\nimport torch\nfrom safetensors import safe_open\nfrom torch import nn\n\n\n"
    return imports + inspect.getsource(load_folded)


__all__ = ["load_folded", "loader_source"]
