"""GPT-2 written out by hand: the layers of vit.py behind a causal mask, and the same prefix.

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
The second half of the file writes texts: a cache of keys and values, and beam search. The last part
reads the files of others.

Shapes: B texts, T tokens, Q target positions, V vocabulary, D width, H heads, Dh = D / H, L prefix
length; while writing, W beams of a text and K cached columns.
Sources: Radford et al. 2019 (GPT-2); Li & Liang, ACL 2021 (arXiv 2101.00190) for the prefix.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vit import Block, attention, build, by_layer, read_folder, read_weights, renamed

HUB: dict[str, dict] = {  # sizes that differ from gpt2's
    "openai-community/gpt2": {},
    "openai-community/gpt2-medium": {"dim": 1024, "n_layer": 24, "n_head": 16},
    "openai-community/gpt2-large": {"dim": 1280, "n_layer": 36, "n_head": 20},
    "distilbert/distilgpt2": {"n_layer": 6},
}
TOKENS = {"gpt2": 50257, "bytes": 257}  # how many tokens an encoding has
TINY_GPT: dict = {"vocab": 257, "context": 512, "dim": 128, "n_layer": 4, "n_head": 4}
TINY_GPT |= {"encoding": "bytes"}
TINY_GPT_WEIGHTS = Path(__file__).parent / "assets" / "tiny_gpt.safetensors"


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    attn_weights: list | None = None,
    kv: list | None = None,
) -> Tensor:
    """Attention to all of the prefix and to some tokens: (B, H, T or Q, Dh).

    seen: (T, T), True where a row's token sees a column's; (B, 1, Q, T) if only some tokens ask.
    attn_weights, kv: lists that receive the weights, and the keys and values (2, B, H, L + T, Dh).
    """
    if kv is not None:
        kv.append(torch.stack([k, v]))

    # Flash attention takes no mask, so it needs a form of its own.
    if q.is_cuda and seen.ndim == 2 and attn_weights is None:
        return flash_causal(q, k, v)

    # The prefix comes first, and every token sees all of it.
    mask = F.pad(seen, (k.shape[2] - seen.shape[-1], 0), value=True)  # (.., L + T)
    return attention(q, k, v, mask, attn_weights)


def flash_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same if all tokens ask, in a form that flash attention on CUDA computes.

    That kernel knows one pattern: row i sees columns 0 to i. So the prefix gets L rows of its own,
    and their outputs are thrown away.
    """
    # PyTorch's causal_lower_right means the same, but torch.compile cannot make it in a graph.
    length = k.shape[2] - q.shape[2]  # L
    q = F.pad(q, (0, 0, length, 0))  # (B, H, L + T, Dh)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, L + T, Dh)
    return out[:, :, length:]


