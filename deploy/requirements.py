"""Prints what the image installs: pyproject.toml's packages, of the two onnxruntimes the device's, and tracing.

Usage: python requirements.py cpu|gpu, in the folder of pyproject.toml and constraints.txt.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(device: str, project: str, constraints: str) -> list[str]:
    """The requirements of an image. Raises ValueError for another word than cpu or gpu."""
    if device not in ("cpu", "gpu"):
        raise ValueError(f"DEVICE: expected cpu or gpu, received {device!r}")
    document = tomllib.loads(project)["project"]
    found = [*document["dependencies"], *document["optional-dependencies"]["tracing"]]
    if device == "gpu":
        pins = dict(re.findall(r"^(\S+)==(\S+)$", constraints, re.MULTILINE))
        # both packages fill the same folder, so one must go
        found.remove("onnxruntime")
        found.append(f"onnxruntime-gpu[cuda,cudnn]=={pins['onnxruntime']}")
    return found


if __name__ == "__main__":
    listed = requirements(sys.argv[1], Path("pyproject.toml").read_text(), Path("constraints.txt").read_text())
    sys.stdout.write("\n".join(listed) + "\n")
