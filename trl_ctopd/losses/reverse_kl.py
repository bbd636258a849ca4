"""The exact reverse KL across tokenizers: what the teacher's distributions tell is summed over the vocabulary, what they do
not tell is sampled, and the expected gradient is that of DPCA with closed chunks whatever they tell, if no later text parts what a token
had joined.

A chunk is written by decisions. After each student token the teacher's last token, or its beginning, lies there: it is left as
it is, or the next student token goes on inside it (`open`). Where it is left, the next student token begins a new one; where
not, it is one of those that go on. The probability of the chunk, as closed DPCA counts it, is the product of these, so its
policy gradient is Σ_d A ∇log p(o_d) over decisions d and their outcomes o_d, with one advantage A. Each decision has a guess
g_d(o) of A that rests on the text before it alone: log t_d(o) − log p_d(o), t_d the teacher's distribution told in student
tokens (as in BPM). The gradient of Σ_o p_d(o) g_d(o), exact, takes the place of the sampled g_d(o_d) ∇log p_d(o_d), and
A − g_d(o_d) stays sampled (a control variate: Greensmith, Bartlett & Baxter 2004; for one tokenizer, where it vanishes, the
full-vocabulary reverse KL). Decisions before d are past and their guesses a baseline, so they are taken off A too.

Decisions.
- What BPM compares is conditional: on going on inside a teacher token, on having left it. Held against the student's
  *un*conditional distribution it depends on the token that was drawn, and the expectation would not be kept.
- A student token that no teacher token stands for (one that spans two of the teacher's) shares the outcome of the longest shorter one
  that it begins with and for which there is one: the teacher's `):` and newline tell as much of the student's newline as of its newline
  and four spaces. Where there is none its guess is −`advantage_clip`, the sample corrects it, and as a baseline for later decisions it
  counts 0. So is that of a token with a probability below 1e-4.
- Where the two sides spell other bytes (markup between thought, answer and calls; the end of a turn that the teacher writes in several
  tokens), both begin at the same place, so that decisions have guesses up to the first token with markup, and the rest of the chunk has
  none. The student's control tokens there, for which the teacher has none, have the guess 0 everywhere: with −`advantage_clip` the sample,
  if it is masked, would not correct them, and the student would write them ever less.
- After text of which a control token of the student's may tell that it was markup (the newline of `\\n</think>`), nothing is known of whether it
  goes on: in one of the two cases the teacher has read another text.
- Where a turn may begin with an answer, a thought or a call, and one side alone has markup before one of them, or has it masked, the first chunk
  has no guesses, whatever is drawn there (`ScoredChunks.untold`). Nor has any chunk of a turn where the teacher's markup before a section foretells
  what comes after it: what is read there rests on the future.
- A student whose tokenizer puts a space before a text has no guesses at the first place of a turn, whatever is drawn there: what its
  first token spells is not what the teacher's does.
- At a chunk's end beside text that takes no part, and only there, nothing is known of the closing but its log-prob
  (`ScoredChunks.close_log_probs`): its guess is 0.
- A token that goes on by the table, and yet the teacher's tokenizer cut before it, is counted, and nothing goes on there: DPCA leaves
  that one token out of those that go on.
- A is clipped before the guess is taken off it, so that with the clip, too, the expectation does not depend on the guesses. Were the
  difference clipped, a token with the guess −`advantage_clip` could never be rewarded.
- Where a later digit can undo the teacher's boundary (`VocabularyPair.later_digits_undo`), which of its tokens is begun within a
  number depends on what follows. Within a chunk, the token after a digit has the guess 0.
- Where other later text undoes a boundary, the guesses depend on it too, and the expectation is another one: in a toy of three letters, by
  half of its largest element (`tests/losses/test_perfect_students.py`). Most of it comes from tokens that go on with the teacher's last
  token although no teacher token begins with that one: they have the guess −`advantage_clip`, and the text that they lead to never
  corrects it. A guess of 0 there takes the difference away, and yet the loss then collapsed in training (benchmarks/quality, stories,
  one seed of two), so it is kept.
- With `top_k`, the teacher is known by its likeliest tokens, and all that none of them stands for is one outcome: a server tells
  as much (`ScoredChunks.teacher_likeliest`). The token that was read is not one of them for having been read: a guess rests on
  the text before it. `top_k=0` is closed DPCA with credit "macro".
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from .base import Loss, Metrics, ScoredChunks
from .bpm import possible, standing_rows
from .credit import floored, gaps
from .distributions import over_tiles
from .policy_gradient import check_clip


_FLOOR = -80.0  # of log-probs that are compared, in nats
_RARE = 1e-4  # the probability of a token below which its outcome is not shared


class Places(NamedTuple):
    """
    Where each scored student token stands, all of shape (n,), in the order of the text.

    `student`, `teacher`: its position and that of the teacher token that covers its first byte, counted through the rows of the
    batch one after the other; `teacher_ids`, `written`: that teacher token and how many of its bytes are there already; `told`:
    whether it is known; `chunk`: its chunk, as a row of `ScoredChunks.chunks`; `first`: whether it is the first of it; `before`:
    the chunk that ends right before it, -1 for none; `head`: the teacher token that lies there before it, -1 for none.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    teacher_ids: torch.Tensor
    written: torch.Tensor
    told: torch.Tensor
    chunk: torch.Tensor
    first: torch.Tensor
    before: torch.Tensor
    head: torch.Tensor


