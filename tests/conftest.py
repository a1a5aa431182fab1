"""The order of the tests."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests come first: the last one to finish decides how long two workers take."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
