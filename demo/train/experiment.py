"""The paper's experiment on trained adapters: how few bytes keep how many of their answers.

    python experiment.py --lory target/release/lory --model base.gguf --shared loras-shared/ --own loras-own/ --fixed loras-fixed/ \\
        --together loras-together/ --pack skills.gguf --work /tmp/experiment --skills skills.json -o measured.json

Every line is measured through Lory (`lory compress`, `lory demo --check`) on prompts that no adapter was trained on. Measurements are kept
in the folder --work and not repeated. `results.py` makes the page of measured.json.
"""

import argparse
import json
import os
import random
import shutil
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
            command = [self.args.lory, "demo", "--check", "--json", "--answers", "--samples", self.args.samples, "--model", model or self.args.model, *options, *chosen]
            # Exit code 1 says that the mean is below the recorded one, as it will be for many of these.
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            if done.returncode not in (0, 1) or not done.stdout:
                raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr.decode()}")
            with open(kept, "wb") as f:
                f.write(done.stdout)
        return json.load(open(kept))

    def row(self, table, label, source, names, options, bytes_each, err2=None, model=None, **more):
        found = self.examine(label, names, options, model)
        row = {
            "table": table, "label": label, "source": os.path.basename(source), "adapters": len(names), "bytes": bytes_each, "err2": err2,
            "exact": {s["name"]: s["pack"] for s in found["skills"]},
            "answers": {s["name"]: s["answers"] for s in found["skills"]}, **more,
        }
        self.rows.append(row)
        mean = sum(row["exact"].values()) / len(names)
        print(f"{table:10} {label:28} {len(names):4} adapters  exact {mean:.4f}  {(bytes_each or 0) / 1024:8.1f} KiB each  err2 {err2}", flush=True)
        return row

    def uncompressed(self, table, source, names, model=None, suffix="", **more):
        """The LoRAs as they were trained."""
        size = sum(lora_bytes(source, n) for n in names) / len(names)
        label = f"{os.path.basename(source)}-{len(names)}-{names[0]}-lora{suffix}"
        return self.row(table, label, source, names, ["--adapters", source], size, 0.0, model, method="lora", **more)

    def compressed(self, table, source, names, rank, clusters, method="full", core="Q8_0", basis="Q8_0", model=None, suffix="", **more):
        """One compression: a pack of these adapters, examined."""
        label = f"{os.path.basename(source)}-{len(names)}-{method}-r{rank}-k{clusters}-{core}-{basis}{suffix}"
        pack, report = self.path(label + ".gguf"), self.path(label + "-report")
        if not os.path.exists(pack):
            files = [os.path.join(source, n + ".gguf") for n in names]
            self.run("compress", "-m", self.args.model, "-o", pack, "--rank", rank, "--clusters", clusters, "--method", method,
                     "--core-type", core, "--basis-type", basis, "--report", report, *files)
        told = json.load(open(os.path.join(report, "report.json")))
        size = (told["basis_bytes"] + told["core_bytes"]) / len(names)
        return self.row(table, label, source, names, ["--pack", pack], size, told["err2"]["mean"], model, rank=rank, clusters=clusters,
                        method=method, basis_bytes=told["basis_bytes"], core_bytes=told["core_bytes"], file_bytes=told["bytes_after"], **more)


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


FORMATS = (("F16", "F16"), ("Q8_0", "Q8_0"), ("Q4_0", "Q8_0"), ("Q8_0", "Q4_0"), ("Q4_0", "Q4_0"))


def methods(bench, source):
    """All adapters, each method at several sizes."""
    names = bench.names
    bench.uncompressed("methods", source, names)
    for rank in (1, 2, 4):
        folder = bench.path(f"{os.path.basename(source)}-svd{rank}")
        error = truncated(source, names, rank, folder)
        bench.row("methods", f"svd-r{rank}", source, names, ["--adapters", folder], lora_bytes(folder, names[0]), error, method="svd", rank=rank)
    for rank, clusters in ((16, 1), (32, 1), (64, 1), (128, 1), (16, 8), (32, 4), (32, 8)):
        bench.compressed("methods", source, names, rank, clusters)
    for rank in (16, 32):
        bench.compressed("methods", source, names, rank, 1, "diag")


