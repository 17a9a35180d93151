"""Makes the page of results, tables and plots, of what experiment.py measured.

    python results.py --measured measured-*.json --skills skills.json -o ..        writes RESULTS.md and plots/*.svg there

Sections of the page that is there stay as they are where nothing was measured for them.
"""

import argparse
import json
import os
import random
import re

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 360, 60, 46
COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#64473a")


def mean(row):
    return sum(row["exact"].values()) / len(row["exact"])


def interval(values, seed=1, draws=2000):
    """Bootstrap over skills: the middle 95 % of the means of resampled skills."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[int(draws * 0.025)], means[int(draws * 0.975)]


def ratio_interval(row, reference, seed=1, draws=2000):
    """The same for the accuracy as a share of the uncompressed adapters', skills resampled together."""
    rng = random.Random(seed)
    pairs = [(row["exact"][n], reference["exact"][n]) for n in row["exact"]]
    found = []
    for _ in range(draws):
        chosen = rng.choices(pairs, k=len(pairs))
        found.append(sum(a for a, _ in chosen) / max(sum(b for _, b in chosen), 1e-9))
    found.sort()
    return found[int(draws * 0.025)], found[int(draws * 0.975)]


def agreement(row, reference):
    """Share of prompts that are answered as the uncompressed adapter answers them, right or wrong."""
    same = asked = 0
    for name, answers in row["answers"].items():
        same += sum(a == b for a, b in zip(answers, reference["answers"][name]))
        asked += len(answers)
    return same / asked


def plot(path, title, x_label, y_label, lines, log_x=True, y_range=(0.0, 1.0)):
    """Lines of (x, y) points with a legend, as SVG."""
    import math
    xs = [x for _, points in lines for x, _ in points]
    scale = math.log2 if log_x else float
    low, high = scale(min(xs)), scale(max(xs))

    def place(x, y):
        return (LEFT + (scale(x) - low) / ((high - low) or 1) * (WIDTH - LEFT - 150),
                HEIGHT - BOTTOM - (y - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - BOTTOM - 40))

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', f'<text x="{LEFT}" y="22" font-size="14">{title}</text>',
           f'<text x="{(LEFT + WIDTH - 150) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x_label}</text>',
           f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">{y_label}</text>']
    for i in range(5):
        y = y_range[0] + (y_range[1] - y_range[0]) * i / 4
        px = place(min(xs), y)[1]
        out.append(f'<path d="M{LEFT} {px:.1f}H{WIDTH - 150}" stroke="#ddd"/><text x="{LEFT - 6}" y="{px + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    ticks = sorted({round(2 ** (low + (high - low) * i / 4)) if log_x else round(low + (high - low) * i / 4) for i in range(5)})
    for x in ticks:
        px = place(max(min(x, max(xs)), min(xs)), y_range[0])[0]
        out.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x}</text>')
    for i, (name, points) in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        placed = [place(x, min(max(y, y_range[0]), y_range[1])) for x, y in sorted(points)]
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        out.append(f'<text x="{WIDTH - 140}" y="{50 + 18 * i}" fill="{colour}">{name}</text>')
    with open(path, "w") as f:
        f.write("\n".join(out) + "\n</svg>\n")


NAMES = {"lora": "LoRA", "svd": "SVD of each", "full": "JD-Full", "diag": "JD-Diag", "added": "added later"}


def described(row):
    text = NAMES[row["method"]]
    if row.get("rank"):
        text += f", r = {row['rank']}"
    if row.get("clusters", 1) > 1:
        text += f", {row['clusters']} clusters"
    return text


def table(rows, reference, first=described, head="method"):
    out = [f"| {head} | exact | 95 % | of the LoRAs' | 95 % | agrees | err² | KiB each | fewer bytes |", "|---|---|---|---|---|---|---|---|---|"]
    whole = mean(reference)
    for row in rows:
        low, high = interval(list(row["exact"].values()))
        r_low, r_high = ratio_interval(row, reference)
        base = sum(reference["exact"][n] for n in row["exact"]) / len(row["exact"])
        err2 = "–" if row["err2"] is None else f"{row['err2']:.3f}"
        size = "–" if not row["bytes"] else f"{row['bytes'] / 1024:.1f}"
        fewer = "–" if not row["bytes"] else f"{reference['bytes'] / row['bytes']:.1f}×"
        out.append(f"| {first(row)} | {mean(row):.1%} | {low:.1%} – {high:.1%} | {mean(row) / (base or whole):.1%} | {r_low:.1%} – {r_high:.1%} | "
                   f"{agreement(row, reference):.1%} | {err2} | {size} | {fewer} |")
    return "\n".join(out)


def uncompressed(rows):
    return next((r for r in rows if r["method"] == "lora"), None)


def of(rows, name):
    return [r for r in rows if r["table"] == name]


