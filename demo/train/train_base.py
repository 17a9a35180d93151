"""Trains the base on drawn tasks (base_tasks.py) for a given time, and writes its weights.

    python train_base.py --minutes 50 -o base.pt
"""

import argparse
import random
import time

import numpy
import torch
import torch.nn.functional as F

from base_tasks import TASKS, draw
from model import Base, VOCABULARY, encode, exact

# Lengths that sequences are padded to: few, so that few programs are compiled.
LENGTHS = (24, 32, 48, 72)


class Batches:
    """Endless batches of about as many positions each, sequences of similar lengths together."""

    def __init__(self, seed, positions):
        self.rng = random.Random(seed)
        self.positions = positions
        self.waiting = {n: [] for n in LENGTHS}

    def __next__(self):
        while True:
            prompt, answer = encode(*draw(self.rng))
            ids = prompt + answer
            length = next((n for n in LENGTHS if len(ids) - 1 <= n), None)
            if length is None:
                continue
            waiting = self.waiting[length]
            waiting.append((ids, len(prompt)))
            if len(waiting) * length < self.positions:
                continue
            tokens = numpy.zeros((len(waiting), length), numpy.int64)
            wanted = numpy.full((len(waiting), length), -100, numpy.int64)
            for row, (ids, start) in enumerate(waiting):
                tokens[row, : len(ids) - 1] = ids[:-1]
                wanted[row, start - 1: len(ids) - 1] = ids[start:]
            waiting.clear()
            return torch.from_numpy(tokens), torch.from_numpy(wanted)


def report(model, per_task=20):
    """Exact match of each task on fresh draws."""
    rng = random.Random(99)
    cases = [(f.__name__, *f(rng)) for f, _ in TASKS for _ in range(per_task)]
    right = dict.fromkeys((c[0] for c in cases), 0)
    for (name, _, _), good in zip(cases, exact(model, [c[1:] for c in cases])):
        right[name] += good
    return {n: r / per_task for n, r in right.items()}


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--minutes", type=float, default=50)
    arguments.add_argument("--positions", type=int, default=6144)
    arguments.add_argument("--rate", type=float, default=0.02)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    arguments.add_argument("--steps", type=int, default=0, help="stop after as many steps, for trying things")
    arguments.add_argument("--from", dest="begin", help="weights to go on from")
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = Base()
    if args.begin:
        model.load_state_dict(torch.load(args.begin))
    run = torch.compile(model)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    matrices = [p for b in model.blocks for p in b.values() if p.ndim == 2]
    others = [model.embedding, model.norm] + [p for b in model.blocks for p in b.values() if p.ndim == 1]
    if args.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=args.rate, momentum=0.95, weight_decay=0.01, ns_steps=4),
            torch.optim.AdamW(others, lr=args.rate / 7, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
    else:
        optimizers = [torch.optim.AdamW(matrices + others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    batches = Batches(args.seed, args.positions)
    begun, step, sum_loss, seen = time.time(), 0, 0.0, 0
    budget = args.minutes * 60
    saved = begun
    while True:
        # Constant after a short rise, falling to nothing over the last third of the time.
        part = (time.time() - begun) / budget
        if part >= 1 or (args.steps and step >= args.steps):
            break
        factor = min(1.0, (step + 1) / 40, (1 - part) / 0.35)
        for o, rate in zip(optimizers, rates):
            o.param_groups[0]["lr"] = rate * factor
        tokens, wanted = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = run(tokens)
        loss = F.cross_entropy(logits.float().view(-1, VOCABULARY), wanted.view(-1), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for o in optimizers:
            o.step()
            o.zero_grad()
        step += 1
        seen += tokens.numel()
        sum_loss += float(loss.detach())
        if step % 50 == 0:
            seconds = time.time() - begun
            print(f"step {step} loss {sum_loss / 50:.4f} factor {factor:.2f} {seconds:.0f} s {seen / seconds:.0f} positions/s", flush=True)
            sum_loss = 0.0
        if time.time() - saved > 300:
            saved = time.time()
            torch.save(model.state_dict(), args.o + ".part")
            found = report(model, 8)
            print("exact", f"{sum(found.values()) / len(found):.3f}", {n: round(v, 2) for n, v in found.items()}, flush=True)
    torch.save(model.state_dict(), args.o)
    found = report(model)
    print("exact", f"{sum(found.values()) / len(found):.3f}", found, flush=True)


if __name__ == "__main__":
    main()
