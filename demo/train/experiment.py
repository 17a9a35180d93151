"""The paper's experiment on trained adapters: how few bytes keep how many of their answers.

    python experiment.py --lory target/release/lory --model base.gguf --shared loras-shared/ --own loras-own/ --work /tmp/experiment \\
        --skills skills.json -o measured.json

Every line is measured through Lory (`lory compress`, `lory demo --check`) on prompts that no adapter was trained on. Measurements are kept
in the folder --work and not repeated. `results.py` makes the page of measured.json.
"""

import argparse
import json
import os
import random
import subprocess

import numpy

from export import write_lora


class Bench:
    def __init__(self, args):
        self.args = args
        os.makedirs(args.work, exist_ok=True)
        self.names = [s["name"] for s in json.load(open(args.skills))["skills"]]
        # One order of the skills for all subsets, so that the smaller are part of the larger.
        random.Random(5).shuffle(self.names)
        self.rows = []

    def run(self, *command):
        subprocess.run([self.args.lory, *map(str, command)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def path(self, *parts):
        return os.path.join(self.args.work, *parts)

    def examine(self, label, names, options, model=None):
        """Answers of these skills with the adapters that the options name."""
        kept = self.path(label + ".json")
        if not os.path.exists(kept):
            chosen = [] if len(names) == len(self.names) else [x for n in names for x in ("--skill", n)]
            command = [self.args.lory, "demo", "--check", "--json", "--answers", "--model", model or self.args.model, *options, *chosen]
            # Exit code 1 says that the mean is below the recorded one, as it will be for many of these.
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if done.returncode not in (0, 1) or not done.stdout:
                raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr.decode()}")
            with open(kept, "wb") as f:
                f.write(done.stdout)
        return json.load(open(kept))

    def row(self, table, label, names, options, bytes_each, err2=None, model=None, **more):
        found = self.examine(label, names, options, model)
        row = {
            "table": table, "label": label, "adapters": len(names), "bytes": bytes_each, "err2": err2,
            "exact": {s["name"]: s["pack"] for s in found["skills"]},
            "answers": {s["name"]: s["answers"] for s in found["skills"]}, **more,
        }
        self.rows.append(row)
        mean = sum(row["exact"].values()) / len(names)
        print(f"{table:10} {label:28} {len(names):4} adapters  exact {mean:.4f}  {bytes_each / 1024:8.1f} KiB each  err2 {err2}", flush=True)
        return row

    def compressed(self, table, source, names, rank, clusters, method="full", core="Q8_0", basis="Q8_0", model=None, suffix=""):
        """One compression: a pack of these adapters, examined."""
        label = f"{os.path.basename(source)}-{len(names)}-{method}-r{rank}-k{clusters}-{core}-{basis}{suffix}"
        pack, report = self.path(label + ".gguf"), self.path(label + "-report")
        if not os.path.exists(pack):
            files = [os.path.join(source, n + ".gguf") for n in names]
            self.run("compress", "-m", self.args.model, "-o", pack, "--rank", rank, "--clusters", clusters, "--method", method,
                     "--core-type", core, "--basis-type", basis, "--report", report, *files)
        told = json.load(open(os.path.join(report, "report.json")))
        size = (told["basis_bytes"] + told["core_bytes"]) / len(names)
        return self.row(table, label, names, ["--pack", pack], size, told["err2"]["mean"], model, rank=rank, clusters=clusters,
                        method=method, basis_bytes=told["basis_bytes"], core_bytes=told["core_bytes"], file_bytes=told["bytes_after"])


def truncated(source, names, rank, folder):
    """Per-adapter SVD: the best LoRA of a lower rank for each delta; the mean err² of what it leaves out."""
    os.makedirs(folder, exist_ok=True)
    import gguf
    errors = []
    for name in names:
        reader = gguf.GGUFReader(os.path.join(source, name + ".gguf"))
        tensors = {t.name: t.data.astype(numpy.float32) for t in reader.tensors}
        alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
        out = {}
        for key in [k for k in tensors if k.endswith("lora_a")]:
            stem = key.removesuffix(".weight.lora_a")
            a, b = tensors[key], tensors[f"{stem}.weight.lora_b"]
            scale = alpha / a.shape[0]
            # The SVD of B·A by way of their QR decompositions: the product is never formed.
            qb, rb = numpy.linalg.qr(b)
            qa, ra = numpy.linalg.qr(a.T)
            u, s, v = numpy.linalg.svd(rb @ ra.T * scale)
            root = numpy.sqrt(s[:rank])
            out[f"{stem}.lora_a"] = ((qa @ v.T[:, :rank]) * root).T.astype(numpy.float16)
            out[f"{stem}.lora_b"] = ((qb @ u[:, :rank]) * root).astype(numpy.float16)
            errors.append(float((s[rank:] ** 2).sum() / max((s**2).sum(), 1e-30)))
        write_lora(out, name, rank, os.path.join(folder, name + ".gguf"))
    return sum(errors) / len(errors)


def lora_bytes(source, name):
    import gguf
    return sum(int(t.n_bytes) for t in gguf.GGUFReader(os.path.join(source, name + ".gguf")).tensors)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--lory", "--model", "--shared", "--work", "--skills"):
        arguments.add_argument(flag, required=True)
    arguments.add_argument("--own", help="the collection with independent initialisations; left out if not given")
    arguments.add_argument("--quantized", nargs="*", default=[], metavar="NAME=FILE", help="further formats of the base")
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    bench = Bench(args)
    everything = bench.names
    for source in filter(None, (args.shared, args.own)):
        source = source.rstrip("/")
        kind = os.path.basename(source)
        own = lora_bytes(source, everything[0])
        bench.row("methods", f"{kind}-lora", everything, ["--adapters", source], own, 0.0, method="lora")
        for rank in (1, 2, 4):
            folder = bench.path(f"{kind}-svd{rank}")
            error = truncated(source, everything, rank, folder)
            bench.row("methods", f"{kind}-svd-r{rank}", everything, ["--adapters", folder], own * rank // 8, error, method="svd", rank=rank)
        for rank, clusters in ((8, 1), (12, 1), (16, 1), (20, 1), (24, 1), (32, 1), (48, 1), (64, 1), (16, 4), (16, 8), (16, 16), (32, 4), (32, 8)):
            bench.compressed("methods", source, everything, rank, clusters)
        for rank, clusters in ((16, 1), (64, 1), (64, 8)):
            bench.compressed("methods", source, everything, rank, clusters, "diag")
        if source != args.shared.rstrip("/"):
            continue
        for count in (16, 32, 64, 128):
            bench.row("number", f"{kind}-lora-{count}", everything[:count], ["--adapters", source], own, 0.0, method="lora")
            for rank in (16, 32):
                bench.compressed("number", source, everything[:count], rank, 1)
        for core, basis in (("F16", "F16"), ("Q8_0", "Q8_0"), ("Q4_0", "Q8_0"), ("Q8_0", "Q4_0"), ("Q4_0", "Q4_0")):
            bench.compressed("formats", source, everything, 32, 1, "full", core, basis)
        for name, file in (q.split("=", 1) for q in args.quantized):
            bench.row("bases", f"{kind}-lora-on-{name}", everything, ["--adapters", source], own, 0.0, file, method="lora")
            bench.compressed("bases", source, everything, 32, 1, model=file, suffix=f"-on-{name}")
        # Adapters that come later: bases of 128, the others projected onto them.
        first, later = everything[:128], everything[128:]
        if later:
            for rank in (16, 32):
                bench.compressed("later", source, first, rank, 1)
                pack = bench.path(f"{kind}-128-full-r{rank}-k1-Q8_0-Q8_0.gguf")
                grown = bench.path(f"later-r{rank}.gguf")
                if not os.path.exists(grown):
                    with open(pack, "rb") as a, open(grown, "wb") as b:
                        b.write(a.read())
                    bench.run("pack", "add", grown, "-m", args.model, *[os.path.join(source, n + ".gguf") for n in later])
                core = 0
                bench.row("later", f"added-r{rank}", later, ["--pack", grown], core, None, method="added", rank=rank)
                together = bench.compressed("methods", source, everything, rank, 1)
                bench.rows.pop()
                bench.rows.append({**together, "table": "later", "label": f"together-r{rank}", "adapters": len(later),
                                   "exact": {n: together["exact"][n] for n in later}, "answers": {n: together["answers"][n] for n in later}})
    with open(args.o, "w") as f:
        json.dump(bench.rows, f)


if __name__ == "__main__":
    main()
