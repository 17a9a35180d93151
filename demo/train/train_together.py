"""Trains the cores of all skills in shared bases side by side, with or without the bases, and writes the results as factors of LoRAs.

    lory compress -m base.gguf -o bases.gguf --rank 32 --clusters 1 loras-shared
    python train_together.py --base base.pt --pack bases.gguf --factors factors-shared -o together/
    python train_together.py --base base.pt --pack pack.gguf --factors together/ --alpha 32 --fix-bases --round-cores -o rounded/

U and V begin as those of the pack. A core begins as the projection of its adapter, U⁺ B A V⁺ᵀ, which is what the compression gives. Every
step has a few examples of every skill: they move its own core, and all of them together the bases, if those are not fixed. With
--round-cores a step sees the cores as Q4_0 holds them, while the numbers behind them go on moving as if nothing had been rounded.
With fixed bases skills know nothing of each other: one is done when it answers its held-out prompts without a mistake twice.

What comes out lies in the bases exactly: A is V, and B is U times the core. Where a site is left out, an adapter has nothing there.
"""

import argparse
import os
import random
import time

import gguf
import numpy
import torch
import torch.nn.functional as F

from model import load_base
from skills import SKILLS
from train_skills import Adam, Training, groups, learn, look


def read_bases(path, sites):
    """U (1, outputs, r) and V (1, r, inputs) of these sites of a pack of one cluster: stacked as `Adam` wants it, one for all adapters."""
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32))
               for t in gguf.GGUFReader(path).tensors if t.name.startswith("cluster.0.")}
    return {(i, name): [tensors[f"cluster.0.blk.{i}.{name}.basis_{side}"][None] for side in "uv"] for i, name in sites}


def q4_0(numbers):
    """What Q4_0 makes of rows of 32 numbers: the number furthest from zero becomes code 0 of 16, zero code 8."""
    step = numbers.gather(-1, numbers.abs().argmax(-1, keepdim=True)) / -8
    step = torch.where(step == 0, 1.0, step)
    return ((numbers / step + 8.5).clamp(0, 15.99).floor() - 8) * step


class Cores:
    """Adapters of some skills in bases that they share with all: y += U C V x, with C (adapters, r, r)."""

    def __init__(self, bases, names, folder, alpha):
        self.bases, self.cores, self.rounding = bases, {}, False
        arrays = [numpy.load(os.path.join(folder, n + ".npz")) for n in names]
        for (layer, projection), (u, v) in bases.items():
            left, right = torch.linalg.pinv(u[0]), torch.linalg.pinv(v[0])
            begun = []
            for a in arrays:
                lora_a, lora_b = (torch.from_numpy(a[f"blk.{layer}.{projection}.{s}"].astype(numpy.float32)) for s in ("lora_a", "lora_b"))
                begun.append((left @ lora_b) @ (lora_a @ right) * (alpha / lora_a.shape[0]))
            self.cores[layer, projection] = torch.stack(begun).requires_grad_()

    def parameters(self):
        return list(self.cores.values())

    def core(self, site):
        core = self.cores[site]
        return core + (q4_0(core.detach()) - core.detach()) if self.rounding else core

    def add(self, i, name, x, y):
        if (i, name) not in self.bases:
            return y
        u, v = (m[0] for m in self.bases[i, name])
        core = self.core((i, name))
        rows = F.linear(x, v.to(x.dtype)).view(core.shape[0], -1, v.shape[0])
        rows = torch.bmm(rows, core.transpose(1, 2).to(x.dtype)).view(-1, v.shape[0])
        return torch.addmm(y.view(-1, y.shape[-1]), rows, u.t().to(x.dtype)).view(y.shape)


class Examples(Training):
    """Draws what a step learns from by the step's number, so that a training that was broken off goes on as if it had not been."""

    step = 0

    def batch(self, count):
        return random.Random(f"{self.name} {self.step}").choices(self.pairs, k=count)


@torch.no_grad()
def write(cores, index, name, folder):
    arrays = {}
    for (layer, projection), (u, v) in cores.bases.items():
        arrays[f"blk.{layer}.{projection}.lora_a"] = v[0].numpy()
        arrays[f"blk.{layer}.{projection}.lora_b"] = (u[0] @ cores.core((layer, projection))[index]).numpy()
    numpy.savez(os.path.join(folder, name + ".npz"), **arrays)


