"""What holds around every kernel test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Fills every torch.empty with NaN (integers: the largest), so that what no kernel wrote cannot look right."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
