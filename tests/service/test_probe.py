"""The health check of the container."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from service import probe


class Ready(BaseHTTPRequestHandler):
    """Answers like a service that is ready, or is not."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/v2/health/ready" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        monkeypatch.setenv("NORMSERVE_PORT", str(server.server_port))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize(("status", "exit_status"), [(200, 0), (503, 1)])
def test_probe_tells_readiness(status: int, exit_status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ready, "status", status)
    assert probe.main() == exit_status


@pytest.mark.usefixtures("answering")
def test_probe_ignores_the_proxy_of_its_host() -> None:
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment["http_proxy"] = "http://127.0.0.1:9"
    done = subprocess.run([sys.executable, "-m", "service.probe"], env=environment, timeout=60)
    assert done.returncode == 0
