"""These tests need a GPU; elsewhere they end in one sentence. Plain `pytest` leaves them out."""

import pytest
import torch


def pytest_configure() -> None:
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a GPU that PyTorch can use, and there is none")


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    """Without TF32, which what was tested before may have turned on."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
