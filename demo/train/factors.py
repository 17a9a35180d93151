"""Packs the factors of all skills into one file, a byte per number or half of one, and unpacks them.

    python factors.py pack factors-shared/ -o factors.npz
    python factors.py pack factors-own/ --step 0.35 -o factors-own.npz
    python factors.py unpack factors.npz -o factors-shared/

Each of the rank rows of A, and each of the rank columns of B, has one step between the numbers that are left: its largest number over 127,
or with --step a part of its root mean square. A third of that leaves about 4 bits to each number when they are compressed.
examine.py on what was unpacked gives the recorded accuracies for factors.npz; README.md says what the coarser step costs.
"""

import argparse
import os

import numpy

from model import Shape


def keys(rank):
    """Name and shape of every factor as it is packed: rank first."""
    shape = Shape()
    for i in range(shape.layers):
        for name, inputs, outputs in shape.projections():
            yield f"blk.{i}.{name}.lora_a", (rank, inputs)
            yield f"blk.{i}.{name}.lora_b", (rank, outputs)


def pack(folder, path, step):
    names = sorted(os.path.splitext(f)[0] for f in os.listdir(folder) if f.endswith(".npz"))
    numbers, scales, rank = [], [], 0
    for name in names:
        arrays = numpy.load(os.path.join(folder, name + ".npz"))
        rank = arrays["blk.0.attn_q.lora_a"].shape[0]
        rows = [arrays[k].T if k.endswith("_b") else arrays[k] for k, _ in keys(rank)]
        rows = [r.astype(numpy.float32) for r in rows]
        scale = [numpy.maximum(numpy.abs(r).max(1), 1e-7) / 127 for r in rows]
        if step:
            scale = [numpy.maximum(s, numpy.sqrt((r * r).mean(1)) * step) for r, s in zip(rows, scale)]
        numbers.append(numpy.concatenate([numpy.rint(r / s[:, None]).astype(numpy.int8).ravel() for r, s in zip(rows, scale)]))
        scales.append(numpy.concatenate(scale).astype(numpy.float32))
    numpy.savez_compressed(path, names=numpy.array(names), rank=rank, numbers=numpy.stack(numbers), scales=numpy.stack(scales))


def unpack(path, folder):
    os.makedirs(folder, exist_ok=True)
    packed = numpy.load(path)
    rank = int(packed["rank"])
    for name, numbers, scales in zip(packed["names"], packed["numbers"], packed["scales"]):
        arrays, at = {}, 0
        for i, (key, shape) in enumerate(keys(rank)):
            size = shape[0] * shape[1]
            rows = numbers[at:at + size].reshape(shape) * scales[i * rank:(i + 1) * rank, None]
            arrays[key] = (rows.T if key.endswith("_b") else rows).astype(numpy.float16)
            at += size
        numpy.savez(os.path.join(folder, str(name) + ".npz"), **arrays)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=("pack", "unpack"))
    arguments.add_argument("source")
    arguments.add_argument("-o", required=True)
    arguments.add_argument("--step", type=float)
    args = arguments.parse_args()
    if args.what == "pack":
        pack(args.source, args.o, args.step)
    else:
        unpack(args.source, args.o)


if __name__ == "__main__":
    main()
