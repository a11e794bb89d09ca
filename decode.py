"""Decoding: greedy and beam search over one cache of keys and values, in which no beam is ever copied.

Beam search keeps the `beams` likeliest beginnings of a text, lets each go on with every token, and keeps the best of
that. The beginnings form a tree whose trunk is the prompt. Three beams after two steps, and the columns of the cache:
    prefix - prompt -+- a -+- d  beam 1               prefix  prompt  a b c  d e f
                     |     '- e  beam 2      beam 1   1 1 1   1 1 1   1 0 0  1 0 0
                     +- b --- f  beam 3      beam 2   1 1 1   1 1 1   1 0 0  0 1 0
                     '- c  (given up)        beam 3   1 1 1   1 1 1   0 1 0  0 0 1
So the keys and values of a node are written once and stay where they are; a beam is a row of the mask on the right, and
to choose other beams is to choose other rows. Prefix and prompt are there once for all beams, and the beams of a text
are the queries of one attention product. Prompts of different length are padded at the right, and the mask hides that.

The rules (which candidates are kept, when a text is done) are those of transformers' `generate`, with the same outputs.
Shapes: B prompts still being written, W beams of each (1 at first), K columns of the cache, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class Cache:
    """The keys and values of B prompts and of all that was written after them. The prompts give the first `logits`.

    room: how many columns to keep free for what will be written.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[list[int]], prefix: Tensor | None, room: int):
        device = model.wpe.device
        tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)  # (B, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,)
        self.model = model
        kv: list[Tensor] = []
        self.logits = model(tokens, prefix, at=lengths[:, None] - 1, kv=kv)  # (B, 1, V)
        self.kv = [F.pad(layer, (0, 0, 0, room)) for layer in kv]  # n_layer x (2, B, H, K, Dh)
        self.free = room
        trunk = kv[0].shape[-2]  # L + T
        self.position = lengths + trunk - tokens.shape[1]  # (B,): of the next token
        self.seen = torch.arange(trunk, device=device) < self.position[:, None, None]  # (B, 1, L + T)

    def step(self, parent: Tensor, token: Tensor) -> Tensor:
        """Beam w becomes beam parent[:, w] with token[:, w] at its end: both (B, W) -> logits (B, W, V)."""
        width = token.shape[1]
        own = torch.eye(width, dtype=torch.bool, device=token.device).expand(len(token), -1, -1)
        self.seen = torch.cat([self.seen.take_along_dim(parent.unsqueeze(-1), dim=1), own], dim=-1)  # (B, W, K)
        self.free -= width
        x = self.model.wte(token) + self.model.wpe[self.position].unsqueeze(1)  # (B, W, D)
        for block, layer in zip(self.model.blocks, self.kv, strict=True):
            filled = layer.narrow(-2, 0, layer.shape[-2] - self.free)
            x = block.step(x, filled, self.seen[:, None, :, -filled.shape[-2] :])  # no prefix here: L columns fewer
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
    found: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]  # finished texts: worth and tokens, best first
    scores = torch.zeros(len(prompts), 1, device=logits.device)
    text = scores.unsqueeze(-1)[..., :0].long()  # (B, 1, 0)
    for n in range(1, max_new + 1):
        logits = logits.float() if beams == 1 else F.log_softmax(logits.float(), -1)
        logits[..., list(banned)] = -torch.inf
        top, parent, token = candidates(logits, scores, beams)  # 3 x (B, 2 W)
        text = torch.cat([text.take_along_dim(parent.unsqueeze(-1), dim=1), token.unsqueeze(-1)], dim=-1)  # (B, 2 W, n)
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
