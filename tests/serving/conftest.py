"""Skips this folder where the packages of the server are not installed."""

from __future__ import annotations

import pytest

for package in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(package, reason="needs kt_sft[serve]")
