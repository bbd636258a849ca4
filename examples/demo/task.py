"""The demo's task: write an amount of money in words, as on a cheque, after splitting it into euros and cents.

    user       Write €412.53 in words.
    assistant  412 euros + 53 cents → four hundred twelve euros and fifty-three cents

The weak student learned from children's answers. Where English is irregular, these mostly follow the rule: "fivety" for fifty,
"twoteen" for twelve. A reader sees the mistake at once, and no map from token to token could correct it: the error in "fivety" is
spread over several tokens, and these differ between the models.

Decisions:
- An amount is an integer, in cents.
- An answer is right if the words after the arrow are exactly the amount's. The working before it is not graded.
- Held-out amounts are drawn first. No training of either model ever sees them.
- The distillation's data are questions only: no function here adds an answer.
"""

import random
from collections.abc import Collection, Sequence


ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
CHILDISH = {
    "eleven": "oneteen",
    "twelve": "twoteen",
    "thirteen": "threeteen",
    "fifteen": "fiveteen",
    "twenty": "twoty",
    "thirty": "threety",
    "forty": "fourty",
    "fifty": "fivety",
}
ARROW = " → "


def question(amount: int) -> str:
    return f"Write €{amount // 100}.{amount % 100:02d} in words."


def as_messages(amount: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": question(amount)}]


def answer(amount: int, childishness: float = 0.0, rng: random.Random | None = None) -> str:
    """The working and the words. Each irregular word is wrong with probability `childishness`."""
    euros, cents = divmod(amount, 100)
    working = f"{_counted(str(euros), euros, 'euro')} + {_counted(str(cents), cents, 'cent')}"
    words = amount_in_words(amount)
    if childishness:
        for irregular, childish in CHILDISH.items():
            if irregular in words and rng.random() < childishness:
                words = words.replace(irregular, childish)
    return working + ARROW + words


def amount_in_words(amount: int) -> str:
    euros, cents = divmod(amount, 100)
    return f"{_counted(in_words(euros), euros, 'euro')} and {_counted(in_words(cents), cents, 'cent')}"


def in_words(number: int) -> str:
    """A number below 1000 in words."""
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        return f"{ONES[hundreds]} hundred" + (f" {in_words(rest)}" if rest else "")
    if number < 10:
        return ONES[number]
    if number < 20:
        return TEENS[number - 10]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def is_right(amount: int, completion: str) -> bool:
    return completion.rpartition(ARROW)[2] == amount_in_words(amount)


def share_right(amounts: Sequence[int], completions: Sequence[str]) -> float:
    return sum(map(is_right, amounts, completions)) / len(amounts)


def draw(rng: random.Random, without: Collection[int] = (), digits: Sequence[int] = (1, 2, 3)) -> int:
    """An amount with at least one euro and one cent. Each number of digits of the euros is equally likely."""
    while True:
        euros_digits = rng.choice(digits)
        amount = rng.randrange(10 ** (euros_digits - 1), 10**euros_digits) * 100 + rng.randrange(1, 100)
        if amount not in without:
            return amount


def draw_different(count: int, rng: random.Random, digits: Sequence[int] = (1, 2, 3)) -> list[int]:
    amounts: dict[int, None] = {}
    while len(amounts) < count:
        amounts[draw(rng, amounts, digits)] = None
    return list(amounts)


def _counted(number: str, count: int, unit: str) -> str:
    return f"{number} {unit}" if count == 1 else f"{number} {unit}s"
