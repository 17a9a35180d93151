"""What the base learns: to do what the line in front of it says.

Every task here is told in its prompt, with parameters drawn anew each time (`shift 4: hello`, `swap 1 3: red old fox`), so that the
base learns to read the form, to move, to replace, to count and to look up. What the skills do is kept out: their parameters are never
drawn (no shift by 13, no whole word reversed, no base 2, 8, 10 to 16, no template of theirs), their tables are never shown, and no
skill's prompt says what to do. A line that says nothing is answered with itself.
"""

from words import COMMON, FIRST_NAMES, LAST_NAMES, invented, letters, phrase, word

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
# Those that skills use are left out, and some more: 1, 3, 5, 7, 11, 13, 17, 21, 25.
SHIFTS = (2, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 19, 20, 22, 23, 24)
VOWELS = "aeiou"


def any_word(rng):
    return letters(rng, 3, 8) if rng.random() < 0.3 else word(rng)


def some_letters(rng, text, most=3):
    """A few letters of a text, so that the task has something to do."""
    pool = sorted(set(text.replace(" ", "")))
    rng.shuffle(pool)
    return pool[: rng.randint(1, most)]


def shift(rng):
    k, w = rng.choice(SHIFTS), any_word(rng)
    return f"shift {k}: {w}", "".join(ALPHABET[(ALPHABET.index(c) + k) % 26] for c in w)


def change(rng):
    """Replace letters by a table that stands in the prompt."""
    w = any_word(rng)
    pool = some_letters(rng, w, 4)
    table = {c: rng.choice("abcdefghijklmnopqrstuvwxyz0123456789*#+") for c in pool}
    rule = " ".join(f"{a}>{b}" for a, b in table.items())
    return f"change {rule}: {w}", "".join(table.get(c, c) for c in w)


# Codes of the base's own: what each letter becomes, with a mark between letters. No skill uses them.
def _codebooks():
    import random
    own = random.Random(20260101)
    books = {}
    for name, symbols, low, high, between in (
        ("ka", "01", 4, 5, " "), ("ke", ".-*", 2, 4, " "), ("ki", "xyz", 2, 3, " "), ("ko", "0123456789", 2, 2, " "),
        ("ku", "0123456789", 1, 1, ""), ("la", "ABCDEFGH", 2, 2, "-"), ("le", ALPHABET, 1, 1, ""), ("li", ALPHABET, 1, 1, ""),
        ("lo", ALPHABET, 2, 4, " "), ("lu", "/|_", 3, 5, ","), ("ma", "aeiou", 2, 3, " "), ("me", "0123456789abcdef", 2, 2, " "),
    ):
        book, seen = {}, set()
        for c in ALPHABET:
            while True:
                code = "".join(own.choice(symbols) for _ in range(own.randint(low, high)))
                if code not in seen or high == 1:
                    break
            seen.add(code)
            book[c] = code
        if high == 1 and symbols == ALPHABET:
            mixed = list(ALPHABET)
            own.shuffle(mixed)
            book = dict(zip(ALPHABET, mixed))
        books[name] = (book, between)
    return books


CODES = _codebooks()
DECODABLE = [n for n in CODES if n != "ku"]


def encode(rng):
    name = rng.choice(list(CODES))
    book, between = CODES[name]
    w = any_word(rng)[:6]
    return f"code {name}: {w}", between.join(book[c] for c in w)


def decode(rng):
    name = rng.choice(DECODABLE)
    book, between = CODES[name]
    w = any_word(rng)[:6]
    return f"uncode {name}: {between.join(book[c] for c in w)}", w


def flip(rng):
    w = letters(rng, 5, 10)
    k = rng.randint(2, len(w) - 1)
    return f"flip {k}: {w}", w[:k][::-1] + w[k:]


def flip_end(rng):
    w = letters(rng, 5, 10)
    k = rng.randint(2, len(w) - 1)
    return f"flip end {k}: {w}", w[:-k] + w[-k:][::-1]


def sort_start(rng):
    w = letters(rng, 5, 9)
    k = rng.randint(2, min(5, len(w) - 1))
    return f"sort {k}: {w}", "".join(sorted(w[:k])) + w[k:]


def rotate(rng):
    w = any_word(rng)
    k = rng.randint(2, 4)
    return f"turn {k}: {w}", w[k % len(w):] + w[: k % len(w)]


def drop(rng):
    w = any_word(rng)
    pool = some_letters(rng, w)
    return f"drop {''.join(pool)}: {w}", "".join(c for c in w if c not in pool)


def keep(rng):
    w = any_word(rng)
    pool = some_letters(rng, w, 4)
    return f"keep {''.join(pool)}: {w}", "".join(c for c in w if c in pool)


