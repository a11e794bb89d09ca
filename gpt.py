"""GPT-2 written out by hand: the attention of vit.py behind a causal mask, and the same prefix in it.

A text becomes T tokens, each a vector of width D from a table, plus one for its position. In a block, every token looks
at itself and at what came before it, never at what comes after; so the T outputs guess T next tokens at once. A guess
scores every token of the vocabulary by its vector in the same table (the head is tied): logits = x wte^T.

The prefix enters every layer as it does in the ViT, k = cat([prefix_k, k]) and v = cat([prefix_v, v]), and every token
sees all of it. Tokens count their positions from L, as if the prefix were a text before theirs (so do Li & Liang,
transformers and peft); hence L + T must fit the context.
    rows: tokens         prefix   tokens
                         1 1 1    1 0 0
    mask (T, L + T)      1 1 1    1 1 0
                         1 1 1    1 1 1
Shapes: B texts, T tokens, Q of them asked for their guess, V vocabulary, D width, H heads, Dh = D / H, L prefix length.
Sources: Radford et al. 2019 (GPT-2); Li & Liang, ACL 2021 (arXiv 2101.00190) for the prefix; decode.py writes texts.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from support.files import fill, read_weights
from vit import Attention, attention

HUB: dict[str, dict] = {  # repositories openai-community/NAME
    "gpt2": {"dim": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"dim": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"dim": 1280, "n_layer": 36, "n_head": 20},
}
TINY_GPT: dict = {
    "vocab": 257,
    "context": 512,
    "dim": 128,
    "n_layer": 4,
    "n_head": 4,
    "encoding": "bytes",
}
TINY_GPT_WEIGHTS = (
    Path(__file__).parent / "assets" / "tiny_gpt.safetensors"
)  # comes with the repository
OURS = {  # what GPT-2's files call the parts of this one
    "ln_1": "norm1",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_f": "norm",
    "wpe.weight": "wpe",
}


def pick(x: Tensor, at: Tensor | None) -> Tensor:
    """The rows of x (B, T, D) at the columns `at` (B, Q): (B, Q, D); all of them if `at` is None."""
    return x if at is None else x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class CausalAttention(Attention):
    """The ViT's W_q, W_k, W_v and heads; new are the mask, and the choice of any tokens for queries."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        prefix: Tensor | None,
        mask: Tensor,
        at: Tensor | None = None,
        attn_weights: list | None = None,
        kv: list | None = None,
    ) -> Tensor:
        """x (B, T, D), prefix (2, H, L, Dh) or (2, B, H, L, Dh), mask (Q, L + T) or (B, 1, Q, L + T) -> (B, Q, D)."""
        if at is None:
            q, k, v = self.heads(x, slice(0, 3))  # 3 x (B, H, T, Dh)
        else:
            (q,) = self.heads(pick(x, at), slice(0, 1))  # (B, H, Q, Dh)
            k, v = self.heads(x, slice(1, 3))  # 2 x (B, H, T, Dh)
        if prefix is not None:
            prefix_k, prefix_v = (
                p.expand(len(x), -1, -1, -1) for p in prefix.to(k.dtype)
            )  # 2 x (B, H, L, Dh)
            k = torch.cat([prefix_k, k], dim=2)  # (B, H, L + T, Dh)
            v = torch.cat([prefix_v, v], dim=2)  # (B, H, L + T, Dh)
        if kv is not None:
            kv.append(torch.stack([k, v]))  # (2, B, H, L + T, Dh)
        return self.join(attention(q, k, v, mask, attn_weights))

    def join(self, out: Tensor) -> Tensor:
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, H, Q, Dh) -> (B, Q, D)


class MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))  # (B, Q, D)