def number(bench, source):
    """Ever more adapters on one basis."""
    for count in [n for n in (16, 32, 64, 128) if n < len(bench.names)] + [len(bench.names)]:
        names = bench.names[:count]
        bench.uncompressed("number", source, names)
        for rank in (32, 64):
            bench.compressed("number", source, names, rank, 1)


def initialisation(bench, shared, own):
    """The same skills, trained from one A and each from its own."""
    names = [n for n in bench.names if os.path.exists(os.path.join(own, n + ".gguf"))]
    for source in (shared, own):
        bench.uncompressed("initialisation", source, names)
        for rank in (16, 32, 64, 128):
            bench.compressed("initialisation", source, names, rank, 1)


def trained(bench, source, fixed, together, pack):
    """What training beyond the compression does, and the pack that is shipped."""
    names = bench.names
    bench.uncompressed("trained", source, names, said="LoRA")
    for folder, said in ((fixed, "cores trained"), (together, "cores and bases trained")):
        for core, basis in (("F16", "F16"), ("Q4_0", "Q4_0")) if folder else ():
            row = bench.compressed("trained", folder, names, 32, 1, "full", core, basis, said=f"{said}; {core}, {basis}")
    if pack:
        bench.row("trained", "pack", pack, names, ["--pack", pack], row["bytes"], method="full", rank=32, clusters=1, said="the pack; Q4_0, Q4_0")


def later(bench, source):
    """Bases of 128 adapters, the others projected onto them; beside the same adapters compressed together with all."""
    first, last = bench.names[:128], bench.names[128:]
    if not last:
        return
    bench.uncompressed("later", source, last)
    for rank in (32, 64):
        bench.compressed("later", source, first, rank, 1)
        bench.rows.pop()
        pack, grown = bench.path(f"{os.path.basename(source)}-128-full-r{rank}-k1-Q8_0-Q8_0.gguf"), bench.path(f"later-r{rank}.gguf")
        if not os.path.exists(grown):
            shutil.copyfile(pack, grown)
            bench.run("pack", "add", grown, "-m", bench.args.model, *[os.path.join(source, n + ".gguf") for n in last])
        bench.row("later", f"added-r{rank}", source, last, ["--pack", grown], None, None, method="added", rank=rank)
        together = bench.compressed("later", source, bench.names, rank, 1)
        together.update({"label": f"together-r{rank}", "adapters": len(last)})
        for what in ("exact", "answers"):
            together[what] = {n: together[what][n] for n in last}


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--lory", "--model", "--shared", "--work", "--skills"):
        arguments.add_argument(flag, required=True)
    arguments.add_argument("--own", help="the collection with independent initialisations; left out if not given")
    arguments.add_argument("--fixed", help="the first collection as train_together.py trained it in bases that were fixed; left out if not given")
    arguments.add_argument("--together", help="the same with the bases trained too; left out if not given")
    arguments.add_argument("--pack", help="the shipped pack, of the same sites and formats as --together in Q4_0")
    arguments.add_argument("--samples", type=int, default=50, help="prompts of each skill at most")
    arguments.add_argument("--quantized", nargs="*", default=[], metavar="NAME=FILE", help="further formats of the base")
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    args.shared, args.own, args.fixed, args.together = (f and f.rstrip("/") for f in (args.shared, args.own, args.fixed, args.together))
    bench = Bench(args)
    methods(bench, args.shared)
    number(bench, args.shared)
    if args.own:
        initialisation(bench, args.shared, args.own)
    for core, basis in FORMATS:
        bench.compressed("formats", args.shared, bench.names, 64, 1, "full", core, basis)
    if args.fixed or args.together:
        trained(bench, args.shared, args.fixed, args.together, args.pack)
    for name, file in (q.split("=", 1) for q in args.quantized):
        bench.uncompressed("bases", args.shared, bench.names, file, f"-on-{name}")
        bench.compressed("bases", args.shared, bench.names, 64, 1, model=file, suffix=f"-on-{name}")
    later(bench, args.shared)
    with open(args.o, "w") as f:
        json.dump(bench.rows, f)


if __name__ == "__main__":
    main()
