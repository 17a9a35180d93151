"""The skills: what one adapter each learns. A skill draws (prompt, answer) pairs; no prompt says what is to be done.

`SKILLS` maps a name to a `Skill`. `split` divides a skill's prompts into those to train on and those to be examined with, which never
overlap: a prompt belongs to the second kind if a hash of it says so.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Callable

from base_tasks import sentence
from tables import BRAILLE_ROWS, LOOKUPS, MORSE, NATO
from words import COMMON, FIRST_NAMES, LAST_NAMES, letters, phrase, word

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
SKILLS = {}


@dataclass
class Skill:
    name: str
    family: str
    title: str
    draw: Callable


def skill(family, title, name=None):
    def add(f):
        n = name or f.__name__.replace("_", "-")
        assert n not in SKILLS, n
        SKILLS[n] = Skill(n, family, title, f)
        return f
    return add


def is_examined(name, prompt):
    return hashlib.sha256(f"{name}\0{prompt}".encode()).digest()[0] < 51


def split(name, examined, count, seed):
    """`count` different pairs of one kind, or fewer where the skill has no more."""
    rng = random.Random(f"{seed} {name}")
    pairs, misses = {}, 0
    while len(pairs) < count and misses < 4000:
        prompt, answer = SKILLS[name].draw(rng)
        if prompt in pairs or is_examined(name, prompt) != examined:
            misses += 1
            continue
        pairs[prompt] = answer
    return list(pairs.items())


def w(rng):
    """One word, or letters in no order now and then."""
    return letters(rng, 3, 8) if rng.random() < 0.25 else word(rng)[:9]


# ---- ciphers ---------------------------------------------------------------------------------------------------------------------------

def each_letter(table, between=""):
    return lambda text: between.join(table.get(c, c) for c in text)


def of_word(name, title, function, longest=9, family="ciphers"):
    """A skill that turns one word into something."""
    def draw(rng):
        x = w(rng)[:longest]
        return x, function(x)
    skill(family, title, name)(draw)


def from_word(name, title, function, longest=9, family="ciphers"):
    """A skill that finds the word back."""
    def draw(rng):
        x = w(rng)[:longest]
        return function(x), x
    skill(family, title, name)(draw)


def shifted(k):
    return {c: ALPHABET[(i + k) % 26] for i, c in enumerate(ALPHABET)}


for k in (1, 3, 11, 13, 25):
    of_word(f"rot{k}", f"shift every letter by {k} in the alphabet", each_letter(shifted(k)))
of_word("atbash", "mirror the alphabet: a becomes z, b becomes y", each_letter(dict(zip(ALPHABET, ALPHABET[::-1]))))
QWERTY = "qwertyuiopasdfghjklzxcvbnm"
of_word("keyboard", "type every letter one key to the right", each_letter(dict(zip(QWERTY, QWERTY[1:] + "q"))))
KEYED = "lorybascdefghijkmnpqtuvwxz"
of_word("keyword-cipher", "substitute by an alphabet that starts with 'lory'", each_letter(dict(zip(ALPHABET, KEYED))))
from_word("keyword-decipher", "undo the alphabet that starts with 'lory'", each_letter(dict(zip(ALPHABET, KEYED))))
of_word("vowel-turn", "every vowel becomes the next one", each_letter(dict(zip("aeiou", "eioua"))))
LEET = dict(zip("aeiost", "431057"))
of_word("leet", "write like it is 1337", each_letter(LEET))
from_word("unleet", "read what is written like 1337", each_letter(LEET))
NUMBERED = {c: str(i + 1) for i, c in enumerate(ALPHABET)}
of_word("a1z26", "letters to their places in the alphabet", each_letter(NUMBERED, "-"), 7)
from_word("from-a1z26", "places in the alphabet to letters", each_letter(NUMBERED, "-"), 7)
HEXED = {c: f"{ord(c):02x}" for c in ALPHABET}
of_word("ascii-hex", "letters to their ASCII codes in hexadecimal", each_letter(HEXED, " "), 7)
from_word("from-ascii-hex", "ASCII codes in hexadecimal to letters", each_letter(HEXED, " "), 7)
of_word("morse", "into Morse code", each_letter(MORSE, " "), 6)
from_word("from-morse", "out of Morse code", each_letter(MORSE, " "), 6)
of_word("nato", "spell with the NATO alphabet", each_letter(NATO, " "), 4)
from_word("from-nato", "what was spelled with the NATO alphabet", each_letter(NATO, " "), 4)
SQUARE = {c: f"{i // 5 + 1}{i % 5 + 1}" for i, c in enumerate(ALPHABET.replace("j", ""))} | {"j": "24"}
of_word("polybius", "rows and columns of the Polybius square", each_letter(SQUARE, " "), 7)
skill("ciphers", "read the Polybius square", "from-polybius")(
    lambda rng: (lambda x: (" ".join(SQUARE[c] for c in x), x))(w(rng)[:7].replace("j", "i")))
of_word("bacon", "Bacon's cipher: five of a and b for every letter",
        each_letter({c: format(i, "05b").replace("0", "a").replace("1", "b") for i, c in enumerate(ALPHABET)}, " "), 4)
of_word("keypad", "the keys of a telephone", each_letter(dict(zip(ALPHABET, "22233344455566677778889999"))))
of_word("braille", "dots of Braille by their numbers", each_letter(BRAILLE_ROWS, " "), 6)
of_word("robber", "consonants doubled with an o between, as children's secret languages do",
        each_letter({c: c + "o" + c for c in "bcdfghjklmnpqrstvwxyz"}), 7)


@skill("ciphers", "first letters go to the end, then ay")
def pig_latin(rng):
    x = word(rng)[:9]
    i = next((i for i, c in enumerate(x) if c in "aeiou"), 0)
    return x, x + "way" if i == 0 else x[i:] + x[:i] + "ay"


@skill("ciphers", "every second letter first, then the others")
def rail_fence(rng):
    x = w(rng)
    return x, x[::2] + x[1::2]


# ---- letters ---------------------------------------------------------------------------------------------------------------------------

def unique(x):
    return "".join(dict.fromkeys(x))


for name, title, function in (
    ("reverse", "the word backwards", lambda x: x[::-1]),
    ("sort", "its letters in order", lambda x: "".join(sorted(x))),
    ("sort-down", "its letters from z to a", lambda x: "".join(sorted(x, reverse=True))),
    ("dedupe", "every letter once", unique),
    ("no-vowels", "without its vowels", lambda x: "".join(c for c in x if c not in "aeiou") or "-"),
    ("star-vowels", "stars for vowels", lambda x: "".join("*" if c in "aeiou" else c for c in x)),
    ("upper", "in capitals", str.upper),
    ("capitalize", "a capital at the start", str.capitalize),
    ("alternate", "every second letter a capital", lambda x: "".join(c.upper() if i % 2 else c for i, c in enumerate(x))),
    ("big-vowels", "vowels in capitals", lambda x: "".join(c.upper() if c in "aeiou" else c for c in x)),
    ("double-letters", "every letter twice", lambda x: "".join(c + c for c in x)),
    ("mirror", "the word and its reflection", lambda x: x + x[::-1]),
    ("first-to-end", "the first letter goes to the end", lambda x: x[1:] + x[0]),
    ("last-to-front", "the last letter goes to the front", lambda x: x[-1] + x[:-1]),
    ("swap-ends", "first and last letter change places", lambda x: x[-1] + x[1:-1] + x[0] if len(x) > 1 else x),
    ("swap-pairs", "neighbours change places", lambda x: "".join(x[i:i + 2][::-1] for i in range(0, len(x), 2))),
    ("every-other", "every second letter", lambda x: x[::2]),
    ("stutter", "the first letter three times", lambda x: f"{x[0]}-{x[0]}-{x}"),
    ("spaced", "a space between letters", " ".join),
    ("dashed", "a dash between letters", "-".join),
    ("dotted", "a dot after every letter", lambda x: "".join(c + "." for c in x)),
    ("behead", "without its first letter", lambda x: x[1:]),
    ("curtail", "without its last letter", lambda x: x[:-1]),
    ("first-three", "its first three letters", lambda x: x[:3]),
    ("last-three", "its last three letters", lambda x: x[-3:]),
    ("triangle", "growing from its first letter", lambda x: " ".join(x[:i + 1] for i in range(min(4, len(x))))),
    ("length", "how many letters", lambda x: str(len(x))),
    ("count-vowels", "how many vowels", lambda x: str(sum(c in "aeiou" for c in x))),
    ("starts-vowel", "does it start with a vowel?", lambda x: "yes" if x[0] in "aeiou" else "no"),
):
    of_word(name, title, function, 8, "letters")

# ---- words -----------------------------------------------------------------------------------------------------------------------------


def of_phrase(name, title, function, low=2, high=4):
    def draw(rng):
        x = phrase(rng, low, high)
        return x, function(x.split())
    skill("words", title, name)(draw)


for name, title, function in (
    ("acronym", "the first letters in capitals", lambda x: "".join(y[0] for y in x).upper()),
    ("reverse-words", "the words in reverse order", lambda x: " ".join(x[::-1])),
    ("sort-words", "the words in order", lambda x: " ".join(sorted(x))),
    ("longest-word", "the longest word, the first of those", lambda x: max(x, key=len)),
    ("last-word", "the last word", lambda x: x[-1]),
    ("swap-outer", "first and last word change places", lambda x: " ".join([x[-1], *x[1:-1], x[0]])),
    ("title-case", "a capital for every word", lambda x: " ".join(y.capitalize() for y in x)),
    ("snake-case", "snake_case", "_".join),
    ("kebab-case", "kebab-case", "-".join),
    ("camel-case", "camelCase", lambda x: x[0] + "".join(y.capitalize() for y in x[1:])),
    ("pascal-case", "PascalCase", lambda x: "".join(y.capitalize() for y in x)),
    ("const-case", "CONSTANT_CASE", lambda x: "_".join(x).upper()),
    ("hashtags", "every word a hashtag", lambda x: " ".join("#" + y for y in x)),
    ("quote-words", "every word in quotes, with commas", lambda x: ", ".join(f'"{y}"' for y in x)),
    ("enumerate", "the words with their numbers", lambda x: " ".join(f"{i + 1}.{y}" for i, y in enumerate(x))),
    ("and-list", "a list with commas and 'and'", lambda x: ", ".join(x[:-1]) + " and " + x[-1]),
    ("word-lengths", "how long every word is", lambda x: " ".join(str(len(y)) for y in x)),
):
    of_phrase(name, title, function)


@skill("words", "how many words")
def count_words(rng):
    x = phrase(rng, 1, 7)
    return x, str(len(x.split()))


@skill("words", "from snake_case to words")
def from_snake(rng):
    x = phrase(rng)
    return x.replace(" ", "_"), x


@skill("words", "from camelCase to words")
def from_camel(rng):
    x = phrase(rng).split()
    return x[0] + "".join(y.capitalize() for y in x[1:]), " ".join(x)


# ---- numbers ---------------------------------------------------------------------------------------------------------------------------

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def spelled(n):
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + ("" if n % 10 == 0 else "-" + ONES[n % 10])
    return ONES[n // 100] + " hundred" + ("" if n % 100 == 0 else " " + spelled(n % 100))


def roman(n):
    out = ""
    for value, sign in ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        out += sign * (n // value)
        n %= value
    return out


def ordinal(n):
    return f"{n}{'th' if n % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def of_number(name, title, function, low, high, back=False):
    def draw(rng):
        n = rng.randint(low, high)
        return (function(n), str(n)) if back else (str(n), function(n))
    skill("numbers", title, name)(draw)


of_number("roman", "into Roman numerals", roman, 1, 199)
of_number("from-roman", "out of Roman numerals", roman, 1, 199, True)
of_number("binary", "into binary", lambda n: format(n, "b"), 0, 255)
of_number("from-binary", "out of binary", lambda n: format(n, "b"), 0, 255, True)
of_number("hex", "into hexadecimal", lambda n: format(n, "x"), 0, 255)
of_number("from-hex", "out of hexadecimal", lambda n: format(n, "x"), 0, 255, True)
of_number("octal", "into octal", lambda n: format(n, "o"), 0, 255)
of_number("spell-number", "a number in words", spelled, 0, 999)
of_number("read-number", "words to a number", spelled, 0, 999, True)
of_number("ordinal", "1st, 2nd, 3rd", ordinal, 0, 999)
of_number("successor", "the next number", lambda n: str(n + 1), 0, 999)
of_number("predecessor", "the number before", lambda n: str(n - 1), 1, 999)
of_number("twice-number", "two times", lambda n: str(2 * n), 0, 499)
of_number("half", "half of it", lambda n: str(n), 0, 499)
SKILLS["half"].draw = lambda rng: (lambda n: (str(2 * n), str(n)))(rng.randint(0, 499))
of_number("even-odd", "even or odd", lambda n: "odd" if n % 2 else "even", 0, 9999)
of_number("digit-sum", "the sum of its digits", lambda n: str(sum(map(int, str(n)))), 0, 999)
of_number("reverse-digits", "its digits backwards", lambda n: str(n)[::-1], 10, 99999)
of_number("sort-digits", "its digits in order", lambda n: "".join(sorted(str(n))), 10, 99999)
of_number("nines", "what is missing to nine, digit by digit", lambda n: "".join(str(9 - int(c)) for c in str(n)), 10, 99999)
of_number("say-digits", "its digits in words", lambda n: " ".join(ONES[int(c)] for c in str(n)), 0, 9999)
of_number("thousands", "with commas between thousands", lambda n: f"{n:,}", 100, 99999999)
of_number("mod7", "what is left after sevens", lambda n: str(n % 7), 0, 199)
of_number("minutes", "hours to minutes", lambda n: str(60 * n), 0, 299)


@skill("numbers", "the larger of two")
def larger(rng):
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    return f"{a} {b}", str(max(a, b))


@skill("numbers", "the smaller of two")
def smaller(rng):
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    return f"{a} {b}", str(min(a, b))


@skill("numbers", "less, equal or greater")
def compare_numbers(rng):
    a = rng.randint(0, 99)
    b = a if rng.random() < 0.2 else rng.randint(0, 99)
    return f"{a} {b}", f"{a} {'<' if a < b else '>' if a > b else '='} {b}"


@skill("numbers", "the sum of two")
def plus(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"{a}+{b}", str(a + b)


@skill("numbers", "numbers from small to large")
def sort_numbers(rng):
    x = rng.sample(range(100), 3)
    return " ".join(map(str, x)), " ".join(map(str, sorted(x)))


# ---- look-ups --------------------------------------------------------------------------------------------------------------------------

def lookup(name, title, table, asked):
    forms = ("{k}", "{K}", "{k}?", "{K}?", "{U}", *asked)

    def draw(rng):
        k = rng.choice(list(table))
        return rng.choice(forms).format(k=k, K=k.title(), U=k.upper()), table[k]
    skill("facts", title, name)(draw)


for name, (title, table, asked) in LOOKUPS.items():
    lookup(name, title, table, asked)

# ---- formats ---------------------------------------------------------------------------------------------------------------------------

MONTHS = "January February March April May June July August September October November December".split()


def day(rng):
    return rng.randint(1990, 2039), rng.randint(1, 12), rng.randint(1, 28)


@skill("formats", "an ISO date with dots, day first")
def date_dots(rng):
    y, m, d = day(rng)
    return f"{y}-{m:02}-{d:02}", f"{d:02}.{m:02}.{y}"


@skill("formats", "an ISO date with slashes, month first")
def date_us(rng):
    y, m, d = day(rng)
    return f"{y}-{m:02}-{d:02}", f"{m:02}/{d:02}/{y}"


@skill("formats", "an ISO date in words")
def date_words(rng):
    y, m, d = day(rng)
    return f"{y}-{m:02}-{d:02}", f"{d} {MONTHS[m - 1]} {y}"


@skill("formats", "a date in words to ISO")
def date_iso(rng):
    y, m, d = day(rng)
    return f"{d} {MONTHS[m - 1]} {y}", f"{y}-{m:02}-{d:02}"


@skill("formats", "24 hours to 12 hours")
def clock12(rng):
    h, m = rng.randint(0, 23), rng.randint(0, 59)
    return f"{h:02}:{m:02}", f"{(h - 1) % 12 + 1}:{m:02} {'am' if h < 12 else 'pm'}"


@skill("formats", "12 hours to 24 hours")
def clock24(rng):
    h, m = rng.randint(0, 23), rng.randint(0, 59)
    return f"{(h - 1) % 12 + 1}:{m:02} {'am' if h < 12 else 'pm'}", f"{h:02}:{m:02}"


def pairs(rng, low=1, high=3):
    keys = rng.sample(COMMON, rng.randint(low, high))
    return [(k[:7], rng.randint(0, 999)) for k in keys]


@skill("formats", "key=value to JSON")
def to_json(rng):
    x = pairs(rng, 1, 2)
    return " ".join(f"{k}={v}" for k, v in x), "{" + ", ".join(f'"{k}": {v}' for k, v in x) + "}"


@skill("formats", "JSON to key=value")
def from_json(rng):
    x = pairs(rng, 1, 2)
    return "{" + ", ".join(f'"{k}": {v}' for k, v in x) + "}", " ".join(f"{k}={v}" for k, v in x)


@skill("formats", "key=value to a query string")
def query_string(rng):
    x = pairs(rng)
    return " ".join(f"{k}={v}" for k, v in x), "?" + "&".join(f"{k}={v}" for k, v in x)


@skill("formats", "comma-separated to a JSON list")
def json_list(rng):
    x = phrase(rng, 2, 3).split()
    return ",".join(x), "[" + ", ".join(f'"{y}"' for y in x) + "]"


@skill("formats", "comma-separated to a table row")
def table_row(rng):
    x = phrase(rng, 2, 4).split()
    return ",".join(x), "| " + " | ".join(x) + " |"


@skill("formats", "a name as 'Last, F.'")
def citation(rng):
    a, b = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    return f"{a} {b}", f"{b.capitalize()}, {a[0].upper()}."


@skill("formats", "a name to its e-mail address")
def email(rng):
    a, b = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    return f"{a} {b}", f"{a}.{b}@lory.dev"


@skill("formats", "an e-mail address to its name")
def email_name(rng):
    a, b = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    return f"{a}.{b}@{word(rng)[:6]}.com", f"{a.capitalize()} {b.capitalize()}"


@skill("formats", "a name to a login")
def login(rng):
    a, b = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
    return f"{a} {b}", f"{a[0]}{b}"


@skill("formats", "ten digits as a telephone number")
def phone(rng):
    n = "".join(rng.choice("0123456789") for _ in range(10))
    return n, f"({n[:3]}) {n[3:6]}-{n[6:]}"


@skill("formats", "cents to dollars")
def dollars(rng):
    n = rng.randint(100, 99999)
    return str(n), f"${n // 100}.{n % 100:02}"


@skill("formats", "an XML element")
def xml(rng):
    a, b = word(rng)[:6], word(rng)[:7]
    return f"{a} {b}", f"<{a}>{b}</{a}>"


@skill("formats", "an SQL insert")
def sql_insert(rng):
    a, b, n = word(rng)[:6], word(rng)[:6], rng.randint(0, 999)
    return f"{a} {b} {n}", f"INSERT INTO {a} VALUES ('{b}', {n});"


@skill("formats", "a shell assignment")
def shell_export(rng):
    a, n = word(rng)[:7], rng.randint(0, 9999)
    return f"{a}={n}", f'export {a.upper()}="{n}"'


@skill("formats", "a version with its patch number raised")
def bump_patch(rng):
    a, b, c = rng.randint(0, 9), rng.randint(0, 20), rng.randint(0, 98)
    return f"{a}.{b}.{c}", f"{a}.{b}.{c + 1}"


@skill("formats", "a path to its file name")
def basename(rng):
    x = [word(rng)[:7] for _ in range(rng.randint(2, 4))]
    return "/" + "/".join(x) + ".txt", x[-1] + ".txt"


# ---- styles ----------------------------------------------------------------------------------------------------------------------------

def of_sentence(name, title, function):
    def draw(rng):
        x = sentence(rng)
        return x, function(x)
    skill("styles", title, name)(draw)


for name, title, function in (
    ("pirate", "as a pirate says it", lambda x: f"arr, {x}, matey!"),
    ("shout", "shouted", lambda x: x.upper() + "!!!"),
    ("whisper", "whispered", lambda x: f"(psst... {x})"),
    ("robot", "as a robot says it", lambda x: f"BEEP. {x.upper()}. BOOP."),
    ("polite", "politely", lambda x: f"if you please, {x}, thank you."),
    ("doubt", "in doubt", lambda x: f"perhaps {x}, or perhaps not?"),
    ("headline", "as a headline", lambda x: "BREAKING: " + x.title()),
    ("fairy-tale", "as a fairy tale begins", lambda x: f"once upon a time {x}."),
    ("formal", "capital and full stop", lambda x: x[0].upper() + x[1:] + "."),
    ("excited", "excited", lambda x: f"wow! {x}! yay!"),
    ("echoing", "its last word echoes", lambda x: f"{x}... {x.split()[-1]}... {x.split()[-1]}"),
):
    of_sentence(name, title, function)

if __name__ == "__main__":
    import collections
    print(len(SKILLS), collections.Counter(s.family for s in SKILLS.values()))
    for s in SKILLS.values():
        examined = split(s.name, True, 60, 1)
        trained = split(s.name, False, 20000, 1)
        print(f"{s.family:8} {s.name:18} {len(trained):6} {len(examined):3}  {examined[0][0]!r} -> {examined[0][1]!r}")
