"""A trained prefix for other programs: Hugging Face peft (texts) and VPT (images, Simple-share).

    python -m extras.sample RUN --export FOLDER
    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained("gpt2"), FOLDER)

peft gets keys and values alone, without the map that made them. The logits are ours. The texts of
peft 0.21's `generate` under transformers 5.24 are not: it passes the prefix as `past_key_values`,
which that version of transformers calls `cache`, and generate's own empty cache wins. So the prefix
is not read; only the positions move.

    python -m extras.sample RUN --export prompt_ep100.pth

VPT gets the vectors p[l] of Simple-share, which are the prompts of VPT-deep (see prefix.py).

Shapes: L prefix length, D width, H heads, Dh = D / H, depth = layers with a prefix.
"""

import io
import json
from pathlib import Path

import torch
from safetensors import torch as safetensors
from torch import Tensor

from gpt import GPT
from support.files import UsageError, write


def export_peft(prefix_kv: Tensor, gpt: GPT, base: str, folder: Path) -> None:
    """Write prefix_kv (depth, 2, H, L, Dh) of a GPT as a prefix-tuning adapter of peft.

    base: the name or folder of that GPT. UsageError if not every layer has a prefix.
    """
    depth, _, n_head, length, _ = prefix_kv.shape
    if depth < gpt.n_layer:
        raise UsageError("--export cannot write a --shallow prefix: peft has one in every layer")
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "num_virtual_tokens": length,
        "token_dim": gpt.dim,
        "num_layers": depth,
        "num_attention_heads": n_head,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": None,
        "inference_mode": True,
    }
    flat = prefix_kv.float().cpu().permute(3, 0, 1, 2, 4).reshape(length, -1)  # (L, depth * 2 * D)
    weights = safetensors.save({"prompt_embeddings": flat.contiguous()})
    write(folder / "adapter_model.safetensors", weights)
    write(folder / "adapter_config.json", json.dumps(config, indent=2).encode())


def export_vpt(p: Tensor, file: Path) -> None:
    """Write the vectors p (depth, L, D) of Simple-share as the prompt_epN.pth of KMnP/vpt.

    That is a dict of NumPy arrays: shallow_prompt (1, L, D) of the first layer, and deep_prompt
    (depth - 1, L, D) of the others.
    """
    prompts, content = p.numpy(force=True), io.BytesIO()
    torch.save({"shallow_prompt": prompts[:1], "deep_prompt": prompts[1:]}, content)
    write(file, content.getvalue())
