"""Draws a terminal with what a command printed, as an SVG. No packages; the same text gives the same file.

    python demo/still.py -o demo/tour.svg -- target/release/lory demo --color on
    python demo/still.py -o demo/chat.svg --title 'lory chat' < transcript.txt

Of escape sequences it knows those that Lory prints: bold, dim, and the eight colours. Lines that are too long are cut.
"""

import argparse
import re
import subprocess
import sys
import unicodedata
from xml.sax.saxutils import escape

COLUMNS = 112
SIZE = 14
# Of the usual monospaced fonts; lines are stretched to it, so that columns stay below each other in any of them.
ADVANCE = 8.4
LINE = 19
MARGIN = 16
BAR = 30
BACKGROUND, TEXT = "#16181d", "#d7dae0"
COLOURS = ["#3b3f4a", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#d7dae0"]
SEQUENCE = re.compile(r"\x1b\[([0-9;]*)m")


def width(text):
    """Columns that a terminal gives to a text."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def runs(line):
    """(style, text) pieces of a line; a style is an SVG attribute list."""
    style, at, pieces = "", 0, []
    for match in SEQUENCE.finditer(line):
        pieces.append((style, line[at:match.start()]))
        at = match.end()
        for code in (int(c or 0) for c in match[1].split(";")):
            if code == 0:
                style = ""
            elif code == 1:
                style += ' font-weight="bold"'
            elif code == 2:
                style += ' opacity="0.6"'
            elif 30 <= code <= 37:
                style += f' fill="{COLOURS[code - 30]}"'
    pieces.append((style, line[at:]))
    return [(style, text) for style, text in pieces if text]


def draw(text, title):
    lines = text.rstrip("\n").split("\n")
    height = BAR + MARGIN + LINE * len(lines) + MARGIN
    across = 2 * MARGIN + COLUMNS * ADVANCE
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{across:.0f}" height="{height}" viewBox="0 0 {across:.0f} {height}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
    ]
    out += [f'<circle cx="{20 + 18 * i}" cy="{BAR / 2 + 2:g}" r="5.5" fill="{COLOURS[c]}"/>' for i, c in enumerate((1, 3, 2))]
    font = f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="{SIZE}" fill="{TEXT}"'
    out.append(f'<g {font} xml:space="preserve" style="white-space: pre">')
    out.append(f'<text x="{across / 2:.1f}" y="{BAR / 2 + 7:g}" text-anchor="middle" opacity="0.6">{escape(title)}</text>')
    for i, line in enumerate(lines):
        column, y = 0, BAR + MARGIN + LINE * i + SIZE - 2
        for style, piece in runs(line.expandtabs()):
            while width(piece) > COLUMNS - column:
                piece = piece[:-1]
            # Blanks at either end are left to the position: not every viewer keeps them.
            shown = piece.strip(" ")
            if shown:
                x = MARGIN + (column + len(piece) - len(piece.lstrip(" "))) * ADVANCE
                length = width(shown) * ADVANCE
                out.append(
                    f'<text x="{x:.1f}" y="{y}" textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"{style}>{escape(shown)}</text>'
                )
            column += width(piece)
    return "\n".join([*out, "</g>", "</svg>", ""])


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("-o", required=True, help="the SVG")
    arguments.add_argument("--title", help="stands above [default: the command]")
    arguments.add_argument("command", nargs="*", help="what to run; without, standard input is drawn")
    args = arguments.parse_args()
    if args.command:
        text = subprocess.run(args.command, check=True, stdout=subprocess.PIPE).stdout.decode()
    else:
        text = sys.stdin.buffer.read().decode()
    known = SEQUENCE.sub("", text)
    if any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in known):
        sys.exit("the text has control characters other than colours: it would look different on a terminal")
    program = [args.command[0].rsplit("/", 1)[-1], *args.command[1:]] if args.command else []
    title = args.title if args.title is not None else " ".join(program)
    with open(args.o, "w", encoding="utf-8", newline="\n") as file:
        file.write(draw(text, title))


if __name__ == "__main__":
    main()
