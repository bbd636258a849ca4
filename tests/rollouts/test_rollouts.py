"""Completions beside the teacher's reading of them, and the tensors made of them, held against a real tiny model."""

import functools
import random
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trl_ctopd import TextAligner, token_bytes
from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.rollouts.pairing import Frame, Prompt, collate, pad_scores, pair


CORPUS = ["the seven hens then saw that there were three", "zwölf Hühner sahen dreißig Häuser", "1 + 12 = 13, 456"] * 9
TEXTS = ["the hens saw three", "zwölf Häuser", "12 + 456 = 468", "x", "then there were seven 🐔 hens"]
PROMPT = Prompt([2, 3, 5], [7, 11])


@functools.cache
def student_tokenizer():
    """Byte-level BPE with two ways to stop."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(["<eos>", "<stop>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@functools.cache
def teacher_tokenizer():
    """Unigram that marks words with `▁`, digits one by one, bytes where it knows no piece."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = sorted({f"▁{word}"[:n] for text in CORPUS for word in text.split() for n in (2, 3, 4)})
    letters = sorted({character for text in CORPUS for character in text if character.isalpha()})
    vocabulary = [("<unk>", 0.0), *((piece, -20.0) for piece in pieces), ("▁", -4.0)]
    vocabulary += [(piece, -5.0) for piece in (*words, *letters, *"0123456789+=,") if piece not in dict(vocabulary)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<end>", "<nl>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


@functools.cache
def aligner():
    return TextAligner(student_tokenizer(), teacher_tokenizer())


EOS, STOP = (student_tokenizer().convert_tokens_to_ids(token) for token in ("<eos>", "<stop>"))
TURN_END = teacher_tokenizer().convert_tokens_to_ids(["<end>", "<nl>"])


def ids_of(text):
    return student_tokenizer().encode(text, add_special_tokens=False)


def paired(completions, prompts=None, **kwargs):
    prompts = [PROMPT] * len(completions) if prompts is None else prompts
    rollouts = pair(prompts, completions, aligner(), turn_ends={EOS: TURN_END, STOP: TURN_END}, **kwargs)
    arrays = ("student_chunks", "student_widths", "teacher_chunks")
    return [replace(rollout, **{name: getattr(rollout, name).tolist() for name in arrays}) for rollout in rollouts]


def one(completion, **kwargs):
    [rollout] = paired([completion], **kwargs)
    return rollout


def test_the_toy_tokenizers_cut_the_texts_differently_on_both_sides():
    sizes = set()
    for rollout in paired([ids_of(text) for text in TEXTS]):
        ours, theirs = rollout.student_chunks, rollout.teacher_chunks
        sizes |= {(ours.count(chunk), theirs.count(chunk)) for chunk in range(rollout.num_chunks)}
    assert (1, 1) in sizes
    assert any(m > 1 and k > 1 for m, k in sizes) and any(m < k for m, k in sizes) and any(m > k for m, k in sizes)


# --- pair


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("end", [[], [EOS], [STOP]])
def test_every_chunk_spells_the_same_bytes_on_both_sides_and_widths_count_them(text, end):
    rollout = one(ids_of(text) + end)
    spelled, read, widths = defaultdict(bytes), defaultdict(bytes), defaultdict(int)
    for token, chunk, width in zip(rollout.student_ids, rollout.student_chunks, rollout.student_widths, strict=True):
        spelled[chunk] += token_bytes(student_tokenizer())[token]
        widths[chunk] += width
    for token, chunk in zip(rollout.teacher_ids, rollout.teacher_chunks, strict=True):
        read[chunk] += token_bytes(teacher_tokenizer())[token]
    read[0] = read[0].removeprefix(b" ")  # the teacher's own
    assert spelled == read
    assert widths == {chunk: len(data) for chunk, data in spelled.items()}
    assert sorted(spelled) == list(range(rollout.num_chunks))
    assert b"".join(spelled.values()) == text.encode()


@pytest.mark.parametrize("stop", [EOS, STOP])
def test_bridged_the_end_of_the_turn_is_one_last_chunk_with_both_spellings(stop):
    cut, whole = one(ids_of("the hens")), one([*ids_of("the hens"), stop])
    assert (cut.ended, whole.ended) == (False, True)
    assert whole.student_ids == [*cut.student_ids, stop]
    assert whole.student_chunks == [*cut.student_chunks, cut.num_chunks]
    assert whole.student_widths == [*cut.student_widths, 0]
    assert whole.teacher_ids == [*cut.teacher_ids, *TURN_END]
    assert whole.teacher_chunks == [*cut.teacher_chunks, cut.num_chunks, cut.num_chunks]
    assert whole.num_chunks == cut.num_chunks + 1


def test_masked_the_end_of_the_turn_is_scored_by_nobody():
    cut, whole = one(ids_of("the hens")), one([*ids_of("the hens"), EOS], eos_policy="mask")
    assert whole.ended
    assert whole.student_ids == [*cut.student_ids, EOS]
    assert whole.student_chunks == [*cut.student_chunks, -1]
    assert whole.student_widths == [*cut.student_widths, 0]
    assert (whole.teacher_ids, whole.teacher_chunks) == (cut.teacher_ids, cut.teacher_chunks)
    assert whole.num_chunks == cut.num_chunks


@pytest.mark.parametrize("eos_policy", ["bridge", "mask"])
def test_a_completion_cut_off_has_no_end_on_either_side(eos_policy):
    rollout = one(ids_of("the seven he"), eos_policy=eos_policy)
    assert not rollout.ended
    assert len(rollout.student_chunks) == len(rollout.student_ids) and min(rollout.student_chunks) == 0
    assert not set(TURN_END) & set(rollout.teacher_ids)
    assert max(rollout.student_chunks) == max(rollout.teacher_chunks) == rollout.num_chunks - 1


@pytest.mark.parametrize(("is_text", "ids", "others"), [(True, TURN_END[1:], (9,)), (False, TURN_END, ())])
def test_a_plain_text_ends_with_any_stop_of_the_teachers_and_a_turn_as_its_template_writes_it(is_text, ids, others):
    prompt = replace(PROMPT, frame=Frame(is_text=is_text).to_json())
    ends = {EOS: [TURN_END[1], 9]}
    cut, whole = paired([ids_of("the hens"), [*ids_of("the hens"), EOS]], [prompt, prompt], text_ends=ends)
    assert (whole.teacher_ids, whole.other_ends) == ([*cut.teacher_ids, *ids], others)
    assert cut.other_ends == ()
    for own in ({"teacher_context": 3}, {"eos_policy": "mask"}):
        [left] = paired([[*ids_of("the hens"), EOS]], [prompt], text_ends=ends, **own)
        assert left.other_ends == (), own


def test_a_stop_token_that_is_not_the_last_ends_nothing_and_takes_no_part():
    rollout = one([*ids_of("the"), EOS, *ids_of(" hens")])
    assert not rollout.ended
    assert rollout.student_chunks[len(ids_of("the"))] == -1
    assert not set(TURN_END) & set(rollout.teacher_ids)
    assert rollout.alignment.text == "the hens"


def test_an_empty_completion_is_a_row_without_chunks():
    rollout = one([])
    assert not rollout.ended and not rollout.unread
    assert rollout.student_ids == rollout.student_chunks == rollout.student_widths == []
    assert rollout.teacher_ids == rollout.teacher_chunks == []
    assert rollout.num_chunks == 0


def test_a_completion_that_only_ends_is_the_turn_end_alone():
    rollout = one([EOS])
    assert rollout.ended
    assert (rollout.student_ids, rollout.student_chunks, rollout.student_widths) == ([EOS], [0], [0])
    assert (rollout.teacher_ids, rollout.teacher_chunks, rollout.num_chunks) == (TURN_END, [0, 0], 1)
    masked = one([EOS], eos_policy="mask")
    assert (masked.student_chunks, masked.teacher_ids, masked.num_chunks) == ([-1], [], 0)


def test_invalid_utf8_is_masked_and_the_rest_of_the_row_is_not():
    hen = ids_of("🐔")
    rollout = one([*ids_of("the "), hen[0], *ids_of("hens"), EOS])
    assert rollout.student_chunks[len(ids_of("the "))] == -1
    assert rollout.student_chunks[-1] == rollout.num_chunks - 1 > 1
    assert "\N{REPLACEMENT CHARACTER}" in rollout.alignment.text


def test_the_teachers_context_counts_its_prompt_its_text_and_the_turn_end():
    completion = [*ids_of("the hens saw three"), EOS]
    needed = len(PROMPT.teacher_ids) + len(one(completion).teacher_ids)
    assert not one(completion, teacher_context=needed).unread
    assert one(completion, teacher_context=needed) == one(completion)
    assert one(completion, teacher_context=needed - 1).unread
    without_end = needed - len(TURN_END)
    assert not one(completion, teacher_context=without_end, eos_policy="mask").unread


def test_a_row_beyond_the_teachers_context_takes_no_part_and_costs_no_other_row_anything():
    completions = [[*ids_of(text), EOS] for text in ("hens", "then there were seven hens", "x")]
    free = paired(completions)
    lengths = [len(PROMPT.teacher_ids) + len(rollout.teacher_ids) for rollout in free]
    assert lengths[1] > max(lengths[0], lengths[2])
    short, long, other = paired(completions, teacher_context=lengths[1] - 1)
    assert (short, other) == (free[0], free[2])
    assert long.unread and long.ended and long.student_ids == completions[1]
    assert long.student_chunks == [-1] * len(completions[1])
    assert (long.teacher_ids, long.teacher_chunks, long.num_chunks) == ([], [], 0)
    assert long.teacher_prompt_ids == PROMPT.teacher_ids[:1] != PROMPT.teacher_ids  # all of them may be too many


def test_pairing_leaves_the_alignment_and_what_it_was_given_alone():
    turn_end, completion = list(TURN_END), [*ids_of("the hens"), EOS]
    before = list(completion)
    rollouts = [
        pair([PROMPT], [completion], aligner(), turn_ends={EOS: turn_end}, teacher_context=context)[0]
        for context in (None, 1)
    ]
    assert (turn_end, completion) == (TURN_END, before)
    for rollout in rollouts:
        assert rollout.alignment.student_ids == completion[:-1]
        assert len(rollout.alignment.teacher_chunks) == len(rollout.alignment.teacher_ids)
        assert max(rollout.alignment.teacher_chunks) == len(rollout.alignment.chunk_bytes) - 1


def test_prompts_and_completions_of_different_number_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        paired([[EOS], [EOS]], prompts=[PROMPT])


# --- collate, against a real model's plain log-softmax


@functools.cache
def model(side):
    """Any model of that tokenizer's vocabulary, in float64."""
    tokenizer = {"student": student_tokenizer, "teacher": teacher_tokenizer}[side]()
    torch.manual_seed(len(side))
    tiny = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2))
    torch.nn.init.normal_(tiny.lm_head.weight)  # so that no two tokens are about equally likely
    return tiny.double().eval()


