import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from vit import ViT


@pytest.fixture
def small_vit() -> ViT:
    """Random and frozen: 16 x 16 images in 4 patches, D 16, 3 layers, 2 heads; no parameter at its default."""
    torch.manual_seed(0)
    vit = ViT(image=16, patch=8, dim=16, n_layer=3, n_head=2)
    for parameter in vit.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return vit.requires_grad_(False)
