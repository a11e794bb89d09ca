"""GPT-2 written out by hand: the attention of vit.py behind a causal mask, and the same prefix.

A text becomes T tokens, each a vector of width D from a table, plus one for its position. In a
block every token looks at itself and at what came before it, never at what comes after, so the T
outputs predict T next tokens at once. The head is tied: logits = x wte^T.

The prefix enters every layer as it does in the ViT, k = cat([prefix_k, k]), v = cat([prefix_v, v]),
and every token sees all of it. Tokens count their positions from L, as if the prefix were a text
before theirs (so do Li & Liang, transformers and peft); hence L + T must fit the context.
    rows: tokens         prefix   tokens
                         1 1 1    1 0 0
    mask (T, L + T)      1 1 1    1 1 0
                         1 1 1    1 1 1
The second half of the file writes texts: a cache of keys and values, and beam search.

Shapes: B texts, T tokens, Q target positions, V vocabulary, D width, H heads, Dh = D / H, L prefix
length; while writing, W beams of a text and K cached columns.
Sources: Radford et al. 2019 (GPT-2); Li & Liang, ACL 2021 (arXiv 2101.00190) for the prefix.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vit import Attention, attention, build, read_folder, read_weights

HUB: dict[str, dict] = {  # sizes that differ from gpt2's
    "distilgpt2": {"n_layer": 6},
    "gpt2": {},
    "gpt2-medium": {"dim": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"dim": 1280, "n_layer": 36, "n_head": 20},
}
TOKENS = {"gpt2": 50257, "bytes": 257}  # how many tokens an encoding has
TINY_GPT: dict = {"vocab": 257, "context": 512, "dim": 128, "n_layer": 4, "n_head": 4}
TINY_GPT |= {"encoding": "bytes"}
TINY_GPT_WEIGHTS = Path(__file__).parent / "assets" / "tiny_gpt.safetensors"


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """The rows of x (B, T, D) at `positions` (B, Q) -> (B, Q, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


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
        self.attn = Attention(dim, n_head)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim)

    def forward(
        self,
        x: Tensor,
        prefix_kv: Tensor | None,
        mask: Tensor,
        target_positions: Tensor | None = None,
        attn_weights: list | None = None,
        kv: list | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T or Q, D). With target_positions only these tokens ask and go on."""
        y = self.norm1(x)  # (B, T, D)
        asking = None if target_positions is None else pick(y, target_positions)  # (B, Q, D)
        x = x if target_positions is None else pick(x, target_positions)  # (B, T or Q, D)
        x = x + self.attn(y, prefix_kv, asking, mask, attn_weights, kv)  # (B, T or Q, D)
        return x + self.mlp(self.norm2(x))  # (B, T or Q, D)

    def step(self, x: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """W more tokens x (B, W, D). kv (2, B, H, K, Dh): its last W columns are filled here."""
        qkv = self.attn.heads(self.attn.qkv(self.norm1(x)))  # (3, B, H, W, Dh)
        kv[..., -x.shape[1] :, :] = qkv[1:]
        out = attention(qkv[0], kv[0], kv[1], mask)  # (B, H, W, Dh)
        x = x + self.attn.proj(out.transpose(1, 2).flatten(2))  # (B, W, D)
        return x + self.mlp(self.norm2(x))  # (B, W, D)

    def keys_values(self, x: Tensor) -> Tensor:
        """What this layer makes of any vectors (B, L, D), for Simple-share: (2, B, H, L, Dh)."""
        return self.attn.keys_values(self.norm1(x))


class GPT(nn.Module):
    """GPT-2: learned positions, norms before layers, tanh GELU, tied head, no dropout.

    vocab: rows of the token table. Rows beyond the encoding's tokens (a [PAD] that was added, a
        table padded to a round number) belong to no token: they are never scored or written.
    encoding: the name of the tokens it reads, for data.py.
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
        self.sizes = {
            **{"vocab": vocab, "context": context, "dim": dim, "n_layer": n_layer},
            **{"n_head": n_head, "eps": eps, "encoding": encoding},
        }
        self.vocab = self.n_tokens = min(vocab, TOKENS.get(encoding, vocab))  # V
        self.context, self.encoding = context, encoding
        self.dim, self.n_layer, self.n_head = dim, n_layer, n_head
        self.inputs = {"encoding": encoding}  # what `data.load` has to make for this model
        self.prefix_init_scale = 3**0.5  # uniform, with the variance of Li & Liang's N(0, 1)

        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Parameter(torch.empty(context, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(dim, n_head, eps) for _ in range(n_layer))
        self.norm = nn.LayerNorm(dim, eps=eps)

        # GPT-2's initialisation: the 2 n_layer terms of the residual stream add up to one.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                adds = name.endswith(("attn.proj", "mlp.fc2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * n_layer) ** 0.5 if adds else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        prefix_kv: Tensor | None = None,
        target_positions: Tensor | None = None,
        attn_weights: list | None = None,
        kv: list | None = None,
    ) -> Tensor:
        """tokens (B, T), padded at the right, where no token before sees it -> logits (B, T, V).

        prefix_kv: from `Prefix`, (depth, 2, H, L, Dh), or (depth, 2, B, H, L, Dh) if every text
            has its own. Layers beyond depth have none.
        target_positions: (B, Q) -> logits (B, Q, V) of these tokens alone, which are also all that
            the last block computes.
        attn_weights: a list that receives every layer's attention weights (B, H, T or Q, L + T).
        kv: a list that receives every layer's keys and values (2, B, H, L + T, Dh).
        """
        length = 0 if prefix_kv is None else prefix_kv.shape[-2]  # L
        end = length + tokens.shape[1]  # L + T
        if end > self.context:
            count = f"{length} prefix vectors and {tokens.shape[1]} tokens"
            raise ValueError(f"{count} exceed the context of {self.context}")
        x = self.wte(tokens) + self.wpe[length:end]  # (B, T, D)

        # A token sees the prefix, itself and what came before it.
        columns = torch.arange(end, device=tokens.device)
        mask = columns <= columns[length:, None]  # (T, L + T)
        last_mask = mask
        if target_positions is not None:
            last_mask = columns <= length + target_positions[:, None, :, None]  # (B, 1, Q, L + T)

        # Only the target positions go through the last block. A layer without a prefix has no
        # columns for it.
        layers = () if prefix_kv is None else prefix_kv.unbind()  # depth x (2, [B,] H, L, Dh)
        for i, block in enumerate(self.blocks):
            last = i == self.n_layer - 1
            layer_kv = layers[i] if i < len(layers) else None
            seen = (last_mask if last else mask)[..., 0 if layer_kv is not None else length :]
            positions = target_positions if last else None
            x = block(x, layer_kv, seen, positions, attn_weights, kv)  # (B, T, D); last (B, Q, D)
        return F.linear(self.norm(x), self.wte.weight[: self.n_tokens])  # (B, T or Q, V)

    def generate(
        self,
        prompts: Sequence[list[int]],
        prefix_kv: Tensor | None = None,
        beams: int = 1,
        max_new: int = 100,
        length_penalty: float = 1.0,
        eos: int = 50256,
        banned: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without eos: greedy for one beam, else beam search.

        length_penalty: a finished text of n tokens scores log p / n**length_penalty; a value above
            0 favours long ones.
        banned: tokens that are never written.
        Raises ValueError if a prompt is empty, or if its text would not fit the context.
        """
        if not all(prompts):
            raise ValueError("a prompt is empty; a text needs a token to start from")
        length = 0 if prefix_kv is None else prefix_kv.shape[-2]
        longest = length + max(map(len, prompts)) + max_new - 1
        if longest > self.context:
            need = f"prefix, prompt and {max_new} new tokens need {longest} positions"
            raise ValueError(f"{need} of {self.context}")
        device, cast = self.wpe.device.type, self.wte.weight.dtype == torch.bfloat16
        with torch.autocast(device, torch.bfloat16) if cast else nullcontext():
            return search(self, prompts, prefix_kv, beams, max_new, length_penalty, eos, banned)

    @torch.no_grad()
    def cast_frozen_weights(self) -> None:
        """Cast the matrices of a frozen GPT to bf16 once, not in every step. Norms, wpe stay fp32.

        GPT-2's logits lie between -30 and -120, where bf16 knows quarters and halves only. What
        they have in common is the mean of wte, and softmax does not see it. So the mean moves from
        wte to wpe; their sum stays as it was.
        """
        mean = self.wte.weight.mean(0)  # (D,)
        self.wte.weight -= mean
        self.wpe += mean
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.to(torch.bfloat16)

    @classmethod
    def load(cls, name: str, pretrained: bool = True) -> "GPT":
        """tiny_gpt: the shipped weights. scratch_gpt: the same shape, random. gpt2, gpt2-medium,
        gpt2-large, distilgpt2: from the hub. Otherwise a folder with a GPT-2 that transformers
        saved, or a .safetensors file that `train.py --tune full` saved.

        pretrained: False gives the hub's names random weights and needs no download.
        Raises ValueError, in one sentence, for a file or a model that is not a GPT-2.
        """
        if name == "scratch_gpt":
            return cls(**TINY_GPT)
        if name == "tiny_gpt" or name.endswith(".safetensors"):
            return cls.from_file(TINY_GPT_WEIGHTS if name == "tiny_gpt" else name)
        if Path(name).is_dir():
            sizes = read_config(Path(name, "config.json"))
            return build(cls, sizes, converted(read_folder(Path(name))), name)

        # The hub's names, with their owner or without.
        short = name.removeprefix("openai-community/").removeprefix("distilbert/")
        if short not in HUB:
            names = ", ".join(["tiny_gpt", "scratch_gpt", *HUB])
            raise ValueError(
                f"no GPT '{name}'; possible are {names}, a folder or a .safetensors file"
            )
        if not pretrained:
            return cls(**HUB[short])
        owner = "distilbert" if short == "distilgpt2" else "openai-community"
        path = hf_hub_download(f"{owner}/{short}", "model.safetensors")
        return build(cls, HUB[short], converted(read_weights(path)[0]), path)

    @classmethod
    def from_file(cls, path: str | Path) -> "GPT":
        """A GPT that `train.py --tune full` saved, its sizes in the metadata."""
        state, metadata = read_weights(path)
        if "gpt" not in metadata:
            raise ValueError(
                f"{path} holds no GPT of this repository; for one of transformers give its folder"
            )
        return build(cls, json.loads(metadata["gpt"]), state, path)


OURS = {  # what GPT-2's files call the parts of this model
    "ln_1": "norm1",
    "attn.c_attn": "attn.qkv",
    "attn.c_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ln_f": "norm",
    "wpe.weight": "wpe",
}


def converted(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under our names. Its linear layers keep (in, out), ours (out, in)."""
    state = {}
    for key, value in theirs.items():
        # Masks and the tied head are no parameters of this model.
        name = key.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if ".c_" in name and name.endswith("weight"):
            value = value.mT.contiguous()
        for old, new in OURS.items():
            name = name.replace(old, new)
        state["blocks" + name.removeprefix("h") if name.startswith("h.") else name] = value
    head = theirs.get("lm_head.weight")
    if head is not None and "wte.weight" in state and not torch.equal(head, state["wte.weight"]):
        raise ValueError("its lm_head differs from wte; gpt.py holds a GPT-2 with a tied head only")
    return state


SIZES = {"vocab": "vocab_size", "context": "n_positions", "dim": "n_embd"}
SIZES |= {"n_layer": "n_layer", "n_head": "n_head", "eps": "layer_norm_epsilon"}
PLAIN = {  # what a config.json may say of a plain GPT-2; the first value is transformers' default
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}


def read_config(path: Path) -> dict:
    """The sizes that a config.json of transformers names; the others are gpt2's, as they are there.

    Raises ValueError if it describes no GPT-2.
    """
    try:
        config = json.loads(path.read_text())
        sizes = {ours: config[theirs] for ours, theirs in SIZES.items() if theirs in config}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    for name, possible in (PLAIN | {"n_inner": (None, 4 * sizes.get("dim", 768))}).items():
        if config.get(name, possible[0]) not in possible:
            raise ValueError(f"{path} says {name} {config[name]}; gpt.py holds a plain GPT-2 only")
    return sizes


class Cache:
    """The keys and values of B prompts and of all that was written after them.

    room: how many columns to keep free for what will be written. The prompts give `logits`.
    """

    def __init__(
        self, model: GPT, prompts: Sequence[list[int]], prefix_kv: Tensor | None, room: int
    ):
        # Prompts are padded at the right; each is asked for what follows its last token.
        device = model.wpe.device
        rows = [torch.tensor(prompt) for prompt in prompts]
        tokens = pad_sequence(rows, batch_first=True).to(device)  # (B, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
        kv: list[Tensor] = []
        self.logits = model(tokens, prefix_kv, lengths[:, None] - 1, kv=kv)  # (B, 1, V)

        # The prefix and the prompts are what every beam sees; the padding is not.
        self.model, self.free = model, room
        self.kv = [F.pad(layer, (0, 0, 0, room)) for layer in kv]  # n_layer x (2, B, H, K, Dh)
        columns = torch.arange(kv[0].shape[-2], device=device)  # (L + T,)
        self.position = lengths + len(columns) - tokens.shape[1]  # (B,): of the next token
        self.seen = columns < self.position[:, None, None]  # (B, 1, L + T)

    def step(self, parent: Tensor, token: Tensor) -> Tensor:
        """Beam w continues beam parent[:, w] with token[:, w]: both (B, W) -> logits (B, W, V)."""
        # A beam sees what its parent saw, and its own new token.
        width = token.shape[1]
        own = torch.eye(width, dtype=torch.bool, device=token.device).expand(len(token), -1, -1)
        seen = self.seen.take_along_dim(parent.unsqueeze(-1), dim=1)
        self.seen = torch.cat([seen, own], dim=-1)  # (B, W, K)

        # All beams share the cache: their tokens take the next W columns.
        self.free -= width
        x = self.model.wte(token) + self.model.wpe[self.position].unsqueeze(1)  # (B, W, D)
        for block, layer in zip(self.model.blocks, self.kv, strict=True):
            filled = layer.narrow(-2, 0, layer.shape[-2] - self.free)  # (2, B, H, K, Dh)
            mask = self.seen[:, None, :, -filled.shape[-2] :]  # without a prefix L columns fewer
            x = block.step(x, filled, mask)
        self.position = self.position + 1
        return F.linear(self.model.norm(x), self.model.wte.weight[: self.model.n_tokens])

    def keep(self, rows: list[int]) -> list[int]:
        """Only these prompts stay, in the order that is returned.

        The last ones move to the places of those that go, so that little is copied.
        """
        count = len(rows)
        holes = sorted(set(range(count)) - set(rows))
        movers = [row for row in rows if row >= count]
        order = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        for layer in self.kv:
            layer[:, holes] = layer[:, movers]
        self.kv = [layer[:, :count] for layer in self.kv]
        self.seen, self.position = self.seen[order], self.position[order]
        return order


@torch.inference_mode()
def search(
    model: GPT,
    prompts: Sequence[list[int]],
    prefix_kv: Tensor | None,
    beams: int,
    max_new: int,
    length_penalty: float,
    eos: int,
    banned: tuple[int, ...],
) -> list[list[int]]:
    """Beam search for `generate`; with one beam it is greedy. W is 1 at first, then `beams`."""
    cache = Cache(model, prompts, prefix_kv, beams * (max_new - 1))
    logits = cache.logits
    live = list(range(len(prompts)))  # which prompt a row belongs to
    found: list[list[tuple[float, list[int]]]] = [
        [] for _ in prompts
    ]  # (score, tokens), best first
    scores = torch.zeros(len(prompts), 1, device=logits.device)  # (B, W): log p of every beam
    text = scores.unsqueeze(-1)[..., :0].long()  # (B, W, 0): what every beam wrote
    for n in range(1, max_new + 1):
        # The best ways to go on. Twice as many as beams, as up to half of them may end; a greedy
        # search needs the best one, and no log p.
        logits = logits.float() if beams == 1 else F.log_softmax(logits.float(), -1)
        logits[..., list(banned)] = -torch.inf
        if beams == 1:
            top, index = logits.flatten(1).max(-1, keepdim=True)  # (B, 1)
        else:
            top, index = (logits + scores.unsqueeze(-1)).flatten(1).topk(2 * beams)  # (B, 2 beams)
        parent, token = index // logits.shape[-1], index % logits.shape[-1]
        text = text.take_along_dim(parent.unsqueeze(-1), dim=1)
        text = torch.cat([text, token.unsqueeze(-1)], dim=-1)  # (B, 2 beams, n)

        # Texts that end are finished, if they are among the best `beams`.
        ends = (token == eos) | (n == max_new)
        worth = top / n**length_penalty
        for row, i in ends[:, :beams].nonzero().tolist():
            best = found[live[row]]
            best.append((worth[row, i].item(), text[row, i].tolist()))
            best.sort(key=lambda pair: -pair[0])
            del best[beams:]

        # The best of those that do not end go on.
        scores, chosen = top.masked_fill(ends, -torch.inf).topk(beams)  # 2 x (B, beams)
        parent, token = parent.gather(1, chosen), token.gather(1, chosen)
        text = text.take_along_dim(chosen.unsqueeze(-1), dim=1)  # (B, beams, n)

        # A prompt leaves when no beam can beat the worst of its `beams` finished texts.
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
