"""The proof of a known class rejects a file that is wrong anywhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from normcore.checkpoints.tensors import TensorLimits
from normcore.folding.state_dict.fold import fold_state_dict
from normcore.folding.state_dict.options import StateDictOptions
from normcore.folding.state_dict.proof import prove
from normcore.folding.state_dict.report import Proof
from normcore.folding.state_dict.study import Study, study
from tests.normcore.folding.state_dict.networks import save
from tests.normcore.folding.state_dict.test_architectures import build

OPTIONS = StateDictOptions(architecture="torchvision/resnet18", form="shape_preserving")


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("resnet")
    source, target = save(build("resnet18"), folder / "in.pth"), folder / "out.safetensors"
    fold_state_dict(source, target, options=OPTIONS)
    return study(source, limits=TensorLimits(), options=OPTIONS), target


def verdict(known: Study, folded: Path) -> Proof:
    assert known.architecture is not None
    return prove(
        known.architecture, known.source, folded, list(known.folds.values()), prefix="", form="shape_preserving"
    )


def scaled(state: dict[str, Tensor]) -> None:
    state["layer2.0.conv1.weight"][3] *= 1.01


def swapped(state: dict[str, Tensor]) -> None:
    state["layer3.0.conv2.weight"][:2] = state["layer3.0.conv2.weight"][:2].flip(0).clone()


def unshifted(state: dict[str, Tensor]) -> None:
    state["layer1.0.bn1.bias"][5] = 0


def other_eps(state: dict[str, Tensor]) -> None:
    state["bn1.weight"] *= torch.sqrt(torch.tensor(1.001 / 1.00001))


def not_a_number_at_first(state: dict[str, Tensor]) -> None:
    """Later pairs are right, which must not make up for it."""
    state["conv1.weight"][0, 0, 0, 0] = float("nan")


def not_a_number(state: dict[str, Tensor]) -> None:
    state["layer4.1.conv2.weight"][0, 0, 0, 0] = float("nan")


def test_accepts_the_fold(fold: tuple[Study, Path]) -> None:
    proof = verdict(*fold)
    assert proof.verdict == "equivalent"
    assert proof.pairs == 20
    assert 0 < proof.pair_error < 1


@pytest.mark.parametrize("mutate", [scaled, swapped, unshifted, other_eps, not_a_number, not_a_number_at_first])
def test_rejects_mutants(mutate: Callable[[dict[str, Tensor]], None], fold: tuple[Study, Path], tmp_path: Path) -> None:
    known, target = fold
    state = safetensors.torch.load_file(target)
    mutate(state)
    proof = verdict(known, save(state, tmp_path / "mutant.safetensors"))
    assert proof.verdict == "different"
    assert "times what rounding its stored weights allows" in proof.sentence
