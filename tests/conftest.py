import json
import os
import signal
import sys
from pathlib import Path

# With pytest -n, one core a process; those that it starts inherit it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from local_server import serve
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Dataset, load
from support import files
from train import Config, load_backbone
from vit import ViT

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # children of a pytest in the background would ignore Ctrl-C


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_a_new_process() -> None:
    """A sweep in this process sets the number of threads, on which the last bit of sums depends."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def small_vit() -> ViT:
    """Random, frozen: 16 x 16 images in 4 patches, D 16, 3 layers, 2 heads; no default left."""
    torch.manual_seed(0)
    vit = ViT(image=16, patch=8, dim=16, n_layer=3, n_head=2)
    for parameter in vit.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return vit.requires_grad_(False)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """A file with a ViT of random weights: 16 x 16 images in 4 patches, D 16, 3 layers, 2 heads."""
    torch.manual_seed(0)
    vit = ViT(image=16, patch=8, dim=16, n_layer=3, n_head=2)
    path = tmp_path_factory.mktemp("backbone") / "vit.safetensors"
    save_file(vit.state_dict(), path, {"vit": json.dumps(vit.sizes)})
    return str(path)


@pytest.fixture(scope="session")
def frozen(small) -> ViT:
    return load_backbone(Config(backbone=small, device="cpu"))


@pytest.fixture(scope="session")
def digits16() -> Dataset:
    """The digits as `frozen` reads them."""
    return load("digits", image_size=16)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine, for what a test puts into tmp_path / "site"."""
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(files, "PAUSE", 0.001)
    with serve(tmp_path / "site") as server:
        yield server