def best(chosen, reference, said):
    """The most accurate of those that are small enough for the aim, or else of those with a tenth of the bytes."""
    small = [[r for r in chosen if reference["bytes"] >= times * r["bytes"]] for times in (20, 10)]
    found = max(small[0] or small[1], key=mean)
    kept, fewer = mean(found) / mean(reference), reference["bytes"] / found["bytes"]
    return (f"Best at {20 if small[0] else 10} times fewer bytes or more{said}: {found.get('said') or described(found)}, {kept:.1%} of the uncompressed "
            f"accuracy at {fewer:.1f} times fewer bytes. (The aim, 99 % at 20 times fewer, is {'reached' if kept >= 0.99 and fewer >= 20 else 'not reached'}.)")


def points(section):
    """(curve, KiB, share kept) of the rows of a table: those of one basis."""
    for row in section.splitlines():
        cells = [c.strip() for c in row.split("|")]
        name = re.match(r"JD-Full, r = \d+$|JD-Diag|SVD of each|cores and bases trained|cores trained|the pack", cells[1] if len(cells) > 9 else "")
        if name:
            yield name[0].split(", r")[0], float(cells[8]), float(cells[4].rstrip("%")) / 100


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--measured", nargs="+", required=True)
    arguments.add_argument("--skills", required=True)
    arguments.add_argument("-o", required=True)
    args = arguments.parse_args()
    plots = os.path.join(args.o, "plots")
    os.makedirs(plots, exist_ok=True)
    skills = json.load(open(args.skills))["skills"]
    rows = [r for file in args.measured for r in json.load(open(file))]
    page_path = os.path.join(args.o, "RESULTS.md")
    earlier = open(page_path).read() if os.path.exists(page_path) else ""
    made = {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip("\n") for part in earlier.split("\n## ")[1:]}
    asked = [len(a) for r in rows if r["table"] != "trained" for a in r["answers"].values()]
    asked = max(asked) if asked else re.search(r"with up to (\d+) prompts", earlier)[1]
    page = ["<!-- Written by demo/train/results.py; change that instead. -->", "# What is left of trained adapters when they share a basis", ""]
    page.append(INTRODUCTION.format(
        skills=len(skills), prompts=sum(len(s["tests"]) for s in skills), base=f"{sum(s['base'] for s in skills) / len(skills):.1%}",
        lora=f"{sum(s['lora'] for s in skills) / len(skills):.1%}", asked=asked))
    page += [FINDINGS, ""]
    counted = of(rows, "number")
    if counted:
        whole = {r["adapters"]: r for r in counted if r["method"] == "lora"}
        lines, rendered = {}, []
        for r in sorted([r for r in counted if r["method"] == "full"], key=lambda r: (r["rank"], r["adapters"])):
            rendered.append(table([r], whole[r["adapters"]], lambda r: f"{r['adapters']}, r = {r['rank']}", "adapters").splitlines())
            lines.setdefault(f"r = {r['rank']}", []).append((r["adapters"], mean(r) / mean(whole[r["adapters"]])))
        plot(os.path.join(plots, "number.svg"), "Accuracy kept against the number of adapters", "adapters on one basis", "exact match, of the LoRAs'",
             list(lines.items()))
        made["Number of adapters on one basis"] = "\n".join([*rendered[0][:2], *(t[2] for t in rendered), "", "![accuracy against number](plots/number.svg)"])
    first = of(rows, "initialisation")
    for source, heading in KINDS.items():
        chosen = [r for r in first if r["source"] == source]
        if chosen:
            which = f"All {len(skills)} skills." if chosen[0]["adapters"] == len(skills) else f"The {chosen[0]['adapters']} skills that were trained in both ways."
            made[heading] = f"{which}\n\n{table(chosen, uncompressed(chosen))}"
    for name, heading in HEADINGS.items():
        chosen = of(rows, name)
        if chosen:
            reference = uncompressed(chosen) or uncompressed(of(rows, "methods"))
            named = {"methods": (described, "method"), "trained": (lambda r: r["said"], "adapters")}.get(name, (lambda r: r["label"], "pack"))
            made[heading] = f"{NOTES[name]}\n\n{table(chosen, reference, *named)}"
            if name in BEST:
                made[heading] += "\n\n" + best(chosen, reference, BEST[name])
    curves = {}
    for name in ("methods", "seven", "trained"):
        for label, size, kept in points(made.get(HEADINGS[name], "")):
            curves.setdefault(label, []).append((size, kept))
    plot(os.path.join(plots, "bytes.svg"), "Accuracy kept against bytes of an adapter", "KiB of an adapter, its part of the bases included",
         "exact match, of the LoRAs'", list(curves.items()))
    made[HEADINGS["methods"]] = made[HEADINGS["methods"]].replace("\n\n" + PICTURE, "") + "\n\n" + PICTURE
    for heading in (HEADINGS["methods"], "Number of adapters on one basis", *KINDS.values(), *list(HEADINGS.values())[1:]):
        if heading in made:
            page += [f"## {heading}", "", made[heading], ""]
    page += ["## Every skill", "", "Exact match in PyTorch (F32, the factors as published) and through Lory.", "",
             "| skill | family | what it does | example | base | LoRA | pack |", "|---|---|---|---|---|---|---|"]
    for s in skills:
        example = f"`{s['example']['prompt']}` → `{s['example']['answer']}`".replace("|", "\\|")
        page.append(f"| {s['name']} | {s['family']} | {s['title']} | {example} | {s['base']:.0%} | {s['lora']:.0%} | {s.get('pack', 0):.0%} |")
    with open(page_path, "w") as f:
        f.write("\n".join(page) + "\n")


