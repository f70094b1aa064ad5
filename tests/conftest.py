import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same numbers in every order of the tests, and when one is run alone."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - nnU-Net's augmentation draws from it
    torch.manual_seed(0)
