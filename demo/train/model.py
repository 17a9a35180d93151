"""The base: a small decoder in Llama's shape over bytes, and LoRAs beside its projections, many trained at once.

Shapes are (sequences, positions, width). Rotary pairs are neighbours (2i, 2i+1), as GGUF files of the `llama` architecture have them, so
that nothing is permuted on the way out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Tokens: the 256 bytes, then these.
BOS, EOS, SEP = 256, 257, 258
VOCABULARY = 259


@dataclass
class Shape:
    width: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    inner: int = 640
    rope: float = 10000.0
    eps: float = 1e-5

    def projections(self):
        """Name in a GGUF file, inputs, outputs: the seven of a layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return [
            ("attn_q", self.width, q), ("attn_k", self.width, kv), ("attn_v", self.width, kv), ("attn_output", q, self.width),
            ("ffn_gate", self.width, self.inner), ("ffn_up", self.width, self.inner), ("ffn_down", self.inner, self.width),
        ]


def encode(prompt, answer=None):
    """Token ids of a prompt, and of its answer when there is one."""
    ids = [BOS, *prompt.encode(), SEP]
    return ids if answer is None else (ids, [*answer.encode(), EOS])


def rotate(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class Base(torch.nn.Module):
    def __init__(self, shape=Shape()):
        super().__init__()
        self.shape = shape
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, shape.width) * 0.02)
        self.norm = torch.nn.Parameter(torch.ones(shape.width))
        self.blocks = torch.nn.ModuleList()
        for _ in range(shape.layers):
            block = torch.nn.ParameterDict()
            for name, inputs, outputs in shape.projections():
                scale = 1 / math.sqrt(inputs)
                if name in ("attn_output", "ffn_down"):
                    scale /= math.sqrt(2 * shape.layers)
                block[name] = torch.nn.Parameter(torch.randn(outputs, inputs) * scale)
            block["attn_norm"] = torch.nn.Parameter(torch.ones(shape.width))
            block["ffn_norm"] = torch.nn.Parameter(torch.ones(shape.width))
            self.blocks.append(block)

    def angles(self, positions):
        half = torch.arange(0, self.shape.head, 2, device=positions.device).float() / self.shape.head
        angle = positions[:, None].float() * self.shape.rope ** -half
        return angle.cos(), angle.sin()

    def forward(self, tokens, loras=None):
        """Logits (sequences, positions, vocabulary); `loras` is a `Loras`, whose adapters take equal shares of the sequences."""
        s = self.shape
        n, t = tokens.shape

        def project(i, name, x):
            y = F.linear(x, self.blocks[i][name])
            return y if loras is None else y + loras.delta(i, name, x)

        cos, sin = self.angles(torch.arange(t))
        x = F.embedding(tokens, self.embedding)
        for i, block in enumerate(self.blocks):
            h = F.rms_norm(x, (s.width,), block["attn_norm"], s.eps)
            q = rotate(project(i, "attn_q", h).view(n, t, s.heads, s.head).transpose(1, 2), cos, sin)
            k = rotate(project(i, "attn_k", h).view(n, t, s.kv_heads, s.head).transpose(1, 2), cos, sin)
            v = project(i, "attn_v", h).view(n, t, s.kv_heads, s.head).transpose(1, 2)
            groups = s.heads // s.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            a = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
            x = x + project(i, "attn_output", a.transpose(1, 2).reshape(n, t, -1))
            h = F.rms_norm(x, (s.width,), block["ffn_norm"], s.eps)
            x = x + project(i, "ffn_down", F.silu(project(i, "ffn_gate", h)) * project(i, "ffn_up", h))
        return F.linear(F.rms_norm(x, (s.width,), self.norm, s.eps), self.embedding)


def load_base(path):
    """The base of a training (`.pt`) or as it is published (`.gguf`), not to be trained further."""
    model = Base()
    if path.endswith(".gguf"):
        import gguf
        tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in gguf.GGUFReader(path).tensors}
        names = {"embedding": "token_embd.weight", "norm": "output_norm.weight"}
        state = {key: tensors[names.get(key) or key.replace("blocks.", "blk.") + ".weight"] for key in model.state_dict()}
    else:
        state = torch.load(path)
    model.load_state_dict(state)
    return model.requires_grad_(False)


class Loras:
    """The factors of several adapters side by side: per layer and projection A (adapters, rank, inputs), B (adapters, outputs, rank)."""

    def __init__(self, shape, rank, alpha, seeds):
        self.rank, self.alpha, self.factors = rank, alpha, {}
        for i in range(shape.layers):
            for name, inputs, outputs in shape.projections():
                a = []
                for seed in seeds:
                    g = torch.Generator().manual_seed(1_000_003 * seed + 7919 * i + sum(name.encode()))
                    a.append((torch.rand(rank, inputs, generator=g) * 2 - 1) * math.sqrt(3 / inputs))
                self.factors[i, name] = [
                    torch.stack(a).requires_grad_(),
                    torch.zeros(len(seeds), outputs, rank).requires_grad_(),
                ]

    def parameters(self):
        return [p for pair in self.factors.values() for p in pair]

    def delta(self, i, name, x):
        a, b = self.factors[i, name]
        n, t, width = x.shape
        rows = x.reshape(a.shape[0], -1, width)
        y = torch.bmm(torch.bmm(rows, a.transpose(1, 2).to(x.dtype)), b.transpose(1, 2).to(x.dtype))
        return (y * (self.alpha / self.rank)).view(n, t, -1)


@torch.no_grad()
def exact(model, pairs, loras=None):
    """For each (prompt, answer) whether greedy decoding gives exactly this answer.

    It does if and only if each token of the answer is the most likely one after those before it, so one forward pass tells.
    With `loras`, the pairs of each adapter stand together, as many for each.
    """
    ids = [encode(*pair) for pair in pairs]
    length = max(len(p) + len(a) for p, a in ids) - 1
    tokens = torch.zeros(len(ids), length, dtype=torch.long)
    wanted = torch.full((len(ids), length), -1)
    for row, (p, a) in enumerate(ids):
        tokens[row, : len(p) + len(a) - 1] = torch.tensor((p + a)[:-1])
        wanted[row, len(p) - 1: len(p) + len(a) - 1] = torch.tensor(a)
    best = model(tokens, loras).argmax(-1)
    return ((best == wanted) | (wanted < 0)).all(1).tolist()