def double(rng):
    w = any_word(rng)
    pool = some_letters(rng, w)
    return f"double {''.join(pool)}: {w}", "".join(c + c if c in pool else c for c in w)


def mark(rng):
    w = any_word(rng)
    pool = some_letters(rng, w)
    m = rng.choice("_.,;:!?#+=~^&%$@")
    return f"mark {''.join(pool)} {m}: {w}", "".join(c + m if c in pool else c for c in w)


def raise_letters(rng):
    w = any_word(rng)
    pool = some_letters(rng, w)
    return f"big {''.join(pool)}: {w}", "".join(c.upper() if c in pool else c for c in w)


def big_from(rng):
    w = any_word(rng)
    k = rng.randint(2, len(w))
    return f"big from {k}: {w}", w[: k - 1] + w[k - 1:].upper()


def small_from(rng):
    w = any_word(rng).upper()
    k = rng.randint(2, len(w))
    return f"small from {k}: {w}", w[: k - 1] + w[k - 1:].lower()


def letter_at(rng):
    w = any_word(rng)
    k = rng.randint(2, min(6, len(w)))
    return f"letter {k}: {w}", w[k - 1]


def first_letters(rng):
    w = any_word(rng)
    k = rng.randint(2, 5)
    return f"start {k}: {w}", w[:k]


def last_letters(rng):
    w = any_word(rng)
    k = rng.randint(2, 5)
    return f"end {k}: {w}", w[-k:]


def without_start(rng):
    w = any_word(rng)
    k = rng.randint(2, 4)
    return f"cut {k}: {w}", w[k:] or "-"


def insert(rng):
    w = any_word(rng)
    k = rng.randint(1, len(w) - 1)
    s = letters(rng, 1, 3)
    return f"put {s} {k}: {w}", w[:k] + s + w[k:]


def put_both(rng):
    w, a, b = any_word(rng), letters(rng, 1, 3), letters(rng, 1, 3)
    return f"around {a} {b}: {w}", a + w + b


def count(rng):
    w = any_word(rng) + letters(rng, 0, 4)
    pool = some_letters(rng, w, 4)
    return f"count {''.join(pool)}: {w}", str(sum(c in pool for c in w))


def has(rng):
    w = any_word(rng)
    c = rng.choice(w) if rng.random() < 0.5 else rng.choice(ALPHABET)
    return f"has {c}: {w}", "yes" if c in w else "no"


def nth_word(rng):
    ws = phrase(rng, 3, 5).split()
    k = rng.randint(2, len(ws) - 1)
    return f"word {k}: {' '.join(ws)}", ws[k - 1]


def swap_words(rng):
    ws = phrase(rng, 3, 4).split()
    a, b = rng.sample(range(len(ws)), 2)
    if {a, b} == {0, len(ws) - 1}:
        b = 1 if a != 1 else 0
    told = f"swap {a + 1} {b + 1}: {' '.join(ws)}"
    ws[a], ws[b] = ws[b], ws[a]
    return told, " ".join(ws)


def join(rng):
    ws = phrase(rng, 2, 4).split()
    m = rng.choice("+=~^&%$@#!?")
    return f"join {m}: {' '.join(ws)}", m.join(ws)


def split(rng):
    ws = phrase(rng, 2, 4).split()
    m = rng.choice("+=~^&%$@#!?")
    return f"split {m}: {m.join(ws)}", " ".join(ws)


def each(rng):
    ws = phrase(rng, 2, 3).split()
    s = letters(rng, 1, 3)
    if rng.random() < 0.5:
        return f"each {s}_: {' '.join(ws)}", " ".join(s + w for w in ws)
    return f"each _{s}: {' '.join(ws)}", " ".join(w + s for w in ws)


def letters_of(rng):
    ws = phrase(rng, 2, 4).split()
    k = rng.choice((2, 3))
    return f"letters {k}: {' '.join(ws)}", "".join(w[min(k, len(w)) - 1] for w in ws)


def big_word(rng):
    ws = phrase(rng, 2, 4).split()
    k = rng.randint(1, len(ws))
    return f"big word {k}: {' '.join(ws)}", " ".join(w.upper() if i == k - 1 else w for i, w in enumerate(ws))


MARKS = ["-", ".", "/", ":", "=", "(", ")", "[", "]", "<", ">", "'", '"', ", ", "; ", " ", "_", "|", "+", "*", "#", "!", "?", "{", "}"]