def pick(x: Tensor, positions: Tensor) -> Tensor:
    """The rows of x (B, T, D) at `positions` (B, Q) -> (B, Q, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


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

        # What others ask about this model.
        self.sizes: dict = {"vocab": vocab, "context": context, "dim": dim, "n_layer": n_layer}
        self.sizes |= {"n_head": n_head, "eps": eps, "encoding": encoding}
        self.vocab = min(vocab, TOKENS.get(encoding, vocab))  # V
        self.context, self.encoding = context, encoding
        self.dim, self.n_layer, self.n_head = dim, n_layer, n_head
        self.inputs = {"encoding": encoding}  # what `data.load` has to make for this model
        self.prefix_init_scale = 3**0.5  # uniform, with the variance of Li & Liang's N(0, 1)

        # What is learned: a vector per token and per position, the layers, the last norm.
        self.wte = nn.Embedding(vocab, dim)
        self.wpe = nn.Parameter(torch.empty(context, dim).normal_(std=0.02))
        self.blocks = nn.ModuleList(
            Block(dim, n_head, 4 * dim, eps, "tanh") for _ in range(n_layer)
        )
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
        # Positions are counted from L, as if the prefix were a text before the tokens.
        length = 0 if prefix_kv is None else prefix_kv.shape[-2]  # L
        end = length + tokens.shape[1]  # L + T
        if end > self.context:
            count = f"{length} prefix vectors and {tokens.shape[1]} tokens"
            raise ValueError(f"{count} exceed the context of {self.context}")
        x = self.wte(tokens) + self.wpe[length:end]  # (B, T, D)

        # In all layers but the last every token asks, and sees itself and what came before it.
        columns = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        seen = columns <= columns[:, None]  # (T, T)
        attention_fn = partial(causal_attention, seen=seen, attn_weights=attn_weights, kv=kv)
        *early, last = self.blocks
        layers = by_layer(prefix_kv, self.n_layer)  # n_layer x (2, [B,] H, L, Dh), or None
        for block, layer_kv in zip(early, layers, strict=False):
            x = block(x, layer_kv, attention_fn)  # (B, T, D)

        # In the last one only the target positions ask, and go on.
        choose = None
        if target_positions is not None:
            seen = columns <= target_positions[:, None, :, None]  # (B, 1, Q, T)
            attention_fn = partial(attention_fn, seen=seen)
            choose = partial(pick, positions=target_positions)
        x = last(x, layers[-1], attention_fn, choose)  # (B, T or Q, D)
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """The tied head: (B, T, D) -> (B, T, V)."""
        return F.linear(self.norm(x), self.wte.weight[: self.vocab])

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        prefix_kv: Tensor | None = None,
        beams: int = 1,
        max_new: int = 100,
        eos: int = 50256,
        banned: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """The tokens that follow each prompt, without eos: greedy for one beam, else beam search.

        A finished text of n tokens scores log p / n.
        banned: tokens that are never written.
        Raises ValueError if a prompt is empty, or if its text would not fit the context.
        """
        # What cannot be written is refused before anything is computed.
        if not all(prompts):
            raise ValueError("a prompt is empty; a text needs a token to start from")
        length = 0 if prefix_kv is None else prefix_kv.shape[-2]
        longest = length + max(map(len, prompts)) + max_new - 1
        if longest > self.context:
            raise ValueError(f"prefix, prompt and text need {longest} positions of {self.context}")

        # Frozen weights in bf16 need autocast, for the norms stay fp32.
        device, cast = self.wpe.device.type, self.wte.weight.dtype == torch.bfloat16
        with torch.autocast(device, torch.bfloat16) if cast else nullcontext():
            cache = Cache(self, prompts, prefix_kv, room=beams * (max_new - 1))
            return search(cache, beams, max_new, eos, banned)

    @torch.no_grad()
    def cast_frozen_weights(self) -> None:
        """Cast the matrices of a frozen GPT to bf16 once, not in every step. Norms, wpe stay fp32.

        GPT-2's logits lie between -30 and -120, where bf16 knows quarters and halves only. What
        they have in common is the mean of wte, and softmax does not see it. So the mean moves from
        wte to wpe; their sum stays as it was.
        """
        # wte + wpe stays as it was.
        mean = self.wte.weight.mean(0)  # (D,)
        self.wte.weight -= mean
        self.wpe += mean

        # Products are computed in bf16; what is added up, in fp32.
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
        # What is shipped, and what this repository trained: the file tells its sizes.
        if name == "scratch_gpt":
            return cls(**TINY_GPT)
        if name == "tiny_gpt" or name.endswith(".safetensors"):
            path = TINY_GPT_WEIGHTS if name == "tiny_gpt" else Path(name)
            state, metadata = read_weights(path)
            if "gpt" not in metadata:
                raise ValueError(f"{path} holds no GPT of this repository; give a folder for one")
            return build(cls, json.loads(metadata["gpt"]), state, path)

        # A folder of transformers.
        if Path(name).is_dir():
            sizes = read_config(Path(name, "config.json"))
            return build(cls, sizes, converted(read_folder(Path(name))), name)

        # The hub's names, with their owner or without.
        for hub_id, sizes in HUB.items():
            if name in (hub_id, hub_id.split("/")[1]):
                if not pretrained:
                    return cls(**sizes)
                path = Path(hf_hub_download(hub_id, "model.safetensors"))
                return build(cls, sizes, converted(read_weights(path)[0]), path)
        names = ", ".join(["tiny_gpt", "scratch_gpt", *HUB])
        raise ValueError(f"no GPT '{name}'; possible are {names}, a folder or a .safetensors")


# Writing texts.


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
            x = block(x, attention_fn=partial(self.attention, layer))  # (B, W, D)
        self.position = self.position + 1
        return self.model.logits(x)

    def attention(self, layer: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of W new tokens, whose k and v go into the layer's cache: (B, H, W, Dh)."""
        filled = layer.narrow(-2, 0, layer.shape[-2] - self.free)  # (2, B, H, K, Dh)
        filled[..., -q.shape[2] :, :] = torch.stack([k, v])
        mask = self.seen[:, None, :, -filled.shape[-2] :]  # without a prefix L columns fewer
        return attention(q, filled[0], filled[1], mask)

    def keep(self, rows: list[int]) -> None:
        """Only these prompts stay."""
        for i, layer in enumerate(self.kv):
            self.kv[i] = layer[:, rows]
        self.seen, self.position = self.seen[rows], self.position[rows]


