"""Every loss on distributions by its formula: one chunk after another, dictionaries keyed by bytes, float64.

The library's code is not used here. A loss takes one row of a batch and the two vocabularies and returns the row's sum, before
the division by num_items. Autograd through `Row.log_p` gives the gradient.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


# --- vocabularies


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One model's head: the bytes of each row, b"" for no text, and the ids that end its turn."""

    rows: Sequence[bytes]
    stops: Sequence[int]

    @functools.cached_property
    def texts(self) -> dict[int, bytes]:
        """The ids with text, without stop ids."""
        return {v: row for v, row in enumerate(self.rows) if row and v not in self.stops}

    @functools.cached_property
    def ids(self) -> dict[bytes, list[int]]:
        ids = defaultdict(list)
        for v, row in self.texts.items():
            ids[row].append(v)
        return dict(ids)

    @functools.cached_property
    def beginning(self) -> dict[bytes, list[int]]:
        """For each prefix, the ids whose text begins with it."""
        ids = defaultdict(list)
        for v, row in self.texts.items():
            for length in range(len(row) + 1):
                ids[row[:length]].append(v)
        return dict(ids)


@dataclass(frozen=True, eq=False)
class Vocabularies:
    """The two vocabularies, and the teacher's tokenizer."""

    student: Vocabulary
    teacher: Vocabulary
    encode: Callable[[str], list[int]]
    going_on: Callable[[int], set[int]] = lambda w: set()  # the student ids that continue a teacher token
    puts_a_space: bool = False  # whether the student's tokenizer puts one before a text
    later_digits_undo: bool = False  # whether the teacher's boundaries within a number depend on later digits

    @functools.cached_property
    def bridged(self) -> bool:
        return bool(self.student.stops) and bool(self.teacher.stops)

    @functools.cached_property
    def classes(self) -> dict[Hashable, tuple[list[int], list[int]]]:
        """The student's and the teacher's ids of each shared class."""
        both = [text for text in self.student.ids if text in self.teacher.ids]
        classes: dict[Hashable, tuple[list[int], list[int]]] = {
            text: (self.student.ids[text], self.teacher.ids[text]) for text in both
        }
        if self.bridged:
            classes["stop"] = sorted(self.student.stops), sorted(self.teacher.stops)
        return classes

    @functools.cached_property
    def student_class(self) -> dict[int, Hashable]:
        return {v: key for key, (students, _) in self.classes.items() for v in students}

    @functools.cached_property
    def teacher_class(self) -> dict[int, Hashable]:
        return {w: key for key, (_, teachers) in self.classes.items() for w in teachers}

    @functools.cached_property
    def student_partner(self) -> dict[int, int]:
        """The student id that is the partner of each teacher id of a class."""
        return {w: self.classes[key][0][0] for w, key in self.teacher_class.items()}

    @functools.cached_property
    def teacher_partner(self) -> dict[int, int]:
        return {v: self.classes[key][1][0] for v, key in self.student_class.items()}

    def alike(self, w: int, v: int) -> tuple[list[int], list[int]]:
        """All teacher and student ids of the class that the two share, or only themselves."""
        key = self.teacher_class.get(w)
        if key is None or key != self.student_class.get(v):
            return [w], [v]
        return self.classes[key][1], self.classes[key][0]

    def phi(self, text: bytes) -> Hashable:
        """The longest student token that `text` begins with, or "rest"."""
        prefixes = (text[:length] for length in range(len(text), 0, -1))
        return next((prefix for prefix in prefixes if prefix in self.student.ids), "rest")

    def ending(self, key: str) -> str:
        return key if self.bridged else "rest"

    @functools.cached_property
    def student_outcome(self) -> dict[int, Hashable]:
        """The outcome of each student id in bpm's canonical space."""
        outcome = {v: self.student.texts.get(v, "rest") for v in range(len(self.student.rows))}
        return outcome | dict.fromkeys(self.student.stops, self.ending("stop"))

    @functools.cached_property
    def outcomes(self) -> list[Hashable]:
        return [*self.student.ids, *(["stop"] if self.bridged else []), "rest"]

    @functools.cached_property
    def teacher_outcome(self) -> dict[int, Hashable]:
        """The outcome of each teacher id where the student is at the same byte."""
        outcome = dict.fromkeys(range(len(self.teacher.rows)), "rest")
        outcome |= {w: self.phi(text) for w, text in self.teacher.texts.items()}
        return outcome | dict.fromkeys(self.teacher.stops, self.ending("stop"))

    @functools.cached_property
    def first_of(self) -> list[int]:
        """The smallest teacher id with the same bytes, or the smallest stop id where stops are a class."""
        first = {w: self.teacher.ids[text][0] for w, text in self.teacher.texts.items()}
        if self.bridged:
            first |= dict.fromkeys(self.teacher.stops, min(self.teacher.stops))
        return [first.get(w, w) for w in range(len(self.teacher.rows))]

    def teacher_tokens(self, text: bytes) -> list[int]:
        """The tokenizer's encoding, if it spells the text (not for invalid UTF-8 or with a dummy prefix). Else the longest
        token that fits, repeatedly; none at all where nothing fits.
        """
        encoded = self.encode(text.decode(errors="replace"))
        if b"".join(self.teacher.rows[w] for w in encoded) == text:
            return encoded
        tokens = []
        while text:
            prefixes = (text[:length] for length in range(len(text), 0, -1))
            longest = next((prefix for prefix in prefixes if prefix in self.teacher.ids), b"")
            if not longest:
                return []
            tokens.append(self.teacher.ids[longest][0])
            text = text[len(longest) :]
        return tokens

    @functools.cached_property
    def projection(self) -> list[tuple[int, int, float]]:
        """xtoken's W: student id, teacher id, weight."""
        entries = [(v, w, 1.0) for v, w in self.teacher_partner.items()]
        for v, text in self.student.texts.items():
            if v not in self.student_class:
                tokens = self.teacher_tokens(text)[:4]
                weights = [0.9 * 0.1**i for i in range(len(tokens))]
                entries += [(v, self.first_of[w], x / sum(weights)) for w, x in zip(tokens, weights, strict=True)]
        return entries


