"""CDM, contextual dynamic mapping (arXiv 2502.11104): dynamic time warping between the two token sequences, weighted by
the models' entropies, then at each pair of positions a map between the likeliest tokens, by edit distance.

Decisions. The warping path is held to the synchronized boundaries, so it runs within each chunk; a chunk of one token on
each side is one pair. A student token with several partners is compared with each, at equal parts. An exact partner is
one with the same bytes, and the probability of such a pair is that of all ids that spell it; the distance of two others
is Levenshtein's over their lengths' sum, spaces left out. Tokens of more than 32 bytes have exact partners only. Each
direction of the map (the teacher's likeliest tokens, the student's) is a KL of its own, over the tokens that have a
partner, times the teacher's probability of them: what it thinks of the rest cannot be told, and a sliver renormalised
would be noise. The loss is the mean of both.
Where the published code differs: it warps whole texts with decoded strings, averages the logits of a token's partners,
renormalises the tokens that have a partner and no more, and writes both directions into one list, in which a pair that
both name counts twice.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..text.vocabulary import VocabularyPair
from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles
from .divergences import kl
from .edit_distance import spelling_distances
from .warping import warping_path


@dataclass
class CDM(Loss):
    """
    loss = Σ_{(i, j)} Σ_L q_j(L) · KL(q̄_j ‖ p̄_i | L) / (2 · |J_i| · N), with L the tokens that have a partner among the
    teacher's top_k at j and among the student's top_k at i, q̄ and p̄ renormalised over L, and J_i the teacher tokens on
    student token i's part of the path.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        top_k (`int`, defaults to `100`): tokens that are given a partner, on each side.
        threshold (`float`, defaults to `0.1`): the distance below which two tokens that spell different bytes may be
            partners; 0: exact partners only.
        cross_entropy_weight (`float`, defaults to `0.0`): of −Σ_i log p_i, which the paper adds on its reference texts;
            on text of the student's own it teaches nothing.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 4
    structures: ClassVar[tuple[str, ...]] = ("shared", "spellings")

    top_k: int = 100
    threshold: float = 0.1
    cross_entropy_weight: float = 0.0

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"cdm's top_k must be at least 1, got {self.top_k}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"cdm's threshold must be between 0 and 1, got {self.threshold}.")
        self.check_weights("cross_entropy_weight")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        vocabulary, shared = batch.vocabulary, batch.vocabulary.shared
        tile = self.tile(batch)
        student, teacher = warping_path(batch, tile)
        partners = torch.bincount(student, minlength=batch.student_ids.numel())
        kept = min(self.top_k, vocabulary.student_size, vocabulary.teacher_size)

        def divergence(log_p, log_q):
            students, teachers = log_p.detach().topk(kept).indices, log_q.topk(kept).indices
            student_class, teacher_class = shared.student_class[students], shared.teacher_class[teachers]
            closest_student, closest_teacher = self._closest(
                vocabulary, students, teachers, student_class < 0, teacher_class < 0
            )
            shared_p, shared_q = shared.student_log_probs(log_p), shared.teacher_log_probs(log_q)
            value, mapped = 0, 0
            for student_ids, teacher_ids, outcome in (
                (closest_student, teachers, teacher_class),
                (students, closest_teacher, student_class),
            ):
                exact = outcome >= 0
                p, q = (
                    torch.where(exact, own.gather(1, outcome.clamp(min=0)), full.gather(1, ids.clamp(min=0)))
                    for own, full, ids in ((shared_p, log_p, student_ids), (shared_q, log_q, teacher_ids))
                )
                found = exact | ((student_ids >= 0) & (teacher_ids >= 0))
                mass = (q.exp() * found).sum(1)
                none = ~found.any(1, keepdim=True)  # a row without partners: any finite numbers, and no loss
                q, p = (side.masked_fill(~found & ~none, -torch.inf).log_softmax(1) for side in (q, p))
                value = value + mass * kl(q, p).masked_fill(none[:, 0], 0) / 2
                mapped = mapped + mass / 2
            return value, mapped

        values, mapped = over_tiles(divergence, tile, (batch.student, student), (batch.teacher, teacher))
        compared = (partners > 0).sum()
        metrics = {"cdm/mapped_mass": (mapped.sum(), torch.tensor(len(mapped)))}
        value = (values / partners[student]).sum() + self.cross_entropy_weight * batch.cross_entropy()
        return value / num_items, {"loss/compared_fraction": (compared, batch.scored_tokens), **metrics}

    def _closest(
        self,
        vocabulary: VocabularyPair,
        students: torch.Tensor,
        teachers: torch.Tensor,
        student_free: torch.Tensor,
        teacher_free: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        For each teacher token the closest of the free student tokens, and for each student token the closest of the free
        teacher tokens; -1 where none is closer than the threshold. All tensors (n, k).
        """
        spelled = vocabulary.spellings
        free = student_free[:, :, None] & teacher_free[:, None, :]
        a, b = spelled.student_length[students][:, :, None], spelled.teacher_length[teachers][:, None, :]
        free &= (a >= 0) & (b >= 0) & ((a - b).abs() <= self.threshold * (a + b))  # the least that the distance can be
        row, i, j = free.nonzero(as_tuple=True)
        far = torch.full(free.shape, torch.inf, dtype=torch.float64, device=free.device)
        distance = far.index_put((row, i, j), spelling_distances(vocabulary, students[row, i], teachers[row, j]))
        distance = distance.masked_fill(distance >= self.threshold, torch.inf)
        closest = []
        for dimension, ids in ((1, students), (2, teachers)):
            least, place = distance.min(dimension)
            closest.append(ids.gather(1, place).masked_fill(least.isinf(), -1))
        return closest[0], closest[1]