class Block(nn.Module):
    def __init__(self, dim: int, n_head: int, eps: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CausalAttention(dim, n_head)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim)

    def forward(
        self,
        x: Tensor,
        prefix: Tensor | None,
        mask: Tensor,
        at: Tensor | None = None,
        attn_weights: list | None = None,
        kv: list | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D). Only the tokens `at` go on; the others are still keys and values."""
        x = pick(x, at) + self.attn(self.norm1(x), prefix, mask, at, attn_weights, kv)  # (B, Q, D)
        return x + self.mlp(self.norm2(x))  # (B, Q, D)

    def step(self, x: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """W more tokens x (B, W, D) for decoding. kv (2, B, H, K, Dh): its last W columns are theirs, filled here."""
        qkv = self.attn.heads(self.norm1(x), slice(0, 3))  # (3, B, H, W, Dh)
        kv[..., -x.shape[1] :, :] = qkv[1:]
        x = x + self.attn.join(attention(qkv[0], kv[0], kv[1], mask))  # (B, W, D)
        return x + self.mlp(self.norm2(x))  # (B, W, D)

    def keys_values(self, x: Tensor) -> Tensor:
        """The keys and values this layer makes of any vectors (B, L, D): (2, B, H, L, Dh). Simple-share lives on it."""
        return self.attn.heads(self.norm1(x), slice(1, 3))


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm, tanh GELU, tied head, no dropout. Random weights are drawn as GPT-2's were.

    encoding: the name of the tokens it reads, for data.py; the model itself knows numbers below `vocab` only.
    """

    fingerprint = ""  # of the weights; set when they are loaded

    def __init__(
        self,
        vocab: int = 50257,
        context: int = 1024,
        dim: int = 768,
        n_layer: int = 12,
        n_head: int = 12,
        eps: float = 1e-5,
        encoding: str = "gpt2",
    ):
        super().__init__()
        self.sizes: dict = {
            "vocab": vocab,
            "context": context,
            "dim": dim,
            "n_layer": n_layer,
            "n_head": n_head,
        }
        self.sizes |= {"eps": eps, "encoding": encoding}
        self.vocab, self.context, self.dim, self.n_layer, self.n_head = (
            vocab,
            context,
            dim,
            n_layer,
            n_head,
        )
        self.encoding = encoding
        self.inputs = {"encoding": encoding}  # what `data.load` must make for it
        self.prefix_init_scale = (
            3**0.5
        )  # Li & Liang draw a prefix's vectors from N(0, 1): the same variance, uniform
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Parameter(torch.empty(context, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(dim, n_head, eps) for _ in range(n_layer))
        self.norm = nn.LayerNorm(dim, eps=eps)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(
                    ("attn.proj", "mlp.fc2")
                )  # to the residual stream: 2 n_layer terms, variance of 1
                nn.init.normal_(module.weight, std=0.02 / (2 * n_layer) ** 0.5 if adds else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        prefix: Tensor | None = None,
        at: Tensor | None = None,
        attn_weights: list | None = None,
        kv: list | None = None,
    ) -> Tensor:
        """tokens (B, T), padded at the right, where nothing before sees it -> logits (B, T, V).

        prefix: (depth, 2, H, L, Dh) or (depth, 2, B, H, L, Dh) from `Prefix`; layers beyond depth have none.
        at: columns (B, Q) -> logits (B, Q, V) of these tokens alone; the last block computes nothing else.
        attn_weights: a list that is given every layer's attention weights (B, H, T or Q, L + T).
        kv: a list that is given every layer's keys and values (2, B, H, L + T, Dh), the prefix's included.
        """
        length, (_, count) = 0 if prefix is None else prefix.shape[-2], tokens.shape
        if length + count > self.context:
            raise ValueError(
                f"{length} prefix vectors and {count} tokens exceed the context of {self.context}"
            )
        columns = torch.arange(length + count, device=tokens.device)
        x = self.wte(tokens) + self.wpe[length : length + count]  # (B, T, D)
        mask = columns <= columns[length:, None]  # (T, L + T)
        last_mask = (
            mask if at is None else columns <= length + at[:, None, :, None]
        )  # or (B, 1, Q, L + T)
        prefixes = () if prefix is None else prefix.unbind()  # depth x (2, [B,] H, L, Dh)
        for i, (block, p) in enumerate(zip_longest(self.blocks, prefixes)):
            last = i == self.n_layer - 1
            seen = (last_mask if last else mask)[..., 0 if p is not None else length :]
            x = block(
                x, p, seen, at if last else None, attn_weights, kv
            )  # (B, T, D); the last block: (B, Q, D)
        return F.linear(self.norm(x), self.wte.weight)  # (B, Q, V)

    def generate(
        self,
        prompts: Sequence[list[int]],
        prefix: Tensor | None = None,
        beams: int = 1,
        max_new: int = 100,
        length_penalty: float = 1.0,
        eos: int = 50256,
        banned: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without eos: greedily, or the best text that `beams` beams found.

        length_penalty: a finished text of n tokens is worth log p / n**length_penalty; above 0 favours long ones.
        banned: tokens that are never written. ValueError if a prompt is empty, or its text would not fit the context.
        """
        longest = max(map(len, prompts)) + (0 if prefix is None else prefix.shape[-2]) + max_new - 1
        if not all(prompts):
            raise ValueError("a prompt is empty; a text needs a token to start from")
        if longest > self.context:
            raise ValueError(
                f"prefix, prompt and {max_new} new tokens need {longest} positions of {self.context}"
            )
        device, held = self.wpe.device.type, self.wte.weight.dtype == torch.bfloat16
        with torch.autocast(device, torch.bfloat16) if held else nullcontext():
            return search(self, prompts, prefix, beams, max_new, length_penalty, eos, banned)

    @torch.no_grad()
    def cast_frozen_weights(self) -> None:
        """Cast the matrices for good, for a frozen GPT: no fp32 copy is cast in every step. Norms, wpe stay fp32.

        The real GPT-2's logits lie between -30 and -120, where bf16 knows quarters and halves only. What they have in
        common is the mean of wte; softmax does not see it. So wte gives it to wpe, and wte + wpe stays as it was.
        """
        mean = self.wte.weight.mean(0)  # (D,)
        self.wte.weight -= mean
        self.wpe += mean
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.to(torch.bfloat16)

    @classmethod
    def load(cls, name: str, pretrained: bool = True) -> "GPT":
        """tiny_gpt: the shipped weights; scratch_gpt: that shape, random; a .safetensors file; or as from_pretrained.

        pretrained: False gives gpt2, gpt2-medium and gpt2-large random weights and needs no download.
        """
        if name == "scratch_gpt":
            return cls(**TINY_GPT)
        if name == "tiny_gpt" or name.endswith(".safetensors"):
            return cls.from_file(TINY_GPT_WEIGHTS if name == "tiny_gpt" else name)
        if name in HUB and not pretrained:
            return cls(**HUB[name])
        return cls.from_pretrained(name)

    @classmethod
    def from_pretrained(cls, name: str) -> "GPT":
        """gpt2, gpt2-medium, gpt2-large from the hub, or a folder with a GPT-2 that transformers saved."""
        if name in HUB:
            sizes, path = (
                HUB[name],
                Path(hf_hub_download(f"openai-community/{name}", "model.safetensors")),
            )
        elif Path(name).is_dir():
            sizes, path = sizes_of(Path(name, "config.json")), Path(name, "model.safetensors")
        else:
            names = ", ".join([*HUB, "tiny_gpt", "scratch_gpt"])
            raise ValueError(
                f"no GPT '{name}'; possible are {names}, a folder or a .safetensors file"
            )
        return fill(cls, sizes, converted(read_weights(path)[0]), path)

    @classmethod
    def from_file(cls, path: str | Path) -> "GPT":
        """A GPT saved by `train.py --tune full`: safetensors with sizes in its metadata. ValueError if it is not."""
        state, strings = read_weights(path)
        if "gpt" not in strings:
            raise ValueError(
                f"{path} holds no GPT of this repository; for one of transformers give its folder"
            )
        return fill(cls, json.loads(strings["gpt"]), state, path)


def converted(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under our names. Its linear layers keep (in, out), ours (out, in); masks and tied head go."""
    state = {}
    for key, value in theirs.items():
        name = key.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if ".c_" in name and name.endswith("weight"):
            value = value.mT.contiguous()
        for old, new in OURS.items():
            name = name.replace(old, new)
        state["blocks" + name.removeprefix("h") if name.startswith("h.") else name] = value
    return state


def sizes_of(path: Path) -> dict:
    """The sizes in a config.json of transformers. ValueError if it is damaged or describes no plain GPT-2."""
    try:
        config = json.loads(path.read_text())
        sizes = {
            "vocab": config["vocab_size"],
            "context": config["n_positions"],
            "dim": config["n_embd"],
        }
        sizes |= {
            "n_layer": config["n_layer"],
            "n_head": config["n_head"],
            "eps": config["layer_norm_epsilon"],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or describes no GPT-2 ({error})") from error
    plain = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * sizes["dim"]),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
    }
    for name, possible in plain.items():
        if config.get(name, possible[0]) not in possible:
            raise ValueError(f"{path} says {name} {config[name]}; gpt.py holds a plain GPT-2 only")
    return sizes


class Cache:
    """The keys and values of B prompts and of all that was written after them. The prompts give the first `logits`.

    room: how many columns to keep free for what will be written.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[list[int]], prefix: Tensor | None, room: int
    ):
        device = model.wpe.device
        tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(
            device
        )  # (B, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
        self.model = model
        kv: list[Tensor] = []
        self.logits = model(tokens, prefix, at=lengths[:, None] - 1, kv=kv)  # (B, 1, V)
        self.kv = [F.pad(layer, (0, 0, 0, room)) for layer in kv]  # n_layer x (2, B, H, K, Dh)
        self.free = room
        trunk = kv[0].shape[-2]  # L + T
        self.position = lengths + trunk - tokens.shape[1]  # (B,): of the next token
        self.seen = (
            torch.arange(trunk, device=device) < self.position[:, None, None]
        )  # (B, 1, L + T)

    def step(self, parent: Tensor, token: Tensor) -> Tensor:
        """Beam w becomes beam parent[:, w] with token[:, w] at its end: both (B, W) -> logits (B, W, V)."""
        width = token.shape[1]
        own = torch.eye(width, dtype=torch.bool, device=token.device).expand(len(token), -1, -1)
        self.seen = torch.cat(
            [self.seen.take_along_dim(parent.unsqueeze(-1), dim=1), own], dim=-1
        )  # (B, W, K)
        self.free -= width
        x = self.model.wte(token) + self.model.wpe[self.position].unsqueeze(1)  # (B, W, D)
        for block, layer in zip(self.model.blocks, self.kv, strict=True):
            filled = layer.narrow(-2, 0, layer.shape[-2] - self.free)
            x = block.step(
                x, filled, self.seen[:, None, :, -filled.shape[-2] :]
            )  # no prefix here: L columns fewer
        self.position = self.position + 1
        return F.linear(self.model.norm(x), self.model.wte.weight)

    def keep(self, rows: list[int]) -> list[int]:
        """Only these prompts stay, in the order that is returned: the last ones move to the places of those that go."""
        count = len(rows)
        holes, movers = sorted(set(range(count)) - set(rows)), [row for row in rows if row >= count]
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        for layer in self.kv:
            layer[:, holes] = layer[:, movers]
        self.kv = [layer[:, :count] for layer in self.kv]
        self.seen, self.position = self.seen[order], self.position[order]
        return order


def candidates(logits: Tensor, scores: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ways to go on, best first: their log p, the beam they continue, the token they add; each (B, 2 beams).

    logits (B, W, V), scores (B, W). Twice as many as beams, as up to half may end. Greedy search wants the best only.
    """
    if beams == 1:
        top, index = logits.flatten(1).max(-1, keepdim=True)  # (B, 1)
    else:
        top, index = (logits + scores.unsqueeze(-1)).flatten(1).topk(2 * beams)  # (B, 2 beams)
    return top, index // logits.shape[-1], index % logits.shape[-1]


@torch.inference_mode()
def search(
    model: nn.Module,
    prompts: Sequence[list[int]],
    prefix: Tensor | None,
    beams: int,
    max_new: int,
    length_penalty: float,
    eos: int,
    banned: tuple[int, ...],
) -> list[list[int]]:
    """GPT.generate: the loop. A prompt leaves it when no beam can beat the worst of its `beams` finished texts."""
    cache = Cache(model, prompts, prefix, beams * (max_new - 1))
    logits = cache.logits
    live = list(range(len(prompts)))  # which prompt a row belongs to
    found: list[list[tuple[float, list[int]]]] = [
        [] for _ in prompts
    ]  # finished texts: worth and tokens, best first
    scores = torch.zeros(len(prompts), 1, device=logits.device)
    text = scores.unsqueeze(-1)[..., :0].long()  # (B, 1, 0)
    for n in range(1, max_new + 1):
        logits = logits.float() if beams == 1 else F.log_softmax(logits.float(), -1)
        logits[..., list(banned)] = -torch.inf
        top, parent, token = candidates(logits, scores, beams)  # 3 x (B, 2 W)
        text = torch.cat(
            [text.take_along_dim(parent.unsqueeze(-1), dim=1), token.unsqueeze(-1)], dim=-1
        )  # (B, 2 W, n)
        ends = (token == eos) | (n == max_new)
        worth = top / n**length_penalty
        for row, i in ends[:, :beams].nonzero().tolist():
            best = found[live[row]]
            best.append((worth[row, i].item(), text[row, i].tolist()))
            best.sort(key=lambda pair: -pair[0])
            del best[beams:]
        scores, chosen = top.masked_fill(ends, -torch.inf).topk(beams)  # 2 x (B, W)
        parent, token = parent.gather(1, chosen), token.gather(1, chosen)
        text = text.take_along_dim(chosen.unsqueeze(-1), dim=1)
        hope = (scores[:, 0] / n**length_penalty).tolist()
        rows = [r for r, p in enumerate(live) if len(found[p]) < beams or hope[r] > found[p][-1][0]]
        if n == max_new or not rows:
            break
        if len(rows) < len(live):
            order = cache.keep(rows)
            live = [live[row] for row in order]
            parent, token, text, scores = (t[order] for t in (parent, token, text, scores))
        logits = cache.step(parent, token)
    best = [texts[0][1] for texts in found]
    return [text[:-1] if text[-1] == eos else text for text in best]
