"""What the tests of the expert layer share."""

from __future__ import annotations

import pytest

from tests.helpers.layers import FORMATS, format_id


@pytest.fixture(params=FORMATS, ids=format_id)
def weights(request) -> tuple[str, int, str]:
    """Weight format, group and rows of the layer."""
    return request.param