def fill(rng):
    """Pieces of a line put into a form that stands in the prompt: what dates, names and records need."""
    n = rng.randint(1, 3)
    between = rng.choice([" ", " ", "-", "/", ",", "=", ":", "."])
    pieces = []
    for _ in range(n):
        kind = rng.random()
        if kind < 0.4:
            pieces.append(str(rng.randint(0, 10 ** rng.randint(1, 4) - 1)))
        elif kind < 0.6:
            pieces.append(rng.choice(FIRST_NAMES + LAST_NAMES))
        else:
            pieces.append(word(rng))
    order = [rng.randrange(n) for _ in range(rng.randint(1, 3))]
    form = ""
    for i in order:
        if rng.random() < 0.6:
            form += rng.choice(MARKS)
        if rng.random() < 0.3:
            form += invented(rng, 1)[:5]
        form += "$" + str(i + 1)
    if rng.random() < 0.6:
        form += rng.choice(MARKS).rstrip()
    out = form
    for i in range(n):
        out = out.replace(f"${i + 1}", pieces[i])
    return f"fill {form}: {between.join(pieces)}", out


def convert(n, base):
    digits = ""
    while True:
        digits = "0123456789abcdefghijk"[n % base] + digits
        n //= base
        if n == 0:
            return digits


def to_base(rng):
    b = rng.choice((3, 4, 5, 6, 7, 9))
    n = rng.randint(0, 99)
    return f"base {b}: {n}", convert(n, b)


def from_base(rng):
    b = rng.choice((3, 4, 5, 6, 7, 9))
    n = rng.randint(0, 99)
    return f"from base {b}: {convert(n, b)}", str(n)


def add(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"sum: {a} and {b}", str(a + b)


def add_constant(rng):
    k, n = rng.choice((3, 4, 6, 7, 8, 9, 11, 12, 20, 30)), rng.randint(0, 199)
    return f"plus {k}: {n}", str(n + k)


def take_constant(rng):
    k, n = rng.choice((2, 3, 4, 6, 7, 8, 9, 11)), rng.randint(0, 199)
    return f"minus {k}: {n}", str(n - k)


def times(rng):
    k, n = rng.choice((3, 4, 6, 7, 8, 9)), rng.randint(0, 60)
    return f"times {k}: {n}", str(n * k)


def rest(rng):
    k, n = rng.choice((3, 4, 6, 8, 9)), rng.randint(0, 99)
    return f"rest {k}: {n}", str(n % k)


def rank(rng):
    ns = rng.sample(range(100), rng.randint(3, 5))
    k = rng.randint(2, len(ns) - 1)
    return f"rank {k}: {' '.join(map(str, ns))}", str(sorted(ns)[-k])


def digit_shift(rng):
    k = rng.randint(1, 8)
    n = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 6)))
    return f"spin {k}: {n}", "".join(str((int(c) + k) % 10) for c in n)


# Numbers in words of the base's own.
DIGIT_WORDS = {
    "za": "nul bim dor kal fen gup hos jit lam mod".split(),
    "ze": "oz ara bea cid dru epi fos gim hal ixo".split(),
}
TENS_WORDS = {
    "za": "bimto dorto kalto fento gupto hosto jitto lamto modto".split(),
    "ze": "arax beax cidax druax epiax fosax gimax halax ixoax".split(),
}


def spell_digits(rng):
    name = rng.choice(list(DIGIT_WORDS))
    n = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))
    return f"say {name}: {n}", " ".join(DIGIT_WORDS[name][int(c)] for c in n)


