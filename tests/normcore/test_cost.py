from pathlib import Path

import pytest
from onnx import ModelProto

from normcore.checkpoints.onnx import load_onnx
from normcore.cost import is_cost_known
from tests.service.engine import graphs


def test_the_cost_of_a_convolutional_network_is_known(ocr_cls: Path) -> None:
    assert is_cost_known(load_onnx(ocr_cls))


@pytest.mark.parametrize(
    "model",
    [graphs.endless_loop(), graphs.memory_bomb(side=2), graphs.repeated_as_often_as_the_input_says()],
    ids=lambda model: model.graph.name,
)
def test_the_cost_of_what_data_decide_is_not(model: ModelProto) -> None:
    assert not is_cost_known(model)
