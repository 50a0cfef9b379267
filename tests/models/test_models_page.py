"""docs/models.md says what the parity test covers, and nothing that transformers decorates is forgotten."""

from __future__ import annotations

from tests.helpers import families, tiny_models
from tests.helpers.models_page import PAGE, PASSES, UNREACHED, decorated_classes, on_meta, render


def test_page_is_what_the_parity_test_shows():
    """Each family passes there, or that test fails; run `python -m tests.helpers.models_page` after a change."""
    assert PAGE.read_text(encoding="utf-8") == render(dict.fromkeys(families.FAMILIES, PASSES))


def test_every_decorated_class_is_tested_or_named():
    reached = {
        type(module).__name__
        for family in families.FAMILIES
        for module in on_meta(tiny_models.config(family)).modules()
    }
    assert decorated_classes() - reached == set(UNREACHED)


def test_at_least_twenty_families():
    assert len(families.FAMILIES) >= 20