def plain_log_probs(side, prompt, completion):
    """Of each completion token, one row, no padding, one position after the other."""
    logits = model(side)(torch.tensor([[*prompt, *completion]])).logits[0]
    return [logits[len(prompt) + n - 1].log_softmax(-1)[token] for n, token in enumerate(completion)]


def rollouts():
    """Rows of all kinds, with prompts of all lengths."""
    rng = random.Random(0)
    completions = [ids_of(text) + end for text, end in zip(TEXTS, [[EOS], [], [STOP], [EOS], []], strict=True)]
    invalid = [*ids_of("the "), ids_of("🐔")[0], *ids_of(" hens"), EOS]
    completions += [[], [EOS], invalid, [*ids_of(" ".join(TEXTS)), EOS]]
    lengths = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in completions]
    prompts = [Prompt(rng.sample(range(300), ours), rng.sample(range(300), theirs)) for ours, theirs in lengths]
    made = paired(completions, prompts, teacher_context=45)
    assert [rollout.unread for rollout in made] == [False] * 8 + [True]
    return made


def scored(batch, made):
    """As the trainer scores a batch: the student in one padded forward pass, the teacher row by row."""
    logits = model("student")(input_ids=batch["input_ids"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    with torch.no_grad():
        scores = [torch.tensor(plain_log_probs("teacher", r.prompt.teacher_ids, r.teacher_ids)) for r in made]
    return ScoredChunks(
        log_probs,
        pad_scores(scores, batch["teacher_chunks"].shape[1]),
        batch["student_chunks"],
        batch["teacher_chunks"],
        batch["student_widths"],
        batch["num_chunks"],
    )


def test_each_chunks_budgets_are_the_plain_log_probs_of_its_own_tokens():
    made = rollouts()
    batch = scored(collate(made, pad_token_id=0), made)
    ours, theirs = batch.student_sum(batch.student_log_probs), batch.teacher_sum(batch.teacher_log_probs)
    widths = batch.student_sum(batch.student_widths)
    for row, rollout in enumerate(made):
        for sums, side, prompt, ids, chunks, tolerance in (
            (ours, "student", rollout.prompt.student_ids, rollout.student_ids, rollout.student_chunks, 1e-10),
            (theirs, "teacher", rollout.prompt.teacher_ids, rollout.teacher_ids, rollout.teacher_chunks, 1e-5),
        ):
            expected = [0.0] * sums.shape[1]
            for chunk, log_prob in zip(chunks, plain_log_probs(side, prompt, ids), strict=True):
                if chunk >= 0:
                    expected[chunk] += log_prob.item()
            assert sums[row].tolist() == pytest.approx(expected, abs=tolerance)
        lengths = [len(data) for data in rollout.alignment.chunk_bytes] if not rollout.unread else []
        assert widths[row].tolist() == lengths + [0] * (widths.shape[1] - len(lengths))


def test_the_models_own_shifted_labels_score_the_same_tokens():
    """As the fused head reads `labels`: position i scores label i + 1, and -100 is not scored."""
    batch = collate(rollouts(), pad_token_id=0)
    shifted = batch["labels"][:, 1:]
    assert torch.equal(shifted >= 0, batch["student_chunks"] >= 0)
    assert torch.equal(shifted[shifted >= 0], batch["input_ids"][:, 1:][shifted >= 0])
    assert (batch["labels"][:, 0] == -100).all()


def test_labels_are_the_completion_ids_that_take_part_and_nothing_of_the_prompt_or_the_padding():
    made = rollouts()
    batch = collate(made, pad_token_id=EOS)  # padding that looks like an end
    for row, rollout in enumerate(made):
        start, end = len(rollout.prompt.student_ids), len(rollout.prompt.student_ids) + len(rollout.student_ids)
        assert batch["prompt_lengths"][row] == start
        assert batch["input_ids"][row, :end].tolist() == [*rollout.prompt.student_ids, *rollout.student_ids]
        assert (batch["input_ids"][row, end:] == EOS).all()
        assert batch["lengths"][row] == end
        kept = [
            token if chunk >= 0 else -100
            for token, chunk in zip(rollout.student_ids, rollout.student_chunks, strict=True)
        ]
        assert batch["labels"][row, start:end].tolist() == kept
        assert (batch["labels"][row, :start] == -100).all() and (batch["labels"][row, end:] == -100).all()


def gradients(batch, made):
    tiny = model("student")
    tiny.zero_grad()
    loss, _ = DPCA(event="open")(scored(batch, made), 50)
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in tiny.parameters()])