def search(
    cache: Cache, beams: int, max_new: int, eos: int, banned: tuple[int, ...]
) -> list[list[int]]:
    """Beam search for `generate`; with one beam it is greedy. W is 1 at first, then `beams`."""
    # Every prompt starts with one beam, which has written nothing.
    logits = cache.logits  # (B, 1, V)
    count, device = len(logits), logits.device
    scores = torch.zeros(count, 1, device=device)  # (B, W): log p of every beam
    text = torch.zeros(count, 1, 0, dtype=torch.long, device=device)  # (B, W, n): its tokens

    # Which prompt a row of the batch belongs to, and the finished texts of every prompt, as
    # (score, tokens), the best one first.
    live = list(range(count))
    found: list[list[tuple[float, list[int]]]] = [[] for _ in live]
    for n in range(1, max_new + 1):
        # log p of every token; a greedy search needs none, only the best token.
        logits = logits.float() if beams == 1 else F.log_softmax(logits.float(), -1)
        logits[..., list(banned)] = -torch.inf

        # The best ways to go on: twice as many as beams, as up to half of them may end.
        if beams == 1:
            top, index = logits.flatten(1).max(-1, keepdim=True)  # (B, 1)
        else:
            top, index = (logits + scores.unsqueeze(-1)).flatten(1).topk(2 * beams)  # (B, 2 beams)

        # Each continues a beam, its parent, with a token.
        parent, token = index // logits.shape[-1], index % logits.shape[-1]
        text = text.take_along_dim(parent.unsqueeze(-1), dim=1)
        text = torch.cat([text, token.unsqueeze(-1)], dim=-1)  # (B, 2 beams, n)

        # Texts that end are finished, if they are among the best `beams`.
        ends = (token == eos) | (n == max_new)
        for row, i in ends[:, :beams].nonzero().tolist():
            best = found[live[row]]
            best.append(((top[row, i] / n).item(), text[row, i].tolist()))
            best.sort(key=lambda pair: -pair[0])
            del best[beams:]

        # The best of those that do not end go on.
        scores, chosen = top.masked_fill(ends, -torch.inf).topk(beams)  # 2 x (B, beams)
        parent, token = parent.gather(1, chosen), token.gather(1, chosen)
        text = text.take_along_dim(chosen.unsqueeze(-1), dim=1)  # (B, beams, n)

        # A prompt leaves when no beam can beat the worst of its `beams` finished texts.
        hope = (scores[:, 0] / n).tolist()
        rows = [r for r, p in enumerate(live) if len(found[p]) < beams or hope[r] > found[p][-1][0]]
        if n == max_new or not rows:
            break

        # Its rows are left out of all that follows.
        if len(rows) < len(live):
            cache.keep(rows)
            live = [live[row] for row in rows]
            parent, token, text, scores = (t[rows] for t in (parent, token, text, scores))
        logits = cache.step(parent, token)

    # The best text of every prompt, without eos.
    best = [texts[0][1] for texts in found]
    return [text[:-1] if text[-1] == eos else text for text in best]


# Reading other people's weights.

# What GPT-2's files call the parts of this model.
OURS = """
h.           blocks.
ln_1         norm1
attn.c_attn  attn.qkv
attn.c_proj  attn.proj
ln_2         norm2
mlp.c_fc     mlp.fc1
mlp.c_proj   mlp.fc2
ln_f         norm
wpe.weight   wpe
"""
SIZES = {"vocab": "vocab_size", "context": "n_positions", "dim": "n_embd"}
SIZES |= {"n_layer": "n_layer", "n_head": "n_head", "eps": "layer_norm_epsilon"}
# What a config.json says of a plain GPT-2, or does not say: transformers' default comes first.
PLAIN = """
model_type                       gpt2
activation_function              gelu_new gelu_pytorch_tanh
scale_attn_weights               True
scale_attn_by_inverse_layer_idx  False
tie_word_embeddings              True
"""


def read_config(path: Path) -> dict:
    """The sizes that a config.json of transformers names; the others are gpt2's, as they are there.

    Raises ValueError if it describes no GPT-2.
    """
    # What the weights would not show.
    config = json.loads(path.read_text())
    for line in PLAIN.strip().splitlines():
        name, *possible = line.split()
        value = str(config.get(name, possible[0]))
        if value not in possible:
            raise ValueError(f"{path} says {name} {value}; gpt.py holds a plain GPT-2 only")

    # Sizes under our names.
    return {ours: config[theirs] for ours, theirs in SIZES.items() if theirs in config}


def converted(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors under our names. Its linear layers keep (in, out), ours (out, in)."""
    state = {}
    for key, value in theirs.items():
        # Older files hold masks, too.
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue

        # A linear layer, turned; then its name.
        if ".c_" in key and key.endswith("weight"):
            value = value.mT.contiguous()
        state[renamed(key.removeprefix("transformer."), OURS)] = value

    # The head is the table of tokens once more.
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):
        raise ValueError("its lm_head differs from wte; gpt.py holds a GPT-2 with a tied head only")
    return state