def places(batch: ScoredChunks) -> Places:
    """The scored student tokens of scorable chunks."""
    chunks, shape = batch.chunks, batch.student_ids.shape
    of_chunk = torch.full_like(batch.scorable, -1, dtype=torch.long)
    of_chunk[chunks.row, chunks.chunk] = torch.arange(len(chunks.row), device=of_chunk.device)
    row, position = (batch.student_chunks >= 0).nonzero(as_tuple=True)
    chunk = of_chunk[row, batch.student_chunks[row, position]]
    row, position, chunk = (column[chunk >= 0] for column in (row, position, chunk))
    student = row * shape[1] + position
    first = student == chunks.student_first[chunk]

    index = student.new_full((shape.numel(),), -1)
    index[student] = torch.arange(len(student), device=student.device)
    standing = standing_rows(batch, mask_whitespace=False)
    told = torch.zeros_like(first).index_fill(0, index[standing.student], True)
    teacher, teacher_ids, written = (
        torch.zeros_like(student).index_put((index[standing.student],), column)
        for column in (standing.teacher, standing.teacher_ids, standing.written)
    )
    vocabulary, where = batch.vocabulary, (chunks.row[chunk], chunks.chunk[chunk])
    alike = (batch.student_bytes[where] > 0) & ~batch.has_markup[where]
    # where the two sides spell other bytes, both begin at the same place, and are alike until the first token with markup
    width = batch.student_widths.flatten()[student]
    is_text = (width > 0) & (width == vocabulary.student_widths[batch.student_ids.flatten()[student]])
    told &= alike | (batch.has_markup[where] & (_before_in_chunk((~is_text).long(), chunk, first) == 0))
    begins = chunks.teacher_first[chunk]
    apart = ~alike & first
    teacher = torch.where(apart, begins, teacher)
    teacher_ids = torch.where(apart, batch.teacher_ids.flatten()[begins], teacher_ids)
    written = written.masked_fill(apart, 0)
    told |= apart
    if batch.untold is not None:
        told &= ~batch.untold[row, position]
    if vocabulary.student_puts_a_space:  # the first text token of a turn is not told, so that no other one may be
        told &= (position > 0) & _is_scored_before(batch)[row, position]
    if vocabulary.later_digits_undo:
        after_digit = vocabulary.student_digits[batch.student_ids.flatten()[(student - 1).clamp(min=0)]]
        told &= first | ~after_digit
    ends = student.new_full((shape.numel(),), -1)
    ends[chunks.student_last] = torch.arange(len(chunks.row), device=student.device)
    before = torch.where(first & (position > 0), ends[(student - 1).clamp(min=0)], -1)

    head = _heads(batch, teacher_ids, written, told & ~first, before)
    undone = ~first & (head >= 0) & vocabulary.undone_by_markup[head.clamp(min=0)]
    told, head = told & ~undone, head.masked_fill(undone, -1)
    return Places(student, teacher, teacher_ids, written, told, chunk, first, before, head)


