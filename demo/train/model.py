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


def rotate(x, turns):
    """Neighbours are real and imaginary parts, turned by a product of complex numbers."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


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
        return torch.polar(torch.ones_like(angle), angle)

    def attend(self, q, k, v):
        """Causal attention of (sequences, positions, heads, head). The queries of heads that share keys stand below each other, so that
        keys and values are not copied; for sequences this short this is faster than torch's own."""
        n, t, heads, d = q.shape
        kv = k.shape[2]
        q = q.view(n, t, kv, heads // kv, d).permute(0, 2, 3, 1, 4).reshape(n, kv, -1, d)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        mask = torch.full((t, t), float("-inf")).triu(1).repeat(heads // kv, 1)
        weights = F.softmax((q * d**-0.5) @ k.transpose(2, 3) + mask, -1).to(v.dtype)
        return (weights @ v).view(n, kv, heads // kv, t, d).permute(0, 3, 1, 2, 4).reshape(n, t, -1)

    def forward(self, tokens, loras=None):
        """Logits (sequences, positions, vocabulary); `loras` is a `Loras` or alike, whose adapters take equal shares of the sequences."""
        s = self.shape
        n, t = tokens.shape
        # Rounded once for all products of a layer, not by each of them.
        rounded = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32

        def project(i, name, x):
            y = F.linear(x, self.blocks[i][name])
            return y if loras is None else loras.add(i, name, x, y)

        turns = self.angles(torch.arange(t))[:, None]
        x = F.embedding(tokens, self.embedding)
        for i, block in enumerate(self.blocks):
            h = F.rms_norm(x, (s.width,), block["attn_norm"], s.eps).to(rounded)
            q = rotate(project(i, "attn_q", h).view(n, t, s.heads, s.head), turns)
            k = rotate(project(i, "attn_k", h).view(n, t, s.kv_heads, s.head), turns)
            v = project(i, "attn_v", h).view(n, t, s.kv_heads, s.head)
            x = x + project(i, "attn_output", self.attend(q, k, v))
            h = F.rms_norm(x, (s.width,), block["ffn_norm"], s.eps).to(rounded)
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

    def add(self, i, name, x, y):
        """What the adapters make of a projection's input, added to what the base made of it."""
        a, b = self.factors[i, name]
        b = b * (self.alpha / self.rank)
        rows = torch.bmm(x.reshape(a.shape[0], -1, x.shape[-1]), a.transpose(1, 2).to(x.dtype))
        return torch.baddbmm(y.view(a.shape[0], -1, y.shape[-1]), rows, b.transpose(1, 2).to(x.dtype)).view(y.shape)


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