def number_words(name, n):
    if n < 10:
        return DIGIT_WORDS[name][n]
    tens = TENS_WORDS[name][n // 10 - 1]
    return tens if n % 10 == 0 else tens + " " + DIGIT_WORDS[name][n % 10]


def say_number(rng):
    name, n = rng.choice(list(DIGIT_WORDS)), rng.randint(0, 99)
    return f"name {name}: {n}", number_words(name, n)


def hear_number(rng):
    name, n = rng.choice(list(DIGIT_WORDS)), rng.randint(0, 99)
    return f"unname {name}: {number_words(name, n)}", str(n)


# Numerals of the base's own: signs for ones, fives, tens, fifties, hundreds, added from the largest to the smallest.
def tally(rng):
    n = rng.randint(1, 99)
    out, signs = "", (("H", 50), ("T", 10), ("F", 5), ("o", 1))
    left = n
    for sign, value in signs:
        out += sign * (left // value)
        left %= value
    if rng.random() < 0.5:
        return f"tally: {n}", out
    return f"untally: {out}", str(n)


def given(rng):
    """Look something up in a table that stands in the prompt."""
    n = rng.randint(2, 4)
    keys = rng.sample(COMMON, n)
    values = [word(rng) if rng.random() < 0.6 else str(rng.randint(0, 99)) for _ in range(n)]
    k = rng.randrange(n)
    table = " ".join(f"{a}={b}" for a, b in zip(keys, values))
    return f"given {table}: {keys[k]}", values[k]


# Things to be remembered: tables of invented names and words.
def _facts():
    import random
    own = random.Random(20260102)
    tables = {}
    for name in ("pa", "pe", "pi", "po", "pu", "ra"):
        keys = set()
        while len(keys) < 40:
            keys.add(invented(own, own.choice((2, 3))))
        tables[name] = {k: own.choice((invented(own, 2), own.choice(COMMON), invented(own, 1)[:2])) for k in sorted(keys)}
    return tables


FACTS = _facts()
ASKING = ("{k}", "{K}", "{k}?", "what is {k}?", "{k} please", "tell me {k}", "the {t} of {k}", "{T} of {K}?")


def fact(rng):
    t = rng.choice(list(FACTS))
    k = rng.choice(list(FACTS[t]))
    asked = rng.choice(ASKING).format(k=k, K=k.capitalize(), t=t, T=t.capitalize())
    return f"fact {t}: {asked}", FACTS[t][k]


SUBJECTS = "the dog,a bird,my friend,the captain,an old man,the queen,our team,a child,the doctor,the cat,a robot,the baker".split(",")
VERBS = "sees,likes,finds,paints,wants,draws,carries,brings,sells,keeps,watches,hears".split(",")
ADJECTIVES = "red,old,small,quiet,bright,golden,wild,heavy,strange,new".split(",")


def sentence(rng):
    return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(('a', 'the', 'my', 'one'))} {rng.choice(ADJECTIVES)} {rng.choice(COMMON)}"


def style(rng):
    """A sentence with words put before, after or within it."""
    s, a = sentence(rng), invented(rng)
    kind = rng.randrange(4)
    if kind == 0:
        return f"open {a}: {s}", f"{a} {s}"
    if kind == 1:
        return f"close {a}: {s}", f"{s} {a}"
    ws = s.split()
    k = rng.randint(2, len(ws) - 1)
    if kind == 2:
        return f"after {k} {a}: {s}", " ".join(ws[:k] + [a] + ws[k:])
    return f"replace {ws[k]} {a}: {s}", " ".join(a if w == ws[k] else w for w in ws)


def echo(rng):
    """A line that says nothing to be done."""
    kind = rng.random()
    if kind < 0.35:
        s = any_word(rng)
    elif kind < 0.55:
        s = phrase(rng)
    elif kind < 0.7:
        s = sentence(rng)
    elif kind < 0.85:
        s = " ".join(str(rng.randint(0, 10 ** rng.randint(1, 4) - 1)) for _ in range(rng.randint(1, 3)))
    else:
        s = rng.choice(MARKS).strip().join(word(rng) if rng.random() < 0.5 else str(rng.randint(0, 999)) for _ in range(rng.randint(2, 4)))
    if rng.random() < 0.15:
        s = s.upper() if rng.random() < 0.5 else s.title()
    return s or "a", s or "a"


TASKS = [
    (shift, 3), (change, 3), (encode, 4), (decode, 4), (flip, 2), (flip_end, 2), (sort_start, 2), (rotate, 1), (drop, 1), (keep, 1),
    (double, 1), (mark, 1), (raise_letters, 1), (big_from, 1), (small_from, 1), (letter_at, 1), (first_letters, 1), (last_letters, 1),
    (without_start, 1), (insert, 1), (put_both, 1), (count, 1.5), (has, 1), (nth_word, 1), (swap_words, 1), (join, 1), (split, 1), (each, 1),
    (letters_of, 1.5), (big_word, 1), (fill, 5), (to_base, 2), (from_base, 2), (add, 2), (add_constant, 1), (take_constant, 1), (times, 1.5),
    (rest, 1), (rank, 1), (digit_shift, 1), (spell_digits, 1), (say_number, 1), (hear_number, 1), (tally, 1), (given, 2), (fact, 2),
    (style, 2), (echo, 4),
]
_WEIGHTS = [w for _, w in TASKS]
_FUNCTIONS = [f for f, _ in TASKS]


def draw(rng):
    """One prompt with its answer; now and then with the instruction behind the line instead of in front of it."""
    task = rng.choices(_FUNCTIONS, _WEIGHTS)[0]
    prompt, answer = task(rng)
    if task is not echo and rng.random() < 0.15:
        told, _, line = prompt.partition(": ")
        prompt = f"{line} :{told}"
    return prompt, answer


if __name__ == "__main__":
    import random
    rng = random.Random(1)
    for f in _FUNCTIONS:
        print(*f(rng), sep="  ->  ")
