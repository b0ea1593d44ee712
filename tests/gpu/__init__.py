"""Tests that need a GPU: `pytest -m gpu`. Without one, each test is skipped with the reason."""
