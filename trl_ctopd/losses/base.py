"""What every loss is given and what it declares: the one call behind which all methods stand."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch

from ..text.vocabulary import VocabularyPair
from .credit import chunk_sum, spread
from .distributions import Distributions


Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # name -> (sum, weight); the logged figure is sum / weight


class ChunkTable(NamedTuple):
    """
    The scorable chunks of a micro-batch, one after the other: those with tokens on both sides and a finite teacher.

    `row`, `chunk`: which; `student_first`, `student_last`, `teacher_first`, `teacher_last`: positions of their outer
    tokens, counted through the rows of the batch one after the other; `student_tokens`, `teacher_tokens`: how many.
    All of shape (K,).
    """

    row: torch.Tensor
    chunk: torch.Tensor
    student_first: torch.Tensor
    student_last: torch.Tensor
    teacher_first: torch.Tensor
    teacher_last: torch.Tensor
    student_tokens: torch.Tensor
    teacher_tokens: torch.Tensor

    def where(self, keep: torch.Tensor) -> "ChunkTable":
        """The chunks for which `keep` (K,) is True."""
        return ChunkTable(*(column[keep] for column in self))

    @property
    def one_to_one(self) -> torch.Tensor:
        """(K,) True for chunks of one token on each side."""
        return (self.student_tokens == 1) & (self.teacher_tokens == 1)


@dataclass
class ScoredChunks:
    """
    A micro-batch of completions, written down once and scored by both models.

    Args:
        student_log_probs (`torch.Tensor` of shape (B, S)): log-prob of each student token in nats, with gradient. That of a stop token
            is of all stop tokens with which the text ends alike.
        teacher_log_probs (`torch.Tensor` of shape (B, T)): log-prob of each teacher token in nats, without.
        student_chunks (`torch.LongTensor` of shape (B, S)): chunk of each student token in its row, -1 for no part.
        teacher_chunks (`torch.LongTensor` of shape (B, T)): chunk of each teacher token in its row, -1 for no part.
        student_widths (`torch.LongTensor` of shape (B, S)): bytes of text each student token spells.
        num_chunks (`int`): C, at least 1 and more than any chunk number.
        student_ids (`torch.LongTensor` of shape (B, S)), teacher_ids (`torch.LongTensor` of shape (B, T)): the tokens.
        drawn_log_probs (`torch.Tensor` of shape (B, S), *optional*): `student_log_probs` of the tokens that were drawn alone, without gradient.
        old_log_probs (`torch.Tensor` of shape (B, S), *optional*): `student_log_probs` as they were before the first update
            on these completions, where this is a later one.
        importance (`torch.Tensor` of shape (B, S), *optional*): how much likelier each token is under the policy than under
            the sampler that drew it, within bounds, where these are not one.
        close_log_probs (`torch.Tensor` of shape (B, S), *optional*): where a chunk ends right before a student token, the
            log-prob, with gradient, that the student leaves the teacher's last token closed there: log(1 − the probability
            of the tokens with which the teacher's tokenizer would not cut there), under the distribution that the student
            token was drawn from; 0 elsewhere. For a loss with `event = "closed"`.
        teacher_close_log_probs (`torch.Tensor` of shape (B, T), *optional*): the same of the teacher, where a chunk ends right
            before one of its tokens: the log-prob that it leaves the student's last token closed there. `None` where a server does not
            tell it.
        old_close_log_probs (`torch.Tensor` of shape (B, S), *optional*): `close_log_probs` as `old_log_probs` are.
        unclosed (`torch.LongTensor` of shape (B,), *optional*): the chunk at a text's end of which nothing tells how it closes, -1 for
            none. For a loss with `event = "closed"` on distributions, which takes its gap for 0.
        teacher_likeliest (`tuple` of a `torch.LongTensor` and a `torch.Tensor` of shape (B, T, k), *optional*): ids and
            log-probs of the k likeliest teacher tokens at each position, for a loss with `likeliest` and a teacher behind a
            server; -inf where nothing is known.
        markup (`torch.BoolTensor` of shape (B, S), *optional*): True for the tokens of chunks with the markup of a chat template, of
            which the two sides may spell other bytes.
        untold (`torch.BoolTensor` of shape (B, S), *optional*): True for tokens of which the teacher's distributions tell nothing, though its chunk is
            scored: where a turn may begin in several ways, and where the teacher's markup foretells what the student decides later.
        other_spelling (`torch.BoolTensor` of shape (B, S), *optional*): True for tokens that the student's tokenizer would not
            have made of the text.
        rewards (`torch.Tensor` of shape (B,), *optional*): for a loss with `takes_rewards`, what is added to the advantages of each row's
            scored tokens.
        reference_log_probs (`torch.Tensor` of shape (B, S), *optional*): `student_log_probs` of the student as it was at the
            start, for `reference_kl` and a loss with `reads_start`.
        reference_teacher_log_probs (`torch.Tensor` of shape (B, T), *optional*): `teacher_log_probs` of the reference teacher, a
            second one of the same tokens.
        prompts (`torch.LongTensor` of shape (B,), *optional*): a number of each row's prompt, for a loss with
            `compares_completions`; `None`: all rows are of one.
        imbalance (scalar `torch.Tensor`, *optional*): of a student that is a mixture of experts, how unevenly its routers share out
            the tokens; the trainer adds it to the loss.

    And where the loss asks for distributions (`signal = "logits"`):
        student, teacher (`Distributions`): of the two models, over (B, S) and (B, T); no teacher's where there is
            `teacher_likeliest`.
        vocabulary (`VocabularyPair`): what their vocabularies have in common.
        tile_tokens (`int`): how many tokens' worth of both models' float32 logits may be alive at once.
    """

    student_log_probs: torch.Tensor
    teacher_log_probs: torch.Tensor
    student_chunks: torch.Tensor
    teacher_chunks: torch.Tensor
    student_widths: torch.Tensor
    num_chunks: int
    student_ids: torch.Tensor | None = None
    teacher_ids: torch.Tensor | None = None
    drawn_log_probs: torch.Tensor | None = None
    old_log_probs: torch.Tensor | None = None
    importance: torch.Tensor | None = None
    close_log_probs: torch.Tensor | None = None
    teacher_close_log_probs: torch.Tensor | None = None
    old_close_log_probs: torch.Tensor | None = None
    unclosed: torch.Tensor | None = None
    teacher_likeliest: tuple[torch.Tensor, torch.Tensor] | None = None
    markup: torch.Tensor | None = None
    untold: torch.Tensor | None = None
    other_spelling: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    reference_teacher_log_probs: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    imbalance: torch.Tensor | None = None
    student: Distributions | None = None
    teacher: Distributions | None = None
    vocabulary: VocabularyPair | None = None
    tile_tokens: int = 1024

    @property
    def policy_log_probs(self) -> torch.Tensor:
        """(B, S) log-probs, without gradient, under the policy that the advantages are those of: the one that wrote."""
        return self.student_log_probs.detach() if self.old_log_probs is None else self.old_log_probs

    @property
    def policy_close_log_probs(self) -> torch.Tensor | None:
        """(B, S) `close_log_probs` as `policy_log_probs` are."""
        old = self.old_close_log_probs
        return self.close_log_probs.detach() if old is None and self.close_log_probs is not None else old

    @property
    def policy_scores(self) -> torch.Tensor:
        """(1 or 2, B, S) `policy_log_probs`, and `policy_close_log_probs` where there are any."""
        close = self.policy_close_log_probs
        return torch.stack([self.policy_log_probs, *([] if close is None else [close])])

    def student_sum(self, values: torch.Tensor) -> torch.Tensor:
        """(B, S) in, sums over each chunk (B, C) out."""
        return chunk_sum(values, self.student_chunks, self.num_chunks)

    @property
    def spelled_otherwise(self) -> torch.Tensor | None:
        """(B, C) True for chunks with a token of `other_spelling`; None where that is not known."""
        return None if self.other_spelling is None else self.student_sum(self.other_spelling.long()) > 0

    @property
    def without_gap(self) -> torch.Tensor:
        """(B, C) True for the chunks of `unclosed`."""
        number = torch.arange(self.num_chunks, device=self.student_chunks.device)
        last = number.new_full((len(self.student_chunks),), -1) if self.unclosed is None else self.unclosed
        return number == last.to(number.device)[:, None]

    @property
    def compared_chunks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`student_chunks` (B, S) and `teacher_chunks` (B, T), with -1 for those `without_gap` too."""
        student, teacher = self.student_chunks, self.teacher_chunks
        return tuple(own.masked_fill(spread(self.without_gap, own), -1) for own in (student, teacher))

    def teacher_sum(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T) in, sums over each chunk (B, C) out."""
        return chunk_sum(values, self.teacher_chunks, self.num_chunks)

    @cached_property
    def scorable(self) -> torch.Tensor:
        """(B, C) True for chunks that have tokens on both sides and whose teacher log-probs are finite."""
        return (
            (self.student_tokens > 0)
            & (self.teacher_tokens > 0)
            & torch.isfinite(self.teacher_sum(self.teacher_log_probs))
        )

    @cached_property
    def student_tokens(self) -> torch.Tensor:
        """(B, C) how many student tokens each chunk has."""
        return self.student_sum(torch.ones_like(self.student_chunks))

    @cached_property
    def teacher_tokens(self) -> torch.Tensor:
        """(B, C) how many teacher tokens each chunk has."""
        return self.teacher_sum(torch.ones_like(self.teacher_chunks))

    @cached_property
    def chunks(self) -> ChunkTable:
        """The scorable chunks."""
        row, chunk = self.scorable.nonzero(as_tuple=True)
        columns = []
        for chunks, tokens in (
            (self.student_chunks, self.student_tokens),
            (self.teacher_chunks, self.teacher_tokens),
        ):
            position = torch.arange(chunks.numel(), device=chunks.device).view_as(chunks)
            inside, slot = chunks >= 0, chunks.clamp(min=0)
            outer = position.new_zeros(chunks.shape[0], self.num_chunks)
            for reduce, outside in (("amin", chunks.numel()), ("amax", -1)):
                found = outer.fill_(outside).scatter_reduce(1, slot, position.masked_fill(~inside, outside), reduce)
                columns.append(found[row, chunk])
            columns.append(tokens[row, chunk])
        student_first, student_last, student_tokens, teacher_first, teacher_last, teacher_tokens = columns
        return ChunkTable(
            row, chunk, student_first, student_last, teacher_first, teacher_last, student_tokens, teacher_tokens
        )

    @cached_property
    def prefix_excess(self) -> torch.Tensor:
        """
        (B, C) bytes that the teacher's tokens of a chunk spell beyond those that the student's do: 1 or -1 where one
        side has put a dummy prefix space before the text and the other has not, else 0. A chunk with the end of a turn has
        none, whatever the teacher writes before its control token, nor has one with markup.
        """
        excess = self.teacher_sum(self.vocabulary.teacher_widths[self.teacher_ids]) - self.student_bytes
        ends = self.student_sum((self.vocabulary.student_widths[self.student_ids] == 0).long()) > 0
        return excess.masked_fill(ends | self.has_markup, 0)

    @cached_property
    def has_markup(self) -> torch.Tensor:
        """(B, C) True for the chunks with markup, of which the two sides may spell other bytes."""
        if self.markup is None:
            return torch.zeros_like(self.scorable)
        return self.student_sum(self.markup.long()) > 0

    @cached_property
    def student_bytes(self) -> torch.Tensor:
        """(B, C) bytes that the student's tokens of each chunk spell; 0 for the end of a turn."""
        return self.student_sum(self.vocabulary.student_widths[self.student_ids])

    @property
    def scored_tokens(self) -> torch.Tensor:
        """How many student tokens take part."""
        return (self.student_chunks >= 0).sum()

    @cached_property
    def comparable_chunks(self) -> ChunkTable:
        """The scorable chunks before which both sides have spelled the same bytes, without the ends of turns that the
        teacher writes in several tokens: at the first of them it may still mean text."""
        where = self.chunks.row, self.chunks.chunk
        is_text = self.student_bytes[where] > 0
        return self.chunks.where((self.prefix_excess[where] == 0) & (is_text | self.vocabulary.bridged))

    @property
    def positional_pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """
        (P,) student and (P,) teacher positions: the n-th token of a row that is in a scorable chunk, on both sides;
        counted through the rows of the batch one after the other.
        """
        positions, rows, ranks = [], [], []
        for chunks in (self.student_chunks, self.teacher_chunks):
            inside = spread(self.scorable, chunks)
            positions.append(inside.flatten().nonzero()[:, 0])
            rows.append(inside.nonzero()[:, 0])
            ranks.append((inside.cumsum(1) - 1)[inside])
        longest = max(chunks.shape[1] for chunks in (self.student_chunks, self.teacher_chunks))
        names = [row * longest + rank for row, rank in zip(rows, ranks, strict=True)]
        return tuple(positions[side][torch.isin(names[side], names[1 - side])] for side in (0, 1))

    def log_probs_before_last(self, chunks: ChunkTable) -> tuple[torch.Tensor, torch.Tensor]:
        """(K,) student's and (K,) teacher's log-prob of all of each chunk's tokens but the last."""
        student = self.student_log_probs.flatten().index_fill(0, chunks.student_last, 0).view_as(self.student_log_probs)
        teacher = self.teacher_log_probs.flatten().index_fill(0, chunks.teacher_last, 0).view_as(self.teacher_log_probs)
        where = chunks.row, chunks.chunk
        return self.student_sum(student)[where], self.teacher_sum(teacher)[where]

    def cross_entropy(self) -> torch.Tensor:
        """−Σ_i log p_i over the scored student tokens."""
        return -(self.student_log_probs * (self.student_chunks >= 0)).sum()

    def compared(self, chunks: ChunkTable) -> Metrics:
        """The share of the scored student tokens that is in `chunks`."""
        return {"loss/compared_fraction": (chunks.student_tokens.sum(), self.scored_tokens)}