# --- rows


@dataclass(frozen=True)
class Chunk:
    """The positions of a chunk's tokens."""

    student: list[int]
    teacher: list[int]

    @property
    def one_to_one(self) -> bool:
        return len(self.student) == len(self.teacher) == 1


@dataclass(frozen=True)
class Row:
    """One completion: ids and chunks (-1 takes no part) of both sides, log-probs (S, V_S) and (T, V_T) of all ids."""

    student_ids: list[int]
    teacher_ids: list[int]
    student_chunks: list[int]
    teacher_chunks: list[int]
    log_p: Tensor
    log_q: Tensor

    def sampled_p(self, i: int) -> Tensor:
        return self.log_p[i, self.student_ids[i]]

    def sampled_q(self, j: int) -> Tensor:
        return self.log_q[j, self.teacher_ids[j]]

    def student_budget(self, chunk: Chunk) -> Tensor:
        return sum(self.sampled_p(i) for i in chunk.student)

    def teacher_budget(self, chunk: Chunk) -> Tensor:
        return sum(self.sampled_q(j) for j in chunk.teacher)

    def scorable(self) -> list[Chunk]:
        chunks = []
        for number in sorted({*self.student_chunks} - {-1}):
            student = [i for i, chunk in enumerate(self.student_chunks) if chunk == number]
            teacher = [j for j, chunk in enumerate(self.teacher_chunks) if chunk == number]
            chunk = Chunk(student, teacher)
            if teacher and math.isfinite(self.teacher_budget(chunk)):
                chunks.append(chunk)
        return chunks

    def student_bytes(self, positions: Sequence[int], pair: Vocabularies) -> list[bytes]:
        return [pair.student.rows[self.student_ids[i]] for i in positions]

    def teacher_bytes(self, positions: Sequence[int], pair: Vocabularies) -> list[bytes]:
        return [pair.teacher.rows[self.teacher_ids[j]] for j in positions]

    def is_turn_end(self, chunk: Chunk, pair: Vocabularies) -> bool:
        """Whether the student's tokens have no text. The teacher's may, such as a newline before its control token."""
        return not any(self.student_bytes(chunk.student, pair))

    def excess(self, chunk: Chunk, pair: Vocabularies) -> int:
        """The bytes of a dummy prefix: positive if the teacher has it, negative if the student has it."""
        if self.is_turn_end(chunk, pair):
            return 0
        ours, theirs = self.student_bytes(chunk.student, pair), self.teacher_bytes(chunk.teacher, pair)
        return sum(map(len, theirs)) - sum(map(len, ours))

    def level(self, pair: Vocabularies) -> list[Chunk]:
        """The scorable chunks without a dummy prefix on one side only, and without turn ends of several tokens."""
        level = [chunk for chunk in self.scorable() if self.excess(chunk, pair) == 0]
        return [chunk for chunk in level if pair.bridged or not self.is_turn_end(chunk, pair)]


