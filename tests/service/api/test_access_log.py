"""One line a request: at the level debug where it went well, at info where it did not."""

import logging

import httpx
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize(("path", "status", "level"), [("/v2/health/live", 200, "DEBUG"), ("/v2/nothing", 404, "INFO")])
async def test_the_line_of_a_request_has_the_level_of_its_outcome(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, path: str, status: int, level: str
) -> None:
    with caplog.at_level(logging.DEBUG, logger="service.access"):
        await client.get(path)
    lines = [vars(record) for record in caplog.records if record.name == "service.access"]
    assert [(line["path"], line["status"], line["levelname"]) for line in lines] == [(path, status, level)]
