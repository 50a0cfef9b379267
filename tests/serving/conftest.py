"""A scripted model and its server; skips this folder where the packages of the server are not installed."""

from __future__ import annotations

import pytest

for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="needs kt_sft[serve]")

from tests.helpers.fake_chat import FakeChat, running  # noqa: E402


@pytest.fixture(scope="module")
def chat():
    return FakeChat()


@pytest.fixture(scope="module")
def url(chat):
    with running(chat, slots=2, max_waiting=4) as (address, _):
        yield address
