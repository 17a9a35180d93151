"""Examines every skill on prompts that no training has seen, base alone and with its LoRA, in PyTorch and F32, and writes skills.json.

    python examine.py --base base.pt --factors shared/ [--extracted loras/] -o skills.json

The factors are read as they are published (F16). --extracted is a folder with what `lory pack extract` makes of the pack's adapters, one
NAME.gguf each: the accuracy that is recorded for the pack. What Lory measures of the same prompts through its own kernels is compared with this.
"""

import argparse
import json
import os

import numpy
import torch

from model import Loras, exact, load_base
from skills import SKILLS, split

QUESTIONS = 50


def load(model, names, folder, alpha):
    """The published factors of some skills, side by side."""
    arrays = [numpy.load(os.path.join(folder, n + ".npz")) for n in names]
    rank = arrays[0]["blk.0.attn_q.lora_a"].shape[0]
    loras = Loras(model.shape, rank, alpha, [0] * len(names))
    for (layer, projection), pair in loras.factors.items():
        for side, which in ((0, "lora_a"), (1, "lora_b")):
            stacked = numpy.stack([a[f"blk.{layer}.{projection}.{which}"] for a in arrays])
            pair[side] = torch.from_numpy(stacked.astype(numpy.float32))
    return loras


def load_extracted(model, name, folder):
    """A LoRA in GGUF, of any rank."""
    import gguf
    reader = gguf.GGUFReader(os.path.join(folder, name + ".gguf"))
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32)) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    loras = Loras(model.shape, 1, 1, [0])
    for (layer, projection), pair in loras.factors.items():
        a, b = (tensors.get(f"blk.{layer}.{projection}.weight.{side}") for side in ("lora_a", "lora_b"))
        if a is None:
            pair[1].detach().zero_()
            continue
        # Scaled here, because ranks may differ between projections.
        pair[0], pair[1] = a[None], b[None] * (alpha / a.shape[0])
    return loras


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--base", required=True)
    arguments.add_argument("--factors", required=True)
    arguments.add_argument("--extracted")
    arguments.add_argument("--alpha", type=float, default=16)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    model = load_base(args.base)
    out, rank = [], 0
    for name, s in SKILLS.items():
        if not os.path.exists(os.path.join(args.factors, name + ".npz")):
            print(f"{name}: not trained")
            continue
        questions = split(name, True, QUESTIONS, "exam")
        alone = sum(exact(model, questions)) / len(questions)
        loras = load(model, [name], args.factors, args.alpha)
        rank = loras.rank
        learned = sum(exact(model, questions, loras)) / len(questions)
        packed = learned
        if args.extracted:
            packed = sum(exact(model, questions, load_extracted(model, name, args.extracted))) / len(questions)
        out.append({
            "name": name, "family": s.family, "title": s.title, "example": dict(zip(("prompt", "answer"), questions[0])),
            "base": round(alone, 4), "lora": round(learned, 4), "pack": round(packed, 4), "tests": [list(q) for q in questions],
        })
        print(f"{s.family:8} {name:16} base {alone:.2f}  lora {learned:.2f}  pack {packed:.2f}", flush=True)
    for kind in ("base", "lora", "pack"):
        print(f"mean {kind} {sum(s[kind] for s in out) / len(out):.4f}")
    with open(args.o, "w") as f:
        # A line for each skill.
        lines = ",\n".join(json.dumps(s, ensure_ascii=False) for s in out)
        f.write(f'{{"seed": 1, "rank": {rank}, "skills": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
