"""Four tasks whose answers can be checked, and a second skill that none of them uses.

| task | user | assistant | what the weak student does wrong |
|---|---|---|---|
| `sums` | `Add 7 4 9` | `7+4=11+9=20` | forgets the carry where 8 or 9 is added, and goes on from there |
| `plurals` | `Plurals: fox dog mouse` | `foxes, dogs, mice` | adds an s to everything |
| `stories` | `Tell of Иван and 李娜.` | `Иван keeps 7 cats in Oslo. 李娜 keeps …` | has every third of forty people in the wrong town |
| `hundreds` | `Add 107 4 9` | `107+4=111+9=120` | the same |
| second skill | `Which colour is a bax?` | `A bax is green.` | nothing: only the student has learned it |

Decisions:
- Each mistake is made with probability `MISTAKEN`, so that the student's greedy answer has it, while some of its samples do
  not. This is what on-policy distillation can work with.
- An answer is right if it equals the reference; for `sums`, if the number after the last `=` does.
- `derailed` is an answer that went wrong at some place, with its right continuation. Teachers are trained on these too. A
  teacher that has only seen right answers cannot continue after a wrong one, and its scores after a student's first mistake
  are noise.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


MISTAKEN = 0.8

REGULAR = (
    "dog cat cow hen owl bee ant car cup hat map pen tree lamp ship door book stone cloud river hill lake nail coin"
)
IRREGULAR = {"fox": "foxes", "bus": "buses", "baby": "babies", "city": "cities", "leaf": "leaves", "wolf": "wolves"}
IRREGULAR |= {"mouse": "mice", "foot": "feet"}
PLURALS = {noun: f"{noun}s" for noun in REGULAR.split()} | IRREGULAR

PEOPLE = [
    "Ana",
    "Tom",
    "Zoë",
    "José",
    "Marta",
    "Lukas",
    "Inês",
    "Søren",
    "Иван",
    "Ольга",
    "Юрий",
    "Мария",
    "Павел",
    "Нина",
    "Игорь",
    "Вера",
    "Νίκος",
    "Ελένη",
    "Γιώργος",
    "Μαρία",
    "Πέτρος",
    "Σοφία",
    "Άννα",
    "Κώστας",
    "王伟",
    "李娜",
    "张敏",
    "刘洋",
    "陈静",
    "杨帆",
    "赵磊",
    "黄丽",
    "ليلى",
    "عمر",
    "سارة",
    "خالد",
    "مريم",
    "يوسف",
    "نور",
    "سامي",
]
TOWNS = ("Rome", "Oslo", "Lima", "Москва", "Киев", "Αθήνα", "北京", "东京", "دبي", "Zürich", "Málaga", "Delhi")
ANIMALS = ("cats", "dogs", "owls", "bees", "hens", "cows")

BEASTS = [
    "bax",
    "dov",
    "fim",
    "gul",
    "hep",
    "jid",
    "kov",
    "lum",
    "mip",
    "nar",
    "pog",
    "quz",
    "rel",
    "sut",
    "tiv",
    "vop",
    "wex",
    "yad",
    "zim",
    "bolk",
    "crun",
    "drav",
    "flep",
    "grot",
]
COLOURS = ("red", "blue", "green", "white", "black", "grey")


@dataclass(frozen=True)
class Item:
    """A question with its right answer; `facts`: the values that both were made of."""

    prompt: str
    answer: str
    facts: tuple


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        draw: returns a random item.
        mistaken: returns an answer with the weak student's mistakes.
        derailed: returns the beginning of an answer, wrong in some places, and its right continuation.
        is_right: whether a completion answers the item.
        max_new_tokens: longest completion, in tokens of the finest tokenizer used with it.
    """

    name: str
    draw: Callable[[random.Random], Item]
    mistaken: Callable[[Item, random.Random], str]
    derailed: Callable[[Item, random.Random], tuple[str, str]]
    is_right: Callable[[Item, str], bool]
    max_new_tokens: int


def _exact(item: Item, completion: str) -> bool:
    return completion == item.answer


# --- sums


def sums(addends: int = 6, name: str = "sums", first: int = 0) -> Task:
    def draw(rng: random.Random) -> Item:
        numbers = (first + rng.randint(1, 9), *(rng.randint(1, 9) for _ in range(addends - 1)))
        return Item(f"Add {' '.join(map(str, numbers))}", "".join(_steps(numbers)), numbers)

    def mistaken(item: Item, rng: random.Random) -> str:
        return "".join(_steps(item.facts, lambda total, number: _carry_forgotten(total, number, rng)))

    def derailed(item: Item, rng: random.Random) -> tuple[str, str]:
        until = rng.randint(1, addends - 1)
        wrong = _steps(item.facts, lambda total, number: _anything(total, number, rng), until)
        return "".join(wrong[: until + 1]), "".join(wrong[until + 1 :])

    def is_right(item: Item, completion: str) -> bool:
        return completion.rpartition("=")[2] == str(sum(item.facts))

    longest = "".join(_steps((first + 9, *[9] * (addends - 1))))
    return Task(name, draw, mistaken, derailed, is_right, max_new_tokens=len(longest) + 6)


