"""What only a GPU can tell: `pytest -m gpu`. Without one, each test is skipped with the reason."""