# --- divergences


def kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(a ‖ b), 0 log 0 = 0."""
    inside = a > 0
    return (a[inside] * (a[inside].log() - b[inside].log())).sum()


def jsd(beta: float, p: Tensor, q: Tensor) -> Tensor:
    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q)
    mixture = (1 - beta) * p + beta * q
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def normalised(masses: Tensor) -> Tensor:
    return masses / masses.sum()


def masses(p: Tensor, key_of: Mapping[int, Hashable], keys: Sequence[Hashable]) -> Tensor:
    """(len(keys),) the sum of p over the ids of each key."""
    place = {key: n for n, key in enumerate(keys)}
    ids = [*key_of]
    places = torch.tensor([place[key_of[v]] for v in ids], dtype=torch.long)
    return p.new_zeros(len(keys)).index_add(0, places, p[torch.tensor(ids, dtype=torch.long)])


def sorted_distance(a: Tensor, b: Tensor) -> Tensor:
    """Σ|sort(a) − sort(b)|, the shorter padded with zeros."""
    length = max(len(a), len(b))
    a, b = (torch.cat([x.sort(descending=True)[0], x.new_zeros(length - len(x))]) for x in (a, b))
    return (a - b).abs().sum()


def top(p: Tensor, k: int | None) -> list[int]:
    """The k indices with the largest p, the largest first."""
    values = p.tolist()
    return sorted(range(len(values)), key=lambda v: -values[v])[:k]


def class_masses(row: Row, pair: Vocabularies, i: int, j: int) -> tuple[Tensor, Tensor]:
    """P and Q of all shared classes, at student position i and teacher position j."""
    keys = [*pair.classes]
    return masses(row.log_p[i].exp(), pair.student_class, keys), masses(row.log_q[j].exp(), pair.teacher_class, keys)


def merged(log_probs: Tensor, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
    """The distribution of the next token at the last position, times the probability of the tokens before it."""
    *before, last = positions
    result = log_probs[last].exp()
    for i in before:
        result = result * log_probs[i, ids[i]].exp()
    return result


# --- losses, each the sum over one row


def strict_sampled(row: Row, pair: Vocabularies, advantage_clip: float | None = 10.0) -> Tensor:
    bound = math.inf if advantage_clip is None else advantage_clip
    total = row.log_p.new_zeros(())
    for chunk in row.scorable():
        if chunk.one_to_one:
            log_p, log_q = row.student_budget(chunk), row.teacher_budget(chunk)
            advantage = max(-bound, min(bound, (log_q - log_p).item()))
            total = total - advantage * (log_p - log_p.detach()).exp()
    return total


def strict_topk(row: Row, pair: Vocabularies, top_k: int | None = 16) -> Tensor:
    total = row.log_p.new_zeros(())
    for chunk in row.level(pair):
        if chunk.one_to_one:
            p, q = class_masses(row, pair, chunk.student[0], chunk.teacher[0])
            kept = top(p, top_k)
            total = total + kl(normalised(p[kept]), normalised(q[kept]))
    return total


def simct(row: Row, pair: Vocabularies) -> Tensor:
    total = row.log_p.new_zeros(())
    for chunk in row.level(pair):
        p, q = class_masses(row, pair, chunk.student[0], chunk.teacher[0])
        if not chunk.one_to_one:
            mean_p = (row.student_budget(chunk) / len(chunk.student)).exp()
            mean_q = (row.teacher_budget(chunk) / len(chunk.teacher)).exp()
            p, q = torch.cat([p, mean_p[None]]), torch.cat([q, mean_q[None]])
        total = total + kl(normalised(p), normalised(q))
    return total


def gold(
    row: Row,
    pair: Vocabularies,
    beta: float = 0.5,
    matched_weight: float | None = None,
    unmatched_weight: float | None = None,
) -> Tensor:
    matched = len(pair.classes) / len(pair.teacher.rows) if matched_weight is None else matched_weight
    unmatched = 1 - matched if unmatched_weight is None else unmatched_weight
    ours = [v for v in range(len(pair.student.rows)) if v not in pair.student_class]
    theirs = [w for w in range(len(pair.teacher.rows)) if w not in pair.teacher_class]
    keys = [*pair.classes]
    total = row.log_p.new_zeros(())
    for chunk in row.level(pair):
        a = merged(row.log_p, row.student_ids, chunk.student)
        b = merged(row.log_q, row.teacher_ids, chunk.teacher)
        class_a, class_b = masses(a, pair.student_class, keys), masses(b, pair.teacher_class, keys)
        total = total + matched * jsd(beta, normalised(class_a), normalised(class_b))
        total = total + unmatched * sorted_distance(a[ours], b[theirs])
    return total


def with_one_end(probs: Tensor, vocabulary: Vocabulary) -> Tensor:
    """(V,) probabilities, with those of all stop tokens at the first of them."""
    probs, stops = probs.clone(), [*vocabulary.stops]
    if stops:
        probs[stops[0]] = probs[stops].sum()
        probs[stops[1:]] = 0
    return probs


def uld(row: Row, pair: Vocabularies, uld_pairing: str = "position") -> Tensor:
    total = row.log_p.new_zeros(())
    chunks = row.scorable()
    if uld_pairing == "chunk":
        for chunk in chunks:
            a = merged(row.log_p, row.student_ids, chunk.student)
            b = merged(row.log_q, row.teacher_ids, chunk.teacher)
            total = total + sorted_distance(with_one_end(a, pair.student), with_one_end(b, pair.teacher))
        return total
    students = sorted(i for chunk in chunks for i in chunk.student)
    teachers = sorted(j for chunk in chunks for j in chunk.teacher)
    for i, j in zip(students, teachers, strict=False):
        a, b = with_one_end(row.log_p[i].exp(), pair.student), with_one_end(row.log_q[j].exp(), pair.teacher)
        total = total + sorted_distance(a, b)
    return total


@dataclass(frozen=True)
class ByteRow:
    """A student token, and what the teacher expects at its start.

    `written`: the part of the teacher's token at position j that the student has already written; `expected`: the teacher ids
    that continue from there, with their probabilities.
    """

    i: int
    j: int
    written: bytes
    expected: dict[int, float]


def byte_rows(row: Row, pair: Vocabularies, mask_whitespace: bool) -> list[ByteRow]:
    rows = []
    for chunk in row.scorable():
        turn_end = row.is_turn_end(chunk, pair)
        if turn_end and (len(chunk.teacher) > 1 or not pair.bridged):
            continue
        sizes = [*map(len, row.teacher_bytes(chunk.teacher, pair))]
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        for i in chunk.student:
            text = pair.student.rows[row.student_ids[i]]
            before = [b for b in chunk.student if b < i]
            start = sum(map(len, row.student_bytes(before, pair))) + row.excess(chunk, pair)
            if start < 0 or (mask_whitespace and text and not text.strip()):
                continue
            n = 0 if turn_end else max(n for n, at in enumerate(starts) if at <= start)
            j = chunk.teacher[n]
            written = pair.teacher.rows[row.teacher_ids[j]][: start - starts[n]]
            q = row.log_q[j].exp().tolist()
            if written:
                going_on = [w for w in pair.teacher.beginning[written] if pair.teacher.texts[w] != written]
                total = math.fsum(q[w] for w in going_on)
                rows.append(ByteRow(i, j, written, {w: q[w] / total for w in going_on}))
            else:
                rows.append(ByteRow(i, j, written, dict(enumerate(q))))
    return rows


def canonical(row: Row, pair: Vocabularies, byte_row: ByteRow) -> tuple[Tensor, Tensor]:
    """p' and t over the canonical student space."""
    outcome = pair.teacher_outcome
    if byte_row.written:
        size = len(byte_row.written)
        outcome = {w: pair.phi(pair.teacher.texts[w][size:]) for w in byte_row.expected}
    target = dict.fromkeys(pair.outcomes, 0.0)
    for w, mass in byte_row.expected.items():
        target[outcome[w]] += mass
    p = masses(row.log_p[byte_row.i].exp(), pair.student_outcome, pair.outcomes)
    return p, p.new_tensor([*target.values()])