def finish(sets, cores, adam, right, folder):
    """Writes the skills that are done, and leaves the others in training."""
    for i, (s, share) in enumerate(zip(sets, right)):
        if s.perfect == 2:
            write(cores, i, s.name, folder)
            print(f"{s.name} {share:.2f}", flush=True)
    going = [i for i, s in enumerate(sets) if s.perfect < 2]
    if len(going) < len(sets):
        sets[:] = [sets[i] for i in going]
        adam.first, adam.second = [m[going] for m in adam.first], [m[going] for m in adam.second]
        for site in cores.cores:
            cores.cores[site] = cores.cores[site].detach()[going].requires_grad_()
        adam.parameters = cores.parameters()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", required=True)
    arguments.add_argument("--pack", required=True, help="a pack with one cluster: the bases to begin with")
    arguments.add_argument("--factors", required=True, help="the adapters to begin with")
    arguments.add_argument("--alpha", type=float, default=16, help="of the factors")
    arguments.add_argument("--sites", nargs="+", default=["attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"], help="projections that get cores")
    arguments.add_argument("--fix-bases", action="store_true")
    arguments.add_argument("--round-cores", action="store_true")
    arguments.add_argument("--rate", type=float, default=1e-2, help="of the cores")
    arguments.add_argument("--basis-rate", type=float, default=2e-3)
    arguments.add_argument("--batch", type=int, default=2, help="examples of each skill in a step")
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--look", type=int, default=100, help="steps between two looks at the held-out prompts")
    arguments.add_argument("--part", default="0/1", help="which share of the skills this process trains; only with --fix-bases")
    arguments.add_argument("--together", type=int, default=19, help="skills in one pass through the base")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    os.makedirs(args.o, exist_ok=True)
    model = load_base(args.base)
    for block in model.blocks:
        for p in block.values():
            if p.ndim == 2:
                p.data = p.data.bfloat16()
    sites = [(i, name) for i in range(model.shape.layers) for name, _, _ in model.shape.projections() if name in args.sites]
    bases = read_bases(args.pack, sites)
    done = [os.path.splitext(f)[0] for f in os.listdir(args.o)]
    names = [n for n in SKILLS if os.path.exists(os.path.join(args.factors, n + ".npz")) and n not in done]
    sets = [[Examples(n) for n in of_group] for of_group in groups(names, args.together, args.part)]
    adapters = [Cores(bases, [s.name for s in of_group], args.factors, args.alpha) for of_group in sets]
    for a in adapters:
        a.rounding = args.round_cores
    parts = [(Adam(a.parameters()), args.rate) for a in adapters]
    if not args.fix_bases:
        parts.append((Adam([m.requires_grad_() for pair in bases.values() for m in pair]), args.basis_rate))
    # Where it was broken off. With fixed bases what is done is on disk, and the others begin again.
    kept, first = os.path.join(args.o, "state.pt"), 0
    if os.path.exists(kept):
        first, states = torch.load(kept)
        for (adam, _), (values, adam.first, adam.second) in zip(parts, states):
            adam.count = first
            for p, value in zip(adam.parameters, values):
                p.data.copy_(value)
    begun, lost = time.time(), []
    for step in range(first, args.steps + 1):
        if step % args.look == 0 or step == args.steps:
            with torch.no_grad():
                right = [look(model, s, a) if s else [] for s, a in zip(sets, adapters)]
            shares = sum(right, [])
            print(f"{step} steps, {len(shares)} skills, held out {sum(shares) / max(len(shares), 1):.4f}, loss {sum(lost) / max(len(lost), 1):.4f}, "
                  f"{time.time() - begun:.0f} s", flush=True)
            lost.clear()
            if args.fix_bases:
                for s, a, (adam, _), shares in zip(sets, adapters, parts, right):
                    finish(s, a, adam, shares, args.o)
            elif step > first:
                torch.save((step, [([p.data for p in adam.parameters], adam.first, adam.second) for adam, _ in parts]), kept + ".part")
                os.replace(kept + ".part", kept)
        if step == args.steps:
            break
        losses = []
        for s, a in zip(sets, adapters):
            for one in s:
                one.step = step
            if s:
                losses.append(learn(model, s, a, args.batch).detach())
        if not losses:
            break
        lost.append(float(torch.cat(losses).mean()))
        factor = min(1.0, (step + 1) / 20, 0.02 + 1.25 * (1 - step / args.steps))
        for adam, rate in [(adam, rate) for adam, rate in parts if len(adam.parameters[0])]:
            adam.step(torch.full((adam.parameters[0].shape[0],), rate * factor))
    for of_group, a in zip(sets, adapters):
        for i, s in enumerate(of_group):
            write(a, i, s.name, args.o)
            print(f"{s.name} not perfect" if args.fix_bases else s.name)


if __name__ == "__main__":
    main()
