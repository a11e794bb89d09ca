"""The checks of tests/gpu on the CPU: they run, and they find what there is to find."""

from functools import partial

import gpu_checks
import pytest
import torch

import train


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_twenty_steps_learn_and_bf16_stays_near_them(kind):
    losses = gpu_checks.losses(kind, "cpu")
    assert losses[-1] < 0.99 * losses[0]
    torch.testing.assert_close(gpu_checks.losses(kind, "cpu", "bf16"), losses, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_the_profiler_names_the_kernels_of_attention(kind):
    step = partial(next, gpu_checks.steps(kind, "cpu"))
    assert any("flash" in name for name in gpu_checks.attention_kernels(step))


@pytest.mark.slow
def test_a_run_has_two_graphs_and_the_next_one_none(small, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert gpu_checks.graphs("cpu", small, tmp_path) == [(2, 0)] * 6


@pytest.mark.long
def test_a_killed_run_goes_on(tmp_path):
    killed, whole = gpu_checks.killed_and_resumed("cpu", tmp_path)
    assert killed == whole


def test_too_little_memory_ends_in_a_sentence_and_a_sweep_goes_on(tmp_path, capsys, monkeypatch):
    enough = train.image_loss

    def too_little(model, *rest, **prefix):
        if model.backbone is not None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return enough(model, *rest, **prefix)

    monkeypatch.setattr(train, "image_loss", too_little)
    code, report = gpu_checks.out_of_memory("cpu", tmp_path)
    assert code == 2
    assert "out of memory" in capsys.readouterr().err
    assert "Failed for want of memory (1 run" in report
    assert "| digits | 1000 | linear probe |" in report
    lines = (tmp_path / "sweep" / "digits" / "results.jsonl").read_text()
    assert '"failed"' in lines  # the next method left it there


def test_beam_search_writes_something():
    texts = gpu_checks.written("cpu")
    assert len(texts) == 16
    assert len({tuple(text) for text in texts}) > 8