def _before_in_chunk(values: torch.Tensor, chunk: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """(n,) the sum of `values` (n,) over the tokens before each one in its `chunk` (n,), of which `first` (n,) begins one."""
    before = values.cumsum(0) - values
    return before - before[first][torch.unique_consecutive(chunk, return_inverse=True)[1]]


def _is_scored_before(batch: ScoredChunks) -> torch.Tensor:
    """(B, S) whether the token before is scored."""
    return torch.nn.functional.pad(batch.student_chunks >= 0, (1, 0))[:, :-1]


def _heads(batch: ScoredChunks, teacher_ids, written, inside, before) -> torch.Tensor:
    """(n,) the teacher token that lies there: of the chunk that ends, or begun and not left."""
    if batch.vocabulary.is_one_tokenizer:
        return torch.full_like(before, -1)
    prefixes = batch.vocabulary.prefixes
    entry = (prefixes.start[teacher_ids] + written).clamp(max=len(prefixes.head) - 1)
    begun = prefixes.head[entry].masked_fill(~inside | (written == 0), -1)
    return torch.where(before >= 0, batch.teacher_ids.flatten()[batch.chunks.teacher_last[before]], begun)


class Closings(NamedTuple):
    """(m,) positions, log p_close with gradient, and the chunks, as rows of `ScoredChunks.chunks`, that end before or begin there."""

    position: torch.Tensor
    score: torch.Tensor
    chunk: torch.Tensor


def _closings_beside(batch: ScoredChunks, at: Places) -> tuple[Closings, Closings]:
    """Those beside text that takes no part: of chunks that end before it, and of chunks that begin after it."""
    chunks, shape = batch.chunks, batch.student_ids.shape
    close = batch.student_log_probs.new_zeros(shape) if batch.close_log_probs is None else batch.close_log_probs
    beside = (close.detach() != 0).flatten().index_fill(0, at.student[at.before >= 0], False)
    found = []
    for position in (chunks.student_last + 1, chunks.student_first):
        chunk = (beside[position.clamp(max=shape.numel() - 1)] & (position < shape.numel())).nonzero()[:, 0]
        position = position[chunk]
        found.append(Closings(position, close.flatten()[position], chunk))
    ended, begun = found
    in_row = ended.position % shape[1] > 0
    return Closings(*(column[in_row] for column in ended)), begun


def log_ratio(log_t: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """log t − log p, each at least e^-80; 0 where the student has nothing."""
    return (log_t.clamp(min=_FLOOR) - log_p.clamp(min=_FLOOR)).masked_fill(log_p == -torch.inf, 0)


@dataclass
class ReverseKL(Loss):
    """
    loss = −Σ_d [Σ_o p_d(o) sg(g_d(o)) + sg(R_d) · log p_d(o_d)] / N over the decisions d, with

        g_d(o) = clip(log t_d(o) − log p_d(o), ±advantage_clip),
        R_d = clip(G_c − Σ_{d' of c before d} (log t_d'(o_d') − log p_d'(o_d')), ±advantage_clip) − g_d(o_d),

    and G_c the gap of d's chunk, as in [`DPCA`] with `event="closed"`. Rewards (`ScoredChunks.rewards`) are a policy gradient of
    their own on the scored tokens: nothing of them can be told before a text is complete, so no part of theirs is exact.

    A perfect student stays where no later text parts what a token had joined, and without `teacher_close_log_probs` only if none of its
    tokens holds several of the teacher's, as with closed chunks.

    Args:
        advantage_clip (`float` or `None`, defaults to `10.0`): bound on guesses and corrections in nats; `None` for none but
            that of probabilities at e^-80.
        top_k (`int`, *optional*): how many of the teacher's likeliest tokens are known at each position. `None`: all, which a
            teacher behind a server does not tell.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 8
    policy: ClassVar[str] = "on"
    weighs_by_importance: ClassVar[bool] = True
    takes_rewards: ClassVar[bool] = True
    bridges_markup: ClassVar[bool] = True
    event: ClassVar[str] = "closed"  # so that the last chunk of a text that was cut off takes no part
    structures: ClassVar[tuple[str, ...]] = ("prefixes", "continuations")

    advantage_clip: float | None = 10.0
    top_k: int | None = None

    def __post_init__(self):
        check_clip(self.advantage_clip)
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"reverse_kl's top_k must not be negative, got {self.top_k}.")

    @property
    def likeliest(self) -> int | None:
        return self.top_k

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        batch = replace(batch, teacher_log_probs=floored(batch.teacher_log_probs))
        at = places(batch)
        ids = batch.student_ids.flatten()[at.student]
        student, teacher = (batch.student, at.student), None
        per_row = (at.teacher_ids, at.written, at.told, at.head, at.before >= 0, ids)
        if batch.teacher is not None:
            teacher = batch.teacher, at.teacher
        elif batch.teacher_likeliest is None or self.top_k is None:
            raise ValueError(
                "reverse_kl with top_k=None reads the teacher's whole distributions, and the batch has none: set top_k, and give "
                "as many of the teacher's likeliest tokens (`ScoredChunks.teacher_likeliest`)."
            )
        else:
            per_row += tuple(told.flatten(0, 1)[at.teacher] for told in batch.teacher_likeliest)

        def decisions(log_p, *rows):
            if teacher is None:
                *rows, likeliest, log_q = rows
                known = told_by_server(likeliest, log_q, self.top_k, len(batch.vocabulary.prefixes.place))
            else:
                log_q, *rows = rows
                known = likeliest_alone(log_q, self.top_k)
            return self._decisions(batch, log_p, *known, *rows)

        tile, keep = self._tile_and_keep(batch, len(ids))
        drawn, closed, opened, tokens, guess, sharp, close_told, open_told, own_close, own_open, contradicted = (
            over_tiles(decisions, tile, student, teacher, *per_row, keep=keep)
        )
        closes = (at.before >= 0) & torch.isfinite(opened)
        inside = (at.before < 0) & torch.isfinite(opened)

        # whether the last teacher token is left, where its distribution was read before: at a chunk's end, or inside it
        previous = (torch.arange(len(ids), device=ids.device) - 1).clamp(min=0)
        of, token = at.chunk.clone(), at.teacher.clone()
        of[closes] = at.before[closes]
        token[closes] = batch.chunks.teacher_last[at.before[closes]]
        known = at.told[previous] & (at.chunk[previous] == of) & (at.teacher[previous] == token)
        log_t = torch.where(closes, own_close[previous], close_told), torch.where(closes, own_open[previous], open_told)
        known &= torch.isfinite(opened) & ~torch.isnan(log_t[0])
        known &= ~batch.vocabulary.undone_by_markup[at.head.clamp(min=0)]
        close_guess, close_sharp = self._guess(log_t[0], closed.detach(), known)
        open_guess, open_sharp = self._guess(log_t[1], opened.detach(), known)
        leaving = (closed.exp() * close_guess + opened.exp().masked_fill(~known, 0) * open_guess)[known]

        gap = self._gaps(batch, at, closed.detach(), closes)
        ended, begun = _closings_beside(batch, at)
        gap = gap.index_add(0, ended.chunk, -ended.score.detach()).index_add(0, begun.chunk, begun.score.detach())
        where = batch.chunks.row, batch.chunks.chunk
        gap = gap.masked_fill(batch.without_gap[where], 0)
        if (other := batch.spelled_otherwise) is not None:
            gap = torch.where(other[where], gap.clamp(max=0), gap)
        # each chunk's decisions in the order of the text: to go on (inside), which token; at its end, to leave it
        open_sharp, open_guess = open_sharp * inside, open_guess * inside
        by_row = (open_sharp + sharp).double()
        past = (_before_in_chunk(by_row, at.chunk, at.first) + by_row).to(gap.dtype)
        total = gap.new_zeros(len(gap)).index_add(0, at.chunk, by_row.to(gap.dtype))
        left = gap[at.chunk]
        ends = at.before[closes]
        nothing = torch.zeros_like(gap)
        corrections = (
            (left - past + sharp, guess, self._scores(drawn, closed, opened, closes, inside)),
            ((left - past + sharp + open_sharp)[inside], open_guess[inside], opened[inside]),
            ((gap - total)[ends], close_guess[closes], closed[closes]),
            ((gap - total)[ended.chunk], nothing[ended.chunk], ended.score),
            (gap[begun.chunk], nothing[begun.chunk], -begun.score),
        )
        value = tokens.sum() + leaving.sum()
        cut, size = torch.zeros_like(batch.student_chunks, dtype=torch.bool).flatten(), 0
        weights = (at.student, at.student[inside], at.student[closes], ended.position, begun.position)
        decided = (*weights[:3], batch.chunks.student_last[ended.chunk], begun.position)  # the token of each
        for (advantage, guessed, score), positions, token in zip(corrections, weights, decided, strict=True):
            bounded = self._bounded(advantage.detach())
            cut[token[bounded != advantage]] = True
            bounded = bounded - guessed
            size += bounded.abs().sum()
            if batch.importance is not None:
                bounded = bounded * batch.importance.flatten()[positions]
            value = value + (bounded * (score - score.detach()).exp()).sum()
        if batch.rewards is not None:
            value = value + self._rewarded(batch)
        metrics = {
            "advantage/clipped_fraction": (cut.sum(), batch.scored_tokens),
            "loss/compared_fraction": (at.told.sum(), batch.scored_tokens),
            "reverse_kl/sampled_nats_per_token": (size, batch.scored_tokens),
            "closing/nats_per_chunk": (
                -closed.detach()[closes].sum() - ended.score.detach().sum(),
                torch.tensor(len(gap)),
            ),
            "closing/contradicted_fraction": (contradicted.sum(), batch.scored_tokens),
        }
        return -value / num_items, metrics

    def _tile_and_keep(self, batch: ScoredChunks, count: int) -> tuple[int, bool]:
        """Rows of a tile, and whether the `count` rows are kept for the backward pass: their log-probs and weights, where these take no
        more than half of the memory that there is. A tile then takes the other half."""
        vocabulary = batch.vocabulary
        keep = self._are_kept(count, batch.tile_tokens, vocabulary.student_size, vocabulary.teacher_size)
        return (max(1, self.tile(batch) // 2) if keep else self.tile(batch)), keep

    @staticmethod
    def _are_kept(count: int, tile_tokens: int, student_size: int, teacher_size: int) -> bool:
        return 2 * (2 * student_size * count) <= tile_tokens * (student_size + teacher_size)

    @classmethod
    def numbers_held(cls, tokens: int, tile_tokens: int, student_size: int, teacher_size: int) -> int:
        """What is kept, and of the room for tiles the part that was measured (`benchmarks/scaling/peaks.py`)."""
        room = super().numbers_held(tokens, tile_tokens, student_size, teacher_size)
        if cls._are_kept(tokens, tile_tokens, student_size, teacher_size):
            return 2 * student_size * tokens + room // 8
        return room // 2

    @staticmethod
    def _rewarded(batch: ScoredChunks) -> torch.Tensor:
        """Σ_i reward · exp(log p_i − sg(log p_i)) over the scored tokens."""
        rewards = batch.rewards[:, None] * (batch.student_chunks >= 0)
        if batch.importance is not None:
            rewards = rewards * batch.importance
        return (rewards * (batch.student_log_probs - batch.student_log_probs.detach()).exp()).sum()

    def _scores(self, drawn, closed, opened, closes, inside):
        """(n,) log-prob of each student token given that it goes on, or that what lay there is left."""
        given = torch.where(closes, closed, torch.zeros_like(closed))
        return drawn - torch.where(inside, opened.masked_fill(~inside, 0), given)

    def _gaps(self, batch: ScoredChunks, at: Places, closed: torch.Tensor, closes: torch.Tensor) -> torch.Tensor:
        """(K,) of closed chunks, without gradient."""
        log_probs, chunks = batch.student_log_probs.detach(), batch.chunks
        sides = batch.student_chunks, batch.teacher_chunks, batch.num_chunks
        gap, _ = gaps(log_probs, batch.teacher_log_probs, *sides, teacher_close_log_probs=batch.teacher_close_log_probs)
        gap = gap[chunks.row, chunks.chunk]
        moved = closed[closes].to(gap.dtype)
        return gap.index_add(0, at.chunk[closes], moved).index_add(0, at.before[closes], -moved)

    def _bounded(self, values: torch.Tensor) -> torch.Tensor:
        bound = float("inf") if self.advantage_clip is None else self.advantage_clip
        return values.clamp(-bound, bound)

    def _guess(
        self, log_t: torch.Tensor, log_p: torch.Tensor, known: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log t − log p within bounds, and not, but then 0 where the teacher has nothing. Both are 0 where it is not known."""
        sharp = log_ratio(log_t, log_p).masked_fill(~known, 0)
        return self._bounded(sharp), sharp.masked_fill(log_t == -torch.inf, 0)

    def _decisions(self, batch, log_p, known_q, rest, teacher_ids, written, told, head, closes, ids):
        """
        A tile's rows (n,): log-probs of the sampled token, of leaving what lies there and of going on, Σ_o p(o) g(o) over the next token, g of the
        sampled one and the same without bounds; the teacher's log-probs of leaving and going on, of `head` and of its whole
        token; and whether the sampled token contradicts the table of continuations.
        """
        prefixes, count = batch.vocabulary.prefixes, len(ids)
        row, token = going_on(batch, head)
        drawn_goes_on = torch.zeros_like(closes).index_fill(0, row[token == ids[row]], True)
        contradicted = (head >= 0) & (drawn_goes_on == closes)
        inside = (head >= 0) & ~closes & ~contradicted
        row, token = row[~contradicted[row]], token[~contradicted[row]]
        drawn = log_p.gather(1, ids[:, None])[:, 0]
        opened = _logsumexp_by_row(log_p[row, token], row, count)
        closed = _complement(opened, drawn, ~inside)
        given = torch.where(inside, opened.masked_fill(~inside, 0), closed)

        with torch.no_grad():
            # rows that are not compared have no probability, and so no weight
            p = _renormalised(log_p, given.masked_fill(~told, torch.inf), inside, row, token)
            p[:, batch.vocabulary.without_counterpart] = 0
            sampled_told = told & ~torch.isin(ids, batch.vocabulary.without_counterpart)
            by_outcome = prefixes.by_outcome(p)
            t, unknown = _told(prefixes, known_q, rest, teacher_ids, written)
            spanning, shared = _shared_outcomes(batch.vocabulary.student_stems, t, by_outcome)
            if unknown is not None:  # what no known token stands for is one outcome
                untold = t == 0
                together = (by_outcome * untold).sum(1, keepdim=True)
                t = torch.where(untold, unknown[:, None], t)
                by_outcome = torch.where(untold & (by_outcome > 0), together, by_outcome)
            outcome = prefixes.student_outcome[ids]
            own = outcome[spanning[0]] == spanning[1]
            outcome = outcome.index_put((spanning[0][own],), shared[own])[:, None]
            sampled = (both.gather(1, outcome)[:, 0].log() for both in (t, by_outcome))
            guess, sharp = self._guess(*sampled, sampled_told)
            guesses = self._bounded_ratio(t, by_outcome)
            guesses[spanning] = guesses[spanning[0], shared]
            weights = p.mul_(prefixes.by_student_token(guesses))
            of_head = _leaving(prefixes, known_q, rest, head)
            of_token = _leaving(prefixes, known_q, rest, teacher_ids)
        expected = _Expected.apply(log_p, given, weights)
        return drawn, closed, opened, expected, guess, sharp, *of_head, *of_token, contradicted

    def _bounded_ratio(self, t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """log t − log p within bounds, in the place of `t` and `p`; anything where p is 0."""
        floor = math.exp(_FLOOR)
        ratio = t.clamp_(min=floor).div_(p.clamp_(min=floor)).log_()
        return ratio if self.advantage_clip is None else ratio.clamp_(-self.advantage_clip, self.advantage_clip)


def likeliest_alone(log_q: torch.Tensor, top_k: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The teacher's log-probs (n, V_T), -inf where they are not known, and the probability (n,) of what is not."""
    if top_k is None or top_k >= log_q.shape[1]:
        return log_q, None
    top = log_q.topk(top_k, dim=1)
    known = torch.full_like(log_q, -torch.inf).scatter(1, top.indices, top.values)
    return known, (1 - known.exp().sum(1)).clamp(min=0)


def told_by_server(
    ids: torch.Tensor, log_probs: torch.Tensor, top_k: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`likeliest_alone` of the likeliest tokens (n, k); those that the tokenizer does not know are not known either."""
    log_probs, best = log_probs.topk(min(top_k, log_probs.shape[1]), dim=1)
    ids = ids.gather(1, best)
    log_probs = log_probs.masked_fill(ids >= size, -torch.inf)
    known = log_probs.new_full((len(ids), size), -torch.inf).scatter_reduce(
        1, ids.clamp(max=size - 1), log_probs, "amax"
    )
    return known, (1 - known.exp().sum(1)).clamp(min=0)


class _Expected(torch.autograd.Function):
    """Σ_v w(v), where w(v) = exp(log p(v) − given) · g(v) of log p (n, V), given (n,) and g without gradient."""

    @staticmethod
    def forward(ctx, log_p, given, weights):
        ctx.save_for_backward(weights)
        return weights.sum(1)

    @staticmethod
    def backward(ctx, grad):
        [weights] = ctx.saved_tensors
        return weights * grad[:, None], -grad * weights.sum(1), None


def going_on(batch: ScoredChunks, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,) rows of a tile and the student tokens with which the teacher's token `head` (n,) of each goes on."""
    [some] = (head >= 0).nonzero(as_tuple=True)
    row, token = (
        torch.from_numpy(found).to(head.device) for found in batch.vocabulary.continuations.rows(head[some].tolist())
    )
    return some[row], token.long()


def _logsumexp_by_row(values: torch.Tensor, row: torch.Tensor, count: int) -> torch.Tensor:
    """(count,) log Σ exp of the `values` (K,) of each row (K,); -inf where there are none."""
    most = values.detach().new_full((count,), -torch.inf).scatter_reduce(0, row, values.detach(), "amax")
    most = most.masked_fill(most == -torch.inf, 0)
    total = values.new_zeros(count).index_add(0, row, (values - most[row]).exp())
    nothing = total == 0
    return (total.masked_fill(nothing, 1).log() + most).masked_fill(nothing, -torch.inf)


def _complement(opened: torch.Tensor, drawn: torch.Tensor, drawn_closes: torch.Tensor) -> torch.Tensor:
    """log(1 − e^opened) of log-probs (n,), at least that of the token that was drawn where this closes."""
    most = 1 - torch.finfo(opened.dtype).eps
    closed = torch.log1p(-opened.exp().clamp(max=most))
    return torch.where(drawn_closes & (drawn > closed), drawn, closed)


def _renormalised(log_p, given, inside, row, token) -> torch.Tensor:
    """(n, V) the student's probabilities of the next token, given that it goes on (`inside`) or that it does not; `token` (K,) are
    those that go on, by `row`."""
    p = (log_p.detach() - given.detach()[:, None]).exp_()
    going_on = inside[row]
    p[row[~going_on], token[~going_on]] = 0
    if going_on.any():
        kept = p[row[going_on], token[going_on]]
        p[inside] = 0
        p[row[going_on], token[going_on]] = kept
    return p


def _told(prefixes, log_q, rest, teacher_ids, written):
    """The teacher's probabilities (n, V_S + 1) of the student's outcomes, given the bytes already written; and, where some of
    its tokens are not known, that of all of those."""
    q, unknown = log_q.exp(), rest
    t = q.new_zeros(len(q), len(prefixes.student_outcome) + 1)
    t.scatter_add_(1, prefixes.first_outcome.expand_as(q), q)
    begun = written > 0
    if not begun.any():
        return t, unknown
    log_q, q, teacher_ids, written = log_q[begun], q[begun], teacher_ids[begun], written[begun]
    if rest is None:
        q = possible(prefixes, log_q, teacher_ids, written)
    else:
        q = q * prefixes.going_on(teacher_ids, written)
        total = (q.sum(1) + rest[begun]).clamp(min=torch.finfo(q.dtype).tiny)
        q, unknown = q / total[:, None], rest.index_put((begun,), rest[begun] / total)
    t[begun] = t.new_zeros(len(q), t.shape[1]).scatter_add_(1, prefixes.outcome[prefixes.entries(written)], q)
    return t, unknown


def _shared_outcomes(stems: torch.Tensor, t: torch.Tensor, by_outcome: torch.Tensor):
    """Adds to the student's probabilities `by_outcome` (n, V_S + 1), in place, those of outcomes that the teacher's `t` (n, V_S + 1) has
    nothing for: to the longest stem for which it has. Returns rows and outcomes (m,) that were added, and (m,) to which."""
    row, outcome = ((t == 0) & (by_outcome > _RARE)).nonzero(as_tuple=True)
    nothing, shared = len(stems) - 1, stems[outcome]
    while (lost := (shared != nothing) & (t[row, shared] == 0)).any():
        shared = torch.where(lost, stems[shared], shared)
    row, outcome, shared = (column[shared != nothing] for column in (row, outcome, shared))
    by_outcome.index_put_((row, shared), by_outcome[row, outcome], accumulate=True)
    by_outcome[row, outcome] = 0
    return (row, outcome), shared


def _leaving(prefixes, log_q, rest, teacher_ids):
    """(n,) log-probs, of tokens that begin with all of `teacher_ids` (-1 for none), that it is them and that they go on; NaN where
    neither is known."""
    some, ids = teacher_ids >= 0, teacher_ids.clamp(min=0)
    alike = prefixes.alike[ids].masked_fill(~some[:, None], -1)
    own = log_q.gather(1, alike.clamp(min=0)).masked_fill(alike < 0, -torch.inf).logsumexp(1)
    row, token = prefixes.longer_tokens(ids, some)
    longer = _logsumexp_by_row(log_q[row, token], row, len(ids))
    if rest is not None:
        nothing = (own == -torch.inf) & (longer == -torch.inf)
        own, longer = (torch.where(mass == -torch.inf, rest.log(), mass) for mass in (own, longer))
        own = own.masked_fill(nothing, torch.nan)
    both = torch.logaddexp(own, longer)
    return own - both, longer - both
