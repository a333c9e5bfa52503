"""What is written piece by piece is the model, whatever is in it."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from normcore.checkpoints.onnx_writer import serialize

_RNG = np.random.default_rng(0)


def _model(*weights: TensorProto) -> ModelProto:
    shape: list[str | int | None] = ["n", 64]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "network", ends[:1], ends[1:], list(weights))
    graph.doc_string = "of the graph"
    model = helper.make_model(graph, producer_name="someone", ir_version=8)
    helper.set_model_props(model, {"author": "somebody"})
    return model


def _weight(dtype: Any, *, shape: tuple[int, ...] = (64, 65)) -> TensorProto:
    weight = numpy_helper.from_array(_RNG.normal(size=shape).astype(dtype), np.dtype(dtype).name)
    weight.doc_string = "of the weight"
    return weight


def _typed() -> TensorProto:
    return helper.make_tensor("typed", TensorProto.FLOAT, [2048], np.arange(2048.0))


def _int4() -> TensorProto:
    return helper.make_tensor("four", TensorProto.INT4, [3000], _RNG.integers(-8, 8, 3000))


@pytest.mark.parametrize(
    "weights",
    [
        (),
        (_weight(np.float32),),
        (_weight(np.float32, shape=(3,)), _weight(np.float16), _weight(np.int64)),
        (_weight(ml_dtypes.bfloat16),),
        (_typed(),),
        (_int4(), _weight(np.float32, shape=(0, 2000))),
        (_weight(np.float32, shape=(500, 1100)),),
    ],
    ids=["none", "large", "several", "bfloat16", "typed", "int4", "a varint of four bytes"],
)
def test_pieces_are_the_model(weights: tuple[TensorProto, ...]) -> None:
    model = _model(*weights)
    content = b"".join(serialize(model))
    assert ModelProto.FromString(content) == model
    assert len(content) == len(model.SerializeToString())
    onnx.checker.check_model(content)


def test_large_weights_are_pieces_of_their_own() -> None:
    weight = _weight(np.float32)
    assert weight.raw_data in list(serialize(_model(weight)))


@pytest.mark.parametrize("where", ["model", "graph", "weight"])
def test_fields_of_a_newer_format_stay(where: str) -> None:
    model = _model(_weight(np.float32))
    message = {"model": model, "graph": model.graph, "weight": model.graph.initializer[0]}[where]
    field_1000 = b"\xc2\x3e\x05later"
    message.MergeFromString(field_1000)
    content = b"".join(serialize(model))
    assert field_1000 in content
    assert content == model.SerializeToString()


def test_a_weight_that_contradicts_its_shape_is_no_file() -> None:
    weight = _weight(np.float32)
    weight.dims[0] = 63
    with pytest.raises(ValueError, match="'float32': expected 16380 bytes, received 16640"):
        list(serialize(_model(weight)))
