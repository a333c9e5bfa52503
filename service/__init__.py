"""normserve: the HTTP service. A thin shell around normcore."""

import os
from importlib.metadata import version

# onnxruntime sends usage data from a thread that it starts at import; this must stand before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# torch's threads would wait for each other by spinning, on processors that bodies are read and decoded with: half of
# what large requests cost. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = version("normserve")