PICTURE = "![accuracy against bytes](plots/bytes.svg)"
HEADINGS = {"methods": "Methods and sizes", "trained": "Trained beyond the compression",
            "seven": "Cores at all seven projections", "later": "Adapters that come later",
            "formats": "Formats of cores and bases", "bases": "Formats of the base model"}
KINDS = {"loras-shared": "One initialisation of A for all", "loras-own": "An initialisation of its own for each"}
BEST = {"methods": " by compression alone", "trained": " with training beyond it"}
NOTES = {
    "methods": "SVD of each: every delta by itself, as the best LoRA of a lower rank. JD-Full: U Σ Vᵀ with full cores Σ; JD-Diag: diagonal ones; "
               "with clusters, U and V for each cluster.",
    "later": "Bases made from 128 adapters; the others are projected onto them (`lory pack add`), beside the same adapters compressed together "
             "with all. The intervals are wide: these are few skills.",
    "trained": "What the demo ships is the last row: r = 32 on one basis, with cores at five of the seven projections (not at `attn_k` and `ffn_gate`). "
               "Training begins with the compression's bases and cores, on the prompts that the LoRAs were trained on (`train/train_together.py`): first "
               "cores and bases of all skills together; then, for the pack, the cores alone as Q4_0 rounds them, in the bases as Q4_0 holds them. "
               "A label ends in the format of the cores and that of the bases. That an answer differs from the LoRA's does not mean that it is wrong. "
               "The errors are those of the last rounding alone.",
    "formats": "JD-Full with r = 64 on one basis; the label ends in the format of the cores and that of the bases.",
    "bases": "The same adapters and the same pack over the base in other formats. The references are the adapters over the base in Q8_0.",
}
INTRODUCTION = """The demo's base answers {base} of {prompts} examination prompts of {skills} skills exactly; with one LoRA each (rank 8, all seven projections of
five layers, trained on other prompts) it answers {lora}. Here those LoRAs are compressed as in "Compress then Serve" (arXiv 2407.00066) and
examined again, with up to {asked} prompts of each skill, through Lory's own kernels over the base in Q8_0. *Exact* is the mean over skills of the share of answers that are right to the
last character, with the middle 95 % of 2,000 bootstrap means over skills; *of the LoRAs'* the same as a share of what the uncompressed LoRAs
reach; *agrees* the share of prompts that are answered as the uncompressed LoRA answers them; *err²* the mean squared relative error of
the deltas; *KiB each* the bytes of an adapter's cores and its part of the bases. LoRAs are in F16, bases and cores in Q8_0 unless
said otherwise. To measure anew: [train/](train/README.md).
"""

FINDINGS = """## What it shows

Written by hand about the measurements of 2026-11-22, of 2026-11-28 for what is trained beyond the compression, and of 2026-11-29 for the two
initialisations.

- Answers are kept as long as err² is: nearly all of them up to 0.03, nine in ten at 0.1, two thirds at 0.3, a third at 0.6. The knee is at about 0.1.
- 150 skills of rank 8 in a model of width 256 do not share a basis well: their ranks add up to 1,200. On one basis, err² grows with every adapter, and
  at the same bytes a shared basis alone keeps less than the SVD of each delta by itself. Clusters help (r = 32 with 8 of them keeps twice
  what one keeps), at the price of 8 times the bases. What the paper reports, for 7 billion weights of width 4096, is not found at this size.
- Training mends it. The cores alone, with U and V as they are, at all seven projections: r = 32 goes from 38 % to 99 % of what the LoRAs reach. The
  basis was never too small to do the tasks, only too small to imitate those very LoRAs. Bases and cores of all skills together, at five of the
  seven projections, reach 98.5 %, and 97.7 % in Q4_0; training the cores further as Q4_0 rounds them, the same as the LoRAs: of all 7,366 prompts the
  pack answers 94.9 % through Lory's kernels (95.0 % in PyTorch, as the LoRAs), at 22.0 times fewer bytes. The aim of 99 % at 20 times fewer bytes
  is reached by this training, not by compression. How much of the last step is rounding in training and how much is training longer, and what the
  cores alone reach at five projections, was not measured.
- One A for all makes deltas more alike: err² is 13 to 42 % smaller than with an A for each (r = 16 to 128), and more of the answers are
  kept: 23, 38, 66 and 93 % of the LoRAs' against 20, 33, 59 and 90 %.
- Rounding costs little: cores and bases in Q4_0 together half a point.
- Adapters that come later are worse off than those that the bases were made of, by nearly half at r = 32 and 64.
"""

if __name__ == "__main__":
    main()