@dataclass
class Loss:
    """
    Base of the losses: a dataclass of the method's own knobs, called with a scored micro-batch.

    `signal` says what the teacher must deliver a token: `"logprobs"` (of the token it read), `"logits"` (its whole
    distribution), `"none"`. `policy` says on whose text the loss is right: `"on"` (text the student wrote), `"off"`
    (text it did not), `"both"`. `weighs_by_ratio` tells that it stays right on text of the student before its last updates,
    by `old_log_probs`; `weighs_by_importance`, that it weighs what was sampled by `importance`; `takes_rewards`, that it adds `ScoredChunks.rewards` to what it gives the scored tokens. A loss with `event = "closed"` reads `close_log_probs`. `reads_more` tells that both models' log-probs of
    one text are not enough, so that no credit of a single text can be shown, and `compares_completions` that it needs several
    completions of a prompt in a micro-batch. `bridges_markup` tells that a loss on distributions can learn from a chunk of which the two sides
    spell other bytes, as one on log-probs can. `structures` names what the loss reads of a `VocabularyPair`, which is built before
    training. `copies` is how many tensors of the size of a tile's logits are alive at once, so that a tile can be cut
    to keep `tile_tokens`.
    """

    signal: ClassVar[str] = "logprobs"
    policy: ClassVar[str] = "both"
    weighs_by_ratio: ClassVar[bool] = False
    weighs_by_importance: ClassVar[bool] = False
    takes_rewards: ClassVar[bool] = False
    reads_more: ClassVar[bool] = False
    compares_completions: ClassVar[bool] = False
    bridges_markup: ClassVar[bool] = False
    structures: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[int] = 1

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        """
        Args:
            batch (`ScoredChunks`): the micro-batch.
            num_items (`torch.Tensor` or `int`): N, the scored student tokens of the whole optimizer step.

        Returns:
            The loss (scalar, a sum over the micro-batch divided by N) and the method's own metrics.
        """
        raise TypeError(f"{type(self).__name__} does not define __call__")

    @property
    def likeliest(self) -> int | None:
        """How many of the teacher's likeliest tokens a position are enough for a loss with `signal = "logits"`, so that a server
        will do; `None` where it has to be the whole distribution."""
        return None

    @classmethod
    def numbers_held(cls, tokens: int, tile_tokens: int, student_size: int, teacher_size: int) -> int:
        """At most how many numbers a loss on distributions holds beside both models' hidden states of so many `tokens`."""
        return min(tile_tokens, cls.copies * tokens) * (student_size + teacher_size)

    def tile(self, batch: ScoredChunks) -> int:
        """Rows of a tile."""
        return max(1, batch.tile_tokens // self.copies)

    def check_weights(self, *names: str):
        """Raises `ValueError` for a weight that would turn its term round."""
        for name in names:
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{type(self).__name__}'s {name} must not be negative, got {getattr(self, name)}.")

    @classmethod
    def build(cls, name: str, kwargs: dict) -> "Loss":
        """The loss with its knobs set. Raises `ValueError` for an unknown key, listing the known ones, and for a value of
        another type than the knob's."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ValueError(
                f"{name!r} has no setting {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}."
            )
        for field in fields(cls):
            value = kwargs.get(field.name, field.default)
            of_type = isinstance(value, field.type) or (type(value) is int and isinstance(0.0, field.type))
            if not of_type or (isinstance(value, bool) and field.type is not bool) or value != value:
                wanted = getattr(field.type, "__name__", field.type)
                raise ValueError(f"{name}'s {field.name} must be {wanted}, got {value!r}.")
        return cls(**kwargs)
