"""Small modules whose checkpoints are easy, or treacherous, to read; and the one judgement: run both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from normcore.folding.state_dict.fold import fold_state_dict
from normcore.folding.state_dict.loader import load_folded
from normcore.folding.state_dict.options import StateDictOptions
from normcore.folding.state_dict.report import StateDictReport


def trained(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """In eval mode, with running statistics as training leaves them: means of both signs, uneven variances."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_mean[0] = -1.0
            module.running_var.uniform_(0.01, 3, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.weight.data[0] *= -1
                module.bias.data.normal_(generator=generator)
    return model.eval()


def save(model: nn.Module | dict[str, Any], path: Path) -> Path:
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


class Pair(nn.Module):
    """conv -> bn with names that say so; `conv` may be any operator of `channels` outputs."""

    def __init__(self, conv: nn.Module, channels: int, *, affine: bool = True) -> None:
        super().__init__()
        self.conv = conv
        norms: dict[bool, type[nn.Module]] = {True: nn.BatchNorm1d, False: nn.BatchNorm2d}
        self.bn = norms[isinstance(conv, nn.Linear)](channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


def folded(
    model: nn.Module,
    folder: Path,
    build: Callable[[], nn.Module],
    *,
    suffix: str = ".pth",
    **options: Any,
) -> tuple[nn.Module, StateDictReport]:
    """The folded file loaded into another instance of the class, strictly."""
    source, target = save(model, folder / f"source{suffix}"), folder / "folded.safetensors"
    report = fold_state_dict(source, target, options=StateDictOptions(**options))
    other = build().to(next(model.parameters()).dtype)
    if not report.written:
        assert not target.exists()
        return model, report
    if report.form == "deploy":
        load_folded(other, str(target))
    else:
        other.load_state_dict(safetensors.torch.load_file(target), strict=True)
    return other.eval(), report


def difference(one: nn.Module, other: nn.Module, *inputs: Tensor) -> float:
    """max|one - other| / max|other| in float64."""
    doubles = [each.double() for each in inputs]
    with torch.inference_mode():
        expected = other.double()(*doubles)
        return float((one.double()(*doubles) - expected).abs().max() / expected.abs().max())