@pytest.mark.parametrize("padding", [None, 8, 64])
def test_the_models_gradient_is_the_same_batched_padded_and_one_by_one(padding):
    made = rollouts()
    whole = gradients(collate(made, 0, padding), made)
    alone = sum(gradients(collate([rollout], 0), [rollout]) for rollout in made)
    assert whole.norm() > 0.01
    assert (whole - alone).abs().max() < 1e-10


@pytest.mark.parametrize("multiple", [8, 64])
def test_padding_to_a_multiple_only_adds_what_takes_no_part(multiple):
    free, wide = (collate(rollouts(), 0, multiple_of) for multiple_of in (None, multiple))
    length, scored_length = free["input_ids"].shape[1], free["student_chunks"].shape[1]
    assert wide["input_ids"].shape[1] % multiple == 0
    assert 0 <= wide["input_ids"].shape[1] - length < multiple
    for name, fill in (("input_ids", 0), ("labels", -100)):
        assert torch.equal(wide[name][:, :length], free[name]) and (wide[name][:, length:] == fill).all()
    for name, fill in (("student_chunks", -1), ("student_widths", 0)):
        assert wide[name].shape[1] == wide["input_ids"].shape[1] - 1
        assert torch.equal(wide[name][:, :scored_length], free[name]) and (wide[name][:, scored_length:] == fill).all()
    assert torch.equal(wide["teacher_chunks"], free["teacher_chunks"]) and wide["num_chunks"] == free["num_chunks"]


def test_a_batch_of_nothing_still_has_shapes_to_score():
    made = paired([[], []])
    batch = collate(made, pad_token_id=0)
    assert batch["num_chunks"] == 1
    assert batch["teacher_chunks"].tolist() == [[-1], [-1]]
    assert (batch["labels"] == -100).all() and (batch["student_chunks"] == -1).all()
    assert not gradients(batch, made).any()


def test_scores_are_padded_with_zeros_at_the_end():
    found = pad_scores([torch.tensor([-1.0, -2.0]), torch.tensor([]), torch.tensor([-3.0])], 3)
    assert found.tolist() == [[-1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]
    assert found.dtype == torch.float32
