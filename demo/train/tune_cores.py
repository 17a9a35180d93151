"""Trains the cores of compressed adapters a little further, in bases that stay as they are, and writes the results as LoRAs.

    lory compress -m base.gguf -o bases.gguf --rank 32 --clusters 1 loras-shared
    python tune_cores.py --base base.pt --pack bases.gguf --factors factors-shared -o tuned/
    lory compress -m base.gguf -o skills.gguf --rank 32 --clusters 1 --core-type Q4_0 tuned/

U and V are those of the pack. A core begins as the projection of its adapter, U⁺ B A V⁺ᵀ, which is what the compression gives; then the
same training as before moves nothing else. What comes out lies in the bases exactly, so that compressing it again loses nothing but bits.
"""

import argparse
import os
import time

import gguf
import numpy
import torch
import torch.nn.functional as F

from export import write_lora
from model import load_base
from skills import SKILLS
from train_skills import Adam, Training, groups, learn, look


def read_bases(path, shape):
    """U (outputs, r) and V (r, inputs) of every site of a pack of one cluster."""
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32))
               for t in gguf.GGUFReader(path).tensors if t.name.startswith("cluster.0.")}
    bases, v = {}, None
    for i in range(shape.layers):
        for name, inputs, _ in shape.projections():
            u = tensors[f"cluster.0.blk.{i}.{name}.basis_u"]
            # Sites that read the same input may share the V of the first of them.
            v = tensors.get(f"cluster.0.blk.{i}.{name}.basis_v", v)
            assert v.shape == (u.shape[1], inputs)
            bases[i, name] = (u, v)
    return bases


class Cores:
    """Adapters in shared bases: y += U C V x, with C (adapters, r, r) alone in training."""

    def __init__(self, bases, names, folder, scale):
        self.bases, self.cores = bases, {}
        arrays = [numpy.load(os.path.join(folder, n + ".npz")) for n in names]
        for (layer, projection), (u, v) in bases.items():
            left, right = torch.linalg.pinv(u), torch.linalg.pinv(v)
            started = []
            for a in arrays:
                lora_a, lora_b = (torch.from_numpy(a[f"blk.{layer}.{projection}.{s}"].astype(numpy.float32)) for s in ("lora_a", "lora_b"))
                started.append((left @ lora_b) @ (lora_a @ right) * scale)
            self.cores[layer, projection] = torch.stack(started).requires_grad_()

    def parameters(self):
        return list(self.cores.values())

    def delta(self, i, name, x):
        u, v = self.bases[i, name]
        core = self.cores[i, name]
        n, t, _ = x.shape
        rows = F.linear(x, v).view(core.shape[0], -1, v.shape[0])
        return F.linear(torch.bmm(rows, core.transpose(1, 2).to(rows.dtype)), u).view(n, t, -1)


def write(cores, index, name, folder):
    arrays, rank = {}, 0
    for (layer, projection), core in cores.cores.items():
        u, v = cores.bases[layer, projection]
        rank = v.shape[0]
        arrays[f"blk.{layer}.{projection}.lora_a"] = v.numpy().astype(numpy.float16)
        arrays[f"blk.{layer}.{projection}.lora_b"] = (u @ core[index].detach()).numpy().astype(numpy.float16)
    write_lora(arrays, name, rank, os.path.join(folder, name + ".gguf"))


def train(model, bases, names, args):
    sets = [Training(n) for n in names]
    cores = Cores(bases, names, args.factors, args.alpha / args.rank)
    adam = Adam(cores.parameters())
    begun = time.time()
    for step in range(args.steps + 1):
        if step % args.look == 0 or step == args.steps:
            going = []
            for i, (s, right) in enumerate(zip(sets, look(model, sets, cores))):
                if step == 0:
                    s.before = right
                if s.perfect == 2 or step == args.steps:
                    write(cores, i, s.name, args.o)
                    print(f"{s.name} {step} steps, held out {s.before:.2f} before, {right:.2f}, {time.time() - begun:.0f} s", flush=True)
                else:
                    going.append(i)
            if not going:
                return
            if len(going) < len(sets):
                sets = [sets[i] for i in going]
                adam.first = [m[going] for m in adam.first]
                adam.second = [v[going] for v in adam.second]
                for site in cores.cores:
                    cores.cores[site] = cores.cores[site].detach()[going].requires_grad_()
                adam.parameters = cores.parameters()
        learn(model, sets, cores, args.batch)
        factor = min(1.0, (step + 1) / 10, 0.1 + 1.2 * (1 - step / args.steps))
        adam.step(torch.full((len(sets),), args.rate * factor))


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", required=True)
    arguments.add_argument("--pack", required=True, help="a pack of these adapters with one cluster")
    arguments.add_argument("--factors", required=True)
    arguments.add_argument("--rank", type=float, default=8, help="of the factors")
    arguments.add_argument("--alpha", type=float, default=16, help="of the factors")
    arguments.add_argument("--part", default="0/1", help="which share of the skills this process trains")
    arguments.add_argument("--together", type=int, default=8)
    arguments.add_argument("--rate", type=float, default=1e-2)
    arguments.add_argument("--batch", type=int, default=16)
    arguments.add_argument("--steps", type=int, default=160)
    arguments.add_argument("--look", type=int, default=20)
    arguments.add_argument("--skills", nargs="*")
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    os.makedirs(args.o, exist_ok=True)
    model = load_base(args.base)
    bases = read_bases(args.pack, model.shape)
    names = [n for n in (args.skills or SKILLS)
             if os.path.exists(os.path.join(args.factors, n + ".npz")) and not os.path.exists(os.path.join(args.o, n + ".gguf"))]
    for group in groups(names, args.together, args.part):
        train(model, bases, group, args)


if __name__ == "__main__":
    main()
