"""Trains one LoRA per skill over the finished base, several at once, and writes their factors.

    python train_skills.py --base base.pt --init shared --part 0/2 -o shared/ & python train_skills.py ... --part 1/2 ...

`--init shared` starts every adapter from the same A, `--init own` each from one of its own; B starts at zero. Adapters train side by side:
the base's products are made once for all of them. A skill stops when it answers a sample of held-out training prompts without a mistake
twice, or when its steps are used up; the prompts that examine it are drawn only in `examine.py`.
"""

import argparse
import os
import random
import time

import numpy
import torch
import torch.nn.functional as F

from model import Loras, VOCABULARY, encode, exact, load_base
from skills import SKILLS, split

PAIRS = 6000
HELD_OUT = 24


class Training:
    """The examples of one skill, and the few of them that tell when it is learned."""

    def __init__(self, name):
        pairs = split(name, False, PAIRS, "train")
        self.rng = random.Random(f"order {name}")
        self.rng.shuffle(pairs)
        held = min(HELD_OUT, len(pairs) // 8)
        self.held, self.pairs = pairs[:held], pairs[held:]
        self.held = (self.held * HELD_OUT)[:HELD_OUT]
        self.name = name
        self.at = 0
        self.perfect = 0

    def batch(self, count):
        chosen = []
        for _ in range(count):
            if self.at == 0:
                self.rng.shuffle(self.pairs)
            chosen.append(self.pairs[self.at])
            self.at = (self.at + 1) % len(self.pairs)
        return chosen


class Adam:
    """Adam for stacked parameters, so that adapters that are finished can be taken out together with their averages."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.count = 0

    @torch.no_grad()
    def step(self, rates, limit=1.0):
        self.count += 1
        # Each adapter's gradient is clipped by its own norm: adapters know nothing of each other.
        norms = torch.stack([p.grad.flatten(1).pow(2).sum(1) for p in self.parameters]).sum(0).sqrt()
        shrink = (limit / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
        a, b = 1 - 0.9**self.count, 1 - 0.99**self.count
        for p, m, v in zip(self.parameters, self.first, self.second):
            g = p.grad * shrink
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.01)
            p -= rates[:, None, None] * (m / a) / ((v / b).sqrt() + 1e-8)
            p.grad = None


def keep(loras, adam, chosen):
    """Leaves only the chosen adapters in training."""
    adam.first = [m[chosen] for m in adam.first]
    adam.second = [v[chosen] for v in adam.second]
    for pair in loras.factors.values():
        pair[0] = pair[0].detach()[chosen].requires_grad_()
        pair[1] = pair[1].detach()[chosen].requires_grad_()
    adam.parameters = loras.parameters()


def write(loras, index, name, folder):
    arrays = {}
    for (layer, projection), (a, b) in loras.factors.items():
        arrays[f"blk.{layer}.{projection}.lora_a"] = a[index].detach().numpy().astype(numpy.float16)
        arrays[f"blk.{layer}.{projection}.lora_b"] = (b[index].detach().numpy()).astype(numpy.float16)
    numpy.savez(os.path.join(folder, name + ".npz"), **arrays)


def learn(model, sets, adapters, count):
    """The losses of `count` examples of each skill, with their gradients made."""
    examples = [encode(*pair) for s in sets for pair in s.batch(count)]
    length = max(len(p) + len(a) for p, a in examples) - 1
    tokens = torch.zeros(len(examples), length, dtype=torch.long)
    wanted = torch.full((len(examples), length), -100)
    for row, (p, a) in enumerate(examples):
        tokens[row, : len(p) + len(a) - 1] = torch.tensor((p + a)[:-1])
        wanted[row, len(p) - 1: len(p) + len(a) - 1] = torch.tensor(a)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, adapters)
    losses = F.cross_entropy(logits.float().view(-1, VOCABULARY), wanted.view(-1), ignore_index=-100, reduction="none")
    losses = losses.view(len(sets), -1).sum(1) / (wanted.view(len(sets), -1) >= 0).sum(1)
    losses.sum().backward()
    return losses


def look(model, sets, adapters):
    """The share of held-out prompts that each skill answers; counts how often in a row that was all of them."""
    with torch.autocast("cpu", torch.bfloat16):
        good = exact(model, [pair for s in sets for pair in s.held], adapters)
    shares = []
    for i, s in enumerate(sets):
        shares.append(sum(good[i * HELD_OUT: (i + 1) * HELD_OUT]) / HELD_OUT)
        s.perfect = s.perfect + 1 if shares[-1] == 1 else 0
    return shares


def groups(names, together, part):
    """The skills that a process trains side by side: those of similar length, so that little is padded."""
    size = {n: max(len(p) + len(a) for p, a in split(n, False, 60, "size")) for n in names}
    names = sorted(names, key=lambda n: size[n])
    part, parts = map(int, part.split("/"))
    return [names[i:i + together] for i in range(0, len(names), together)][part::parts]


def train(model, names, args):
    sets = [Training(n) for n in names]
    order = list(SKILLS)
    loras = Loras(model.shape, args.rank, args.alpha, [0 if args.init == "shared" else 1 + order.index(n) for n in names])
    if args.begin:
        with torch.no_grad():
            for i, name in enumerate(names):
                arrays = numpy.load(os.path.join(args.begin, name + ".npz"))
                for (layer, projection), pair in loras.factors.items():
                    for p, side in zip(pair, ("lora_a", "lora_b")):
                        p[i] = torch.from_numpy(arrays[f"blk.{layer}.{projection}.{side}"].astype(numpy.float32))
    adam = Adam(loras.parameters())
    begun = time.time()
    for step in range(args.steps):
        losses = learn(model, sets, loras, args.batch)
        factor = min(1.0, (step + 1) / 20, 0.1 + 1.2 * (1 - step / args.steps))
        adam.step(torch.full((len(sets),), args.rate * factor))
        if (step + 1) % args.look and step + 1 < args.steps:
            continue
        going = []
        for i, (s, right) in enumerate(zip(sets, look(model, sets, loras))):
            if s.perfect == 2 or step + 1 == args.steps:
                write(loras, i, s.name, args.o)
                print(f"{s.name} {step + 1} steps, held out {right:.2f}, loss {float(losses[i].detach()):.4f}, {time.time() - begun:.0f} s", flush=True)
            else:
                going.append(i)
        if not going:
            return
        if len(going) < len(sets):
            sets = [sets[i] for i in going]
            keep(loras, adam, going)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", required=True)
    arguments.add_argument("--init", choices=("shared", "own"), required=True)
    arguments.add_argument("--part", default="0/1", help="which share of the skills this process trains")
    arguments.add_argument("--together", type=int, default=8, help="adapters trained side by side")
    arguments.add_argument("--rank", type=int, default=8)
    arguments.add_argument("--alpha", type=float, default=16)
    arguments.add_argument("--rate", type=float, default=4e-3)
    arguments.add_argument("--batch", type=int, default=16, help="examples of each skill in a step")
    arguments.add_argument("--steps", type=int, default=220)
    arguments.add_argument("--look", type=int, default=20, help="steps between two looks at the held-out prompts")
    arguments.add_argument("--skills", nargs="*", help="only these")
    arguments.add_argument("--from", dest="begin", metavar="FOLDER", help="go on from these factors, for skills that need longer")
    arguments.add_argument("-o", required=True, help="folder for the factors, one .npz a skill")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.o, exist_ok=True)
    model = load_base(args.base)
    names = [n for n in (args.skills or SKILLS) if not os.path.exists(os.path.join(args.o, n + ".npz"))]
    for group in groups(names, args.together, args.part):
        train(model, group, args)


if __name__ == "__main__":
    main()