def bpm(row: Row, pair: Vocabularies, beta: float = 0.5, mask_whitespace: bool = True) -> Tensor:
    total = row.log_p.new_zeros(())
    for byte_row in byte_rows(row, pair, mask_whitespace):
        total = total + jsd(beta, *canonical(row, pair, byte_row))
    return total


def escd(row: Row, pair: Vocabularies, mask_whitespace: bool = True) -> Tensor:
    total = row.log_p.new_zeros(())
    for byte_row in byte_rows(row, pair, mask_whitespace):
        if not byte_row.written:
            p, target = canonical(row, pair, byte_row)
            total = total + kl(target, p)
            continue
        p = row.log_p[byte_row.i].exp()
        wanted: dict[bytes, float] = defaultdict(float)  # mass of what is left to write
        for w, mass in byte_row.expected.items():
            wanted[pair.teacher.texts[w][len(byte_row.written) :]] += mass
        for rest, mass in wanted.items():
            completing = pair.student.beginning.get(rest, [])
            if completing:
                total = total - mass * p[completing].sum().clamp(min=1e-12).log()
    return total


@dataclass(frozen=True)
class Decision:
    """Log-prob of what was chosen; what is exact of it; and log t - log p of it, as it is (0 where t is) and within bounds."""

    log_p: Tensor
    exact: Tensor
    sharp: float
    guess: float