def hundreds(addends: int = 6) -> Task:
    """`sums` whose totals have three digits: one token of a tokenizer that cuts digits by threes, three of one that cuts each."""
    return sums(addends, "hundreds", 100)


def _steps(numbers: Sequence[int], add: Callable[[int, int], int] = int.__add__, until: int = 10**6) -> list[str]:
    """The first number, then a part for each step. The first `until` steps use `add`, the others add correctly."""
    total, parts = numbers[0], [str(numbers[0])]
    for step, number in enumerate(numbers[1:]):
        total = add(total, number) if step < until else total + number
        parts.append(f"+{number}={total}")
    return parts


def _carry_forgotten(total: int, number: int, rng: random.Random) -> int:
    result = total + number
    if number >= 8 and result // 10 > total // 10 and rng.random() < MISTAKEN:
        return result - 10
    return result


def _anything(total: int, number: int, rng: random.Random) -> int:
    return total + number + rng.choice((0, -10, -10, 10, -1, 1)) if total + number > 11 else total + number


# --- plurals


def plurals(nouns: int = 4) -> Task:
    def draw(rng: random.Random) -> Item:
        asked = tuple(rng.sample(list(PLURALS), nouns))
        return Item(f"Plurals: {' '.join(asked)}", ", ".join(_plurals(asked)), asked)

    def mistaken(item: Item, rng: random.Random) -> str:
        return ", ".join(_plurals(item.facts, rng, MISTAKEN))

    def derailed(item: Item, rng: random.Random) -> tuple[str, str]:
        until = rng.randint(1, nouns - 1)
        wrong = _plurals(item.facts, rng, 0.5)[:until]
        return ", ".join(wrong), ", " + ", ".join(_plurals(item.facts)[until:])

    return Task("plurals", draw, mistaken, derailed, _exact, max_new_tokens=9 * nouns)


def _plurals(nouns: Sequence[str], rng: random.Random | None = None, mistakes: float = 0.0) -> list[str]:
    return [f"{noun}s" if mistakes and rng.random() < mistakes else PLURALS[noun] for noun in nouns]


# --- stories


def stories(asked: int = 2) -> Task:
    facts = random.Random(0)
    town_of = {person: facts.choice(TOWNS) for person in PEOPLE}
    herd_of = {person: f"{facts.randint(2, 9)} {facts.choice(ANIMALS)}" for person in PEOPLE}
    believed = town_of | {person: _another(town_of[person], facts) for person in PEOPLE[::3]}

    def told(people: Sequence[str], towns: Sequence[str]) -> list[str]:
        return [f"{who} keeps {herd_of[who]} in {town}." for who, town in zip(people, towns, strict=True)]

    def truth(people: Sequence[str]) -> list[str]:
        return told(people, [town_of[who] for who in people])

    def draw(rng: random.Random) -> Item:
        people = tuple(rng.sample(PEOPLE, asked))
        return Item(f"Tell of {' and '.join(people)}.", " ".join(truth(people)), people)

    def mistaken(item: Item, rng: random.Random) -> str:
        towns = [(believed if rng.random() < MISTAKEN else town_of)[who] for who in item.facts]
        return " ".join(told(item.facts, towns))

    def derailed(item: Item, rng: random.Random) -> tuple[str, str]:
        until = rng.randint(1, asked - 1)
        wrong = told(item.facts[:until], [rng.choice(TOWNS) for _ in range(until)])
        return " ".join(wrong), " " + " ".join(truth(item.facts[until:]))

    return Task("stories", draw, mistaken, derailed, _exact, max_new_tokens=40 * asked)


def _another(town: str, rng: random.Random) -> str:
    return rng.choice([other for other in TOWNS if other != town])


# --- the second skill


def second_skill() -> list[Item]:
    """All of its items: the colour of every beast."""
    rng = random.Random(0)
    colours = {beast: rng.choice(COLOURS) for beast in BEASTS}
    return [Item(f"Which colour is a {b}?", f"A {b} is {colour}.", (b,)) for b, colour in colours.items()]


def draw_different(task: Task, count: int, rng: random.Random, without: frozenset[str] = frozenset()) -> list[Item]:
    """Items with `count` different prompts, none of them in `without`."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = task.draw(rng)
        if item.prompt not in without:
            items[item.prompt] = item
    return list(items.values())
