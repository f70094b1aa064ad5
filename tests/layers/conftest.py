import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers in every order of the tests, and when one is run alone."""
    torch.manual_seed(0)