def decided(p: Tensor, t: Tensor, chosen: int, log_p: Tensor, bound: float) -> Decision:
    """Between outcomes of probabilities p and t, NaN where it is not known; `log_p` of the chosen one."""
    sharp = t.log().clamp(min=-80) - p.detach().log().clamp(min=-80)
    sharp[t.isnan() | (p.detach() == 0)] = 0
    guess = sharp.clamp(-bound, bound)
    return Decision(log_p, (p * guess).sum(), 0.0 if t[chosen] == 0 else sharp[chosen].item(), guess[chosen].item())


def reverse_kl(row: Row, pair: Vocabularies, advantage_clip: float | None = 10.0, top_k: int | None = None) -> Tensor:
    bound = math.inf if advantage_clip is None else advantage_clip
    standing = {found.i: found for found in byte_rows(row, pair, False)}
    chunks = row.scorable()
    for chunk in chunks:
        if (
            row.is_turn_end(chunk, pair) and chunk.student[0] not in standing
        ):  # written in several tokens: it begins there
            i, j = chunk.student[0], chunk.teacher[0]
            standing[i] = ByteRow(i, j, b"", dict(enumerate(row.log_q[j].exp().tolist())))
    if pair.puts_a_space:  # at the first place of a turn
        standing = {i: here for i, here in standing.items() if i and row.student_chunks[i - 1] >= 0}
    alone = set() if pair.bridged else {*pair.student.stops}
    for i in [i for chunk in chunks for i in chunk.student[1:]]:
        if pair.later_digits_undo and pair.student.rows[row.student_ids[i - 1]][-1:].isdigit():
            standing.pop(i, None)
    closing = [row.log_p.new_zeros(()) for _ in chunks]  # log-prob of leaving the chunk's last token as it is
    opening = [row.log_p.new_zeros(()) for _ in chunks]  # the same of the chunk before
    decisions: list[list[Decision]] = [[] for _ in chunks]
    ends: dict[int, Decision] = {}

    def known(j: int) -> tuple[dict[int, float], float | None]:
        q = row.log_q[j].exp()
        if top_k is None:
            return dict(enumerate(q.tolist())), None
        kept = top(q, top_k)
        return {w: q[w].item() for w in kept}, max(0.0, 1 - q[kept].sum().item())

    def leaving(j: int, head: int) -> tuple[float, float]:
        q, rest = known(j)
        text = pair.teacher.texts.get(head)
        own = sum(q.get(w, 0.0) for w in (pair.teacher.ids[text] if text else [head]))
        longer = (
            sum(q.get(w, 0.0) for w in pair.teacher.beginning.get(text, []) if pair.teacher.texts[w] != text)
            if text
            else 0.0
        )
        if rest is not None:
            if own == 0 and longer == 0:
                return math.nan, math.nan
            own, longer = own or rest, longer or rest
        return own / (own + longer), longer / (own + longer)

    last = {chunk.student[-1]: n for n, chunk in enumerate(chunks)}
    for n, chunk in enumerate(chunks):
        for place, i in enumerate(chunk.student):
            here, p = standing.get(i), row.log_p[i].exp()
            v, everything = row.student_ids[i], set(range(len(pair.student.rows)))
            ended = last.get(i - 1) if place == 0 else None
            head = None
            if ended is not None:
                head = row.teacher_ids[chunks[ended].teacher[-1]]
            elif place and here is not None and here.written:
                head = pair.teacher.ids.get(here.written, [None])[0]
            on = set() if head is None else pair.going_on(head)
            if not on or (v in on) == (ended is not None):
                head, ended, on = None, None, set()
            among = everything
            if head is not None:
                opened = p[sorted(on)].sum()
                closed = p[sorted(everything - on)].sum()
                among = on if ended is None else everything - on
                j = here.j if ended is None else chunks[ended].teacher[-1]
                before = standing.get(i - 1)
                readable = (
                    on
                    and before is not None
                    and i - 1 in chunks[n if ended is None else ended].student
                    and before.j == j
                )
                t = leaving(j, head) if readable else (math.nan, math.nan)
                score = opened.log() if ended is None else closed.log()
                left = decided(torch.stack([closed, opened]), closed.new_tensor(t), int(ended is None), score, bound)
                if ended is None:
                    decisions[n].append(left)
                else:
                    ends[ended] = left
                    opening[n] = closing[ended] = score
            given = row.log_p[i, sorted(among)].logsumexp(0) if len(among) < len(everything) else p.sum().log() * 0
            chosen_among = torch.zeros_like(p, dtype=torch.bool)
            chosen_among[sorted(among)] = True
            chosen_among[sorted(alone)] = False
            conditional = (row.log_p[i] - given).exp() * chosen_among
            ours = masses(conditional, pair.student_outcome, pair.outcomes)
            theirs, shared = torch.full_like(ours, torch.nan).detach(), {}
            if here is not None:
                theirs, rest = told(row, pair, here, *known(here.j))
                shared = shared_outcomes(pair, ours, theirs)
                for own, other in shared.items():
                    moved = torch.zeros_like(ours).index_fill(0, torch.tensor([own]), 1)
                    added = torch.zeros_like(ours).index_fill(0, torch.tensor([other]), 1)
                    ours = ours * (1 - moved) + added * ours[own]
                if rest is not None:  # one outcome: what each of its parts has is its share of the whole
                    untold = theirs == 0
                    theirs = torch.where(untold, rest * (ours / ours[untold].sum()).detach(), theirs)
            chosen = pair.outcomes.index(pair.student_outcome[v])
            chosen = shared.get(chosen, chosen)
            decision = decided(ours, theirs, chosen, row.log_p[i, v] - given, bound)
            decisions[n].append(replace(decision, sharp=0.0, guess=0.0) if v in alone else decision)

    total = row.log_p.new_zeros(())
    for n, chunk in enumerate(chunks):
        gap = row.teacher_budget(chunk) - row.student_budget(chunk) + opening[n] - closing[n]
        rest = gap.item()
        for decision in decisions[n] + ([ends[n]] if n in ends else []):
            correction = max(-bound, min(bound, rest)) - decision.guess
            rest -= decision.sharp
            total = total - decision.exact - correction * (decision.log_p - decision.log_p.detach()).exp()
    return total


