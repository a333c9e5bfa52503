"""normserve: the HTTP service. A thin shell around normcore."""

import os
from importlib.metadata import version

# onnxruntime sends usage data from a thread that it starts at import; this must stand before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = version("normserve")
