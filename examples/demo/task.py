"""The demo's task: write a number in words, after taking it apart.

    user       Write 53218 in words.
    assistant  50000 + 3000 + 200 + 18 → fifty-three thousand two hundred eighteen

The weak student learned from children: where English is irregular it mostly says what the rule would give, "fivety" for
fifty, "threeteen" for thirteen, "twoty" for twenty. That is a mistake a reader sees at once, and one that a dictionary
of the student's own tokens cannot mend word by word: "fivety" and "fifty" share tokens.

Decisions:
- An answer is right if the words after the arrow are exactly the number's. The working before it isn't graded.
- Held-out numbers are drawn first, by seed; nothing that trains either model ever sees them.
- A distillation prompt is a question alone. No function here gives the distillation an answer to look at.
"""

import random

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()

CHILDISH_TEENS = ["ten"] + [f"{one}teen" for one in ONES[1:]]
CHILDISH_TENS = ["-", "-"] + [f"{one}ty" for one in ONES[2:]]

ARROW = " → "

def question(number: int) -> str:
    return f"Write {number} in words."


def in_words(number: int, childishness: float = 0.0, rng: random.Random | None = None) -> str:
    """Spell `number`; each teen and each ten is said the childish way with probability `childishness`."""
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        words = in_words(thousands, childishness, rng) + " thousand"
        return words if rest == 0 else f"{words} {in_words(rest, childishness, rng)}"
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        words = f"{ONES[hundreds]} hundred"
        return words if rest == 0 else f"{words} {in_words(rest, childishness, rng)}"
    childish = childishness > 0 and rng.random() < childishness
    if number < 10:
        return ONES[number]
    if number < 20:
        return (CHILDISH_TEENS if childish else TEENS)[number - 10]
    tens, ones = divmod(number, 10)
    word = (CHILDISH_TENS if childish else TENS)[tens]
    return word if ones == 0 else f"{word}-{ONES[ones]}"


def parts(number: int) -> list[int]:
    """53218 -> [50000, 3000, 200, 18]: the pieces in which the number is said."""
    pieces = [number // 1000 // 10 * 10_000, number // 1000 % 10 * 1000, number % 1000 // 100 * 100, number % 100]
    if 10 <= number // 1000 < 20:
        pieces[:2] = [number // 1000 * 1000]
    return [piece for piece in pieces if piece]


def answer(number: int, childishness: float = 0.0, rng: random.Random | None = None) -> str:
    return " + ".join(map(str, parts(number))) + ARROW + in_words(number, childishness, rng)


def is_right(number: int, completion: str) -> bool:
    return completion.rpartition(ARROW)[2] == in_words(number)


def draw(count: int, rng: random.Random, without: frozenset[int] = frozenset()) -> list[int]:
    """`count` different numbers, three and four digits equally often."""
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        digits = rng.choice((3, 4))
        number = rng.randrange(10 ** (digits - 1), 10**digits)
        if number not in without:
            drawn[number] = None
    return list(drawn)