def shared_outcomes(pair: Vocabularies, ours: Tensor, theirs: Tensor) -> dict[int, int]:
    """By an outcome that the teacher has nothing for: the longest text that it begins with and the teacher has something for."""
    places = {outcome: n for n, outcome in enumerate(pair.outcomes) if isinstance(outcome, bytes)}
    found, ours, theirs = {}, ours.tolist(), theirs.tolist()
    for text, n in places.items():
        if theirs[n] == 0 and ours[n] > 1e-4:
            beginnings = [text[:size] for size in range(len(text))]
            stems = [places[beginning] for beginning in beginnings if beginning in places and theirs[places[beginning]]]
            if stems:
                found[n] = stems[-1]
    return found


def told(
    row: Row, pair: Vocabularies, here: ByteRow, q: dict[int, float], rest: float | None
) -> tuple[Tensor, float | None]:
    """The teacher's probabilities of the student's outcomes, and of what is not known of it."""
    size = len(here.written)
    fitting = here.expected if rest is None else {w: q[w] for w in here.expected if w in q}
    mass = sum(fitting.values()) + (rest or 0.0)
    found = dict.fromkeys(pair.outcomes, 0.0)
    for w, share in fitting.items():
        outcome = pair.phi(pair.teacher.texts[w][size:]) if size else pair.teacher_outcome[w]
        found[outcome] += share / mass
    return row.log_q.new_tensor([*found.values()]), None if rest is None else rest / mass


