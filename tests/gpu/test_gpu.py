"""On a GPU: pytest tests/gpu && python -m extras.bench. See docs/performance.md."""

import gpu_checks
import pytest
import torch
from memory import foreseen

from extras.bench import candidate

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler and of CUDA
KINDS = pytest.mark.parametrize("kind", ["images", "texts"])


@KINDS
def test_twenty_steps_lose_what_they_lose_on_a_cpu(kind):
    expected = gpu_checks.losses(kind, "cpu")
    assert expected[-1] < 0.99 * expected[0]  # it learns something
    found = gpu_checks.losses(kind, "cuda")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    rounded = gpu_checks.losses(kind, "cuda", "bf16")
    torch.testing.assert_close(rounded, expected, rtol=0.02, atol=0)


@KINDS
def test_ten_steps_never_wait_for_the_gpu(kind):
    steps = gpu_checks.steps(kind, "cuda", "bf16")
    first = next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            next(steps)
        with pytest.raises(RuntimeError, match="synchroniz"):
            first.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_vit_takes_flash_attention():
    names = gpu_checks.attention_kernels(candidate("ours, bf16, eager", 64))
    assert names
    assert all("flash" in name or "cudnn" in name for name in names), names


def test_gpt_takes_a_fused_attention(capsys):
    names = gpu_checks.attention_kernels(candidate("our GPT, bf16, eager", 10))
    with capsys.disabled():
        print(f"\nGPT's attention: {', '.join(sorted(names))}")
    assert names
    assert not any("math" in name for name in names)


def test_a_run_has_two_graphs_and_the_next_one_none(small, tmp_path):
    assert gpu_checks.graphs("cuda", small, tmp_path) == [(2, 0)] * 6


@pytest.mark.parametrize("length", [10, 200])
@pytest.mark.parametrize(("column", "batch"), [(1, 64), (2, 128), (3, 256)])
def test_peak_memory_is_what_the_page_foresees(length, column, batch):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = candidate("ours, bf16, eager", batch, length)
    step()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    assert peak == pytest.approx(foreseen()[length][column], rel=0.15)


def test_a_killed_run_goes_on(tmp_path):
    # The backward pass of flash attention adds in any order: the last bits differ.
    killed, whole = gpu_checks.killed_and_resumed("cuda", tmp_path)
    assert [row["epoch"] for row in killed] == [row["epoch"] for row in whole]
    assert killed[-1]["test"] == pytest.approx(whole[-1]["test"], abs=1)
    for one, other in zip(killed, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_too_little_memory_ends_in_a_sentence_and_a_sweep_goes_on(tmp_path, capsys):
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 100e6  # full fine-tuning of 1,000 images keeps 169
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        code, report = gpu_checks.out_of_memory("cuda", tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 2
    assert "out of memory" in capsys.readouterr().err
    assert "Failed for want of memory (1 run" in report
    assert "| digits | 1000 | linear probe |" in report


def test_beam_search_writes_what_it_writes_on_a_cpu():
    assert gpu_checks.written("cuda") == gpu_checks.written("cpu")