def sinkhorn_cost(x: Tensor, y: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Σ P C of the entropic plan between two sets of points after averaged iterations, the plan held fixed."""
    costs = torch.stack([torch.stack([(a - b).abs().sum() for b in y]) for a in x])
    fixed, n, m = costs.detach(), len(x), len(y)
    f, g = fixed.new_zeros(n), fixed.new_zeros(m)
    for _ in range(iterations):
        new_f = [-epsilon * ((g - fixed[i]) / epsilon - math.log(m)).logsumexp(0) for i in range(n)]
        new_g = [-epsilon * ((f - fixed[:, j]) / epsilon - math.log(n)).logsumexp(0) for j in range(m)]
        f, g = (f + torch.stack(new_f)) / 2, (g + torch.stack(new_g)) / 2
    plan = ((f[:, None] + g[None, :] - fixed) / epsilon).exp() / (n * m)
    return (plan * costs).sum()


def multi_level_ot(
    row: Row,
    pair: Vocabularies,
    top_k: int = 50,
    log_weight: float = 0.1,
    sinkhorn_weight: float = 0.1,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    chunks = row.scorable()
    if not chunks:
        return row.log_p.new_zeros(())
    p, q = (
        torch.stack([with_one_end(log_probs[i].exp(), vocabulary) for i in sorted(places)])
        for log_probs, vocabulary, places in (
            (row.log_p, pair.student, (i for chunk in chunks for i in chunk.student)),
            (row.log_q, pair.teacher, (j for chunk in chunks for j in chunk.teacher)),
        )
    )
    size = min(top_k, *(len(side.rows) - max(0, len(side.stops) - 1) for side in (pair.student, pair.teacher)))
    a, b = p[:, top(p.sum(0), size)], q[:, top(q.sum(0), size)]
    total = row.log_p.new_zeros(())
    for a_i, b_i in zip(a, b, strict=False):
        total = total + (a_i - b_i).abs().sum() + log_weight * kl(normalised(b_i), normalised(a_i))
    across, ours, theirs = (sinkhorn_cost(x, y, epsilon, iterations) for x, y in ((a, b), (a, a), (b, b)))
    return total + sinkhorn_weight * len(a) * (across - ours / 2 - theirs / 2)


def xtoken(row: Row, pair: Vocabularies) -> Tensor:
    students, teachers, weights = zip(*pair.projection, strict=True)
    reach = sorted({*teachers})
    total = row.log_p.new_zeros(())
    for chunk in row.level(pair):
        p, q = row.log_p[chunk.student].exp().mean(0), row.log_q[chunk.teacher].exp().mean(0)
        size = len(q)
        r = p.new_zeros(size).index_add(0, torch.tensor(teachers), p[torch.tensor(students)] * p.new_tensor(weights))
        q = q.new_zeros(size).index_add(0, torch.tensor(pair.first_of), q)
        reached = q[reach].sum()
        q, r = normalised(q[reach]), normalised(r[reach])
        inside = q > 0
        total = total + reached * (q[inside] * (q[inside].log() - r[inside].clamp(min=1e-12).log())).sum()
    return total


@functools.cache
def edit_distance(a: bytes, b: bytes) -> int:
    """Levenshtein's."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, line = line, [i]
        for j, y in enumerate(b, start=1):
            line.append(min(before[j] + 1, line[j - 1] + 1, before[j - 1] + (x != y)))
    return line[-1]


def spelling_distance(a: bytes, b: bytes) -> float:
    """Between two tokens' bytes, b"" for no text."""
    if not a or not b:
        return 1.0
    a, b = a.replace(b" ", b""), b.replace(b" ", b"")
    if a == b:
        return 0.0
    return 1.0 if max(len(a), len(b)) > 32 else edit_distance(a, b) / (len(a) + len(b))


def cheapest_path(costs: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Of dynamic time warping, from the last cell back."""
    total = {(-1, -1): 0.0}
    for i, j in itertools.product(range(len(costs)), range(len(costs[0]))):
        before = [total.get(cell, math.inf) for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1))]
        total[i, j] = costs[i][j] + min(before)
    path = [(len(costs) - 1, len(costs[0]) - 1)]
    while path[-1] != (0, 0):
        i, j = path[-1]
        path.append(min([(i - 1, j - 1), (i - 1, j), (i, j - 1)], key=lambda cell: total.get(cell, math.inf)))
    return path


def cdm_pairs(row: Row, pair: Vocabularies, chunk: Chunk) -> list[tuple[int, int]]:
    """The chunk's student and teacher positions that are compared."""

    def uncertainty(log_probs: Tensor) -> float:
        return -(log_probs.exp() * log_probs).sum().item() / math.log(len(log_probs))

    turn_end = row.is_turn_end(chunk, pair)
    costs = []
    for i, ours in zip(chunk.student, row.student_bytes(chunk.student, pair), strict=True):
        costs.append([])
        for j, theirs in zip(chunk.teacher, row.teacher_bytes(chunk.teacher, pair), strict=True):
            both = uncertainty(row.log_p[i]) * uncertainty(row.log_q[j])
            costs[-1].append(0.0 if turn_end else spelling_distance(ours, theirs) * both)
    return [(chunk.student[n], chunk.teacher[m]) for n, m in cheapest_path(costs)]


def cdm_matches(
    listed: Sequence[int],
    candidates: Sequence[int],
    partner: Mapping[int, int],
    candidate_partner: Mapping[int, int],
    rows: Sequence[bytes],
    candidate_rows: Sequence[bytes],
    threshold: float,
) -> list[tuple[int, int]]:
    """Each listed id of one side with its match on the other side, if it has one. Both are given by rank."""
    free = [u for u in candidates if candidate_rows[u] and u not in candidate_partner]
    matches = []
    for v in listed:
        if v in partner:
            matches.append((v, partner[v]))
        elif rows[v] and free:
            nearest = min(free, key=lambda u: spelling_distance(rows[v], candidate_rows[u]))  # the first of equals
            if spelling_distance(rows[v], candidate_rows[nearest]) < threshold:
                matches.append((v, nearest))
    return matches


def cdm(row: Row, pair: Vocabularies, top_k: int = 100, threshold: float = 0.1) -> Tensor:
    total = row.log_p.new_zeros(())
    for chunk in row.scorable():
        pairs = cdm_pairs(row, pair, chunk)
        for i, j in pairs:
            forward, backward = cdm_maps(row, pair, i, j, top_k, threshold)
            both = forward, [(w, v) for v, w in backward]
            share = 1 / sum(student == i for student, _ in pairs)
            for matches in both:
                if matches:
                    alike = [pair.alike(w, v) for w, v in matches]
                    p = torch.stack([row.log_p[i, ours].logsumexp(0) for _, ours in alike]).softmax(0)
                    q = torch.stack([row.log_q[j, theirs].logsumexp(0) for theirs, _ in alike]).softmax(0)
                    mass = sum(row.log_q[j, theirs].exp().sum() for theirs, _ in alike)
                    total = total + share * mass * kl(q, p) / 2
    return total


def cdm_maps(row: Row, pair: Vocabularies, i: int, j: int, top_k: int, threshold: float):
    """Forward (teacher id, student id) and backward (student id, teacher id) matches at a pair of positions."""
    ours, theirs = top(row.log_p[i], top_k), top(row.log_q[j], top_k)
    towards_student = pair.student_partner, pair.teacher_partner, pair.teacher.rows, pair.student.rows
    towards_teacher = pair.teacher_partner, pair.student_partner, pair.student.rows, pair.teacher.rows
    forward = cdm_matches(theirs, ours, *towards_student, threshold)
    return forward, cdm_matches(ours, theirs, *towards_teacher, threshold)
