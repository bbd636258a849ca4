"""A step's rollouts without a trainer: toy tokenizers, a writer and teachers that are plain functions of what they read."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import student_tokenizer, teacher_tokenizer

from trl_ctopd import CrossTokenizerGKDConfig, TextAligner
from trl_ctopd.rollouts import source as module
from trl_ctopd.rollouts.blending import prompts_of
from trl_ctopd.rollouts.frames import Frame, Reopened, Share, to_json
from trl_ctopd.rollouts.pairing import Prompt, pad_scores, pair
from trl_ctopd.rollouts.source import RolloutSource
from trl_ctopd.text.chat import Speaker
from trl_ctopd.text.turns import Turn, read_turn


WIDTH = 3  # of the teachers' hidden states


class ToyTeachers:
    """Two of one tokenizer. A token's log-prob is minus its id, less 1000 for the second teacher."""

    def __init__(self, names=("one", "two")):
        self.side = Speaker(teacher_tokenizer())
        self.seats = dict.fromkeys(names)
        self.only = SimpleNamespace(
            teacher=SimpleNamespace(model=None),
            tokenizer=self.side.tokenizer,
            side=self.side,
            stop_ids=self.side.stop_ids(),
            context=None,
        )

    def pair(self, prompts, completions):
        student = Speaker(student_tokenizer())
        aligner = TextAligner(student.tokenizer, self.side.tokenizer)
        return pair(prompts, completions, aligner, turn_ends=dict.fromkeys(student.stop_ids(), self.side.turn_end))

    def alike_stops(self, rollout):
        return {}

    def read(self, rollouts, with_hidden, tables=None, foreseeing=None, wanted=None):
        places = [list(self.seats).index(rollout.prompt.teacher) for rollout in rollouts]
        scores = [
            -torch.tensor(rollout.teacher_ids, dtype=torch.float32) - 1000 * place
            for rollout, place in zip(rollouts, places, strict=True)
        ]
        return SimpleNamespace(
            reference=None,
            close_log_probs=lambda rows, length: None,
            hidden=lambda rows, length: pad_scores([scores[row][:, None].repeat(1, WIDTH) for row in rows], length),
            log_probs=lambda rows, length: pad_scores([scores[row] for row in rows], length),
        )


def written(prompt):
    """What the student writes: the longer, the longer the prompt."""
    return [*student_tokenizer().encode("two" * len(prompt.student_ids)), student_tokenizer().eos_token_id]


@pytest.fixture
def make(tmp_path):
    def build(write=None, reads_distributions=lambda on: False, process_index=0, teachers=None, **settings):
        settings = {
            "max_new_tokens": 40,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "length_grouped": False,
            **settings,
        }
        return RolloutSource(
            CrossTokenizerGKDConfig(str(tmp_path / "run"), **settings),
            SimpleNamespace(device=torch.device("cpu"), process_index=process_index),
            Speaker(student_tokenizer()),
            ToyTeachers() if teachers is None else teachers,
            write or (lambda model, prompts, step: [(written(prompt), None) for prompt in prompts]),
            reads_distributions,
        )

    return build


def window(*lengths):
    """A micro-batch for each list of prompt lengths; the teachers take turns."""
    return [
        [
            Prompt(list(range(10, 10 + n)), [5, 6], list(range(50, 50 + 3 * n)), ("one", "two")[row % 2])
            for row, n in enumerate(own)
        ]
        for own in lengths
    ]


@contextmanager
def untimed(phase):
    yield


def completions(batch):
    rows = zip(batch["input_ids"].tolist(), batch["prompt_lengths"], batch["lengths"], strict=True)
    return [ids[start:end] for ids, start, end in rows]


def prompt_lengths(batches):
    return [batch["prompt_lengths"].tolist() for batch in batches]


def test_micro_batches_keep_the_order_of_their_prompts_and_each_row_has_its_own_teachers_scores(make):
    given = window([2, 5, 3], [4])
    batches, metrics = make().roll_out(None, given, 0, "train", untimed)
    assert prompt_lengths(batches) == [[2, 5, 3], [4]]
    assert [(batch["on_policy"], batch["index"]) for batch in batches] == [(True, 0), (True, 1)]
    for batch, prompts in zip(batches, given, strict=True):
        assert completions(batch) == [written(prompt) for prompt in prompts]
        assert batch["teacher_places"].tolist() == [("one", "two").index(prompt.teacher) for prompt in prompts]
        wanted = -batch["teacher_ids"].float() - 1000 * batch["teacher_places"][:, None]
        assert torch.equal(batch["teacher_log_probs"], wanted.where(batch["teacher_chunks"] >= 0, 0))
        assert not {"teacher_hidden", "sampled_log_probs"} & set(batch)
    assert metrics["off_policy_fraction"] == (0, 2)
    assert metrics["completions/truncated_fraction"] == (0, 4)


def test_in_training_each_prompt_gets_num_generations_completions_and_in_evaluation_one(make):
    source = make(num_generations=3, lmbda=0.0)
    [trained], _ = source.roll_out(None, window([2, 5]), 0, "train", untimed)
    [evaluated], metrics = source.roll_out(None, window([2, 5]), 0, "eval", untimed)
    assert prompt_lengths([trained, evaluated]) == [[2, 2, 2, 5, 5, 5], [2, 5]]
    assert (trained["on_policy"], evaluated["on_policy"]) == (False, True), "evaluation is of the student"
    assert metrics["off_policy_fraction"] == (0, 1)


def test_one_call_writes_for_the_whole_step_and_its_phases_are_timed_apart(make):
    calls, phases = [], []

    def write(model, prompts, step):
        calls.append((model, len(prompts), step, list(phases)))
        return [(written(prompt), None) for prompt in prompts]

    @contextmanager
    def phase(name):
        phases.append(name)
        yield

    make(write).roll_out("student", window([2, 3], [4]), 7, "train", phase)
    assert calls == [("student", 3, 7, ["generation"])]
    assert phases == ["generation", "alignment", "teacher"]


@pytest.mark.parametrize("length_grouped", [False, True])
def test_text_of_the_student_and_other_text_never_share_a_micro_batch(make, length_grouped):
    given = window([2, 7], [3, 6], [4, 5], [9, 1])
    source = make(lmbda=0.5, length_grouped=length_grouped)
    source.lmbda_draws = lambda step, count: [0.1, 0.9, 0.2, 0.8]
    batches, metrics = source.roll_out(None, given, 0, "train", untimed)
    assert [batch["on_policy"] for batch in batches] == [True, False, True, False]
    assert metrics["off_policy_fraction"] == (2, 4)
    by_length = [[7, 5], [9, 6], [4, 2], [3, 1]]  # among those of a kind, the longest first
    assert prompt_lengths(batches) == (by_length if length_grouped else [[2, 7], [3, 6], [4, 5], [9, 1]])
    prompts = {len(prompt.student_ids): prompt for prompts in given for prompt in prompts}
    for batch in batches:
        for length, ids in zip(batch["prompt_lengths"].tolist(), completions(batch), strict=True):
            assert ids == (written(prompts[length]) if batch["on_policy"] else prompts[length].reference_ids)


def test_hidden_states_go_with_the_micro_batches_whose_loss_reads_them(make):
    source = make(lmbda=0.5, reads_distributions=lambda on_policy: not on_policy)
    source.lmbda_draws = lambda step, count: [0.1, 0.9]
    [own, other], _ = source.roll_out(None, window([2, 3], [2, 3]), 0, "train", untimed)
    assert "teacher_hidden" not in own
    assert torch.equal(other["teacher_hidden"], other["teacher_log_probs"][..., None].repeat(1, 1, WIDTH))


def test_log_probs_that_the_writer_tells_stand_at_the_tokens_that_they_are_of(make):
    def write(model, prompts, step):
        return [(written(prompt), [-0.5 - n for n in range(len(written(prompt)))]) for prompt in prompts]

    source = make(write, lmbda=0.5)
    source.lmbda_draws = lambda step, count: [0.1, 0.9]
    [own, other], _ = source.roll_out(None, window([2, 5], [3]), 0, "train", untimed)
    assert "sampled_log_probs" not in other, "nobody drew it"
    for row, start, end in zip(own["sampled_log_probs"], own["prompt_lengths"], own["lengths"], strict=True):
        assert row[start - 1 : end - 1].tolist() == [-0.5 - n for n in range(end - start)]
        assert row[: start - 1].count_nonzero() == row[end - 1 :].count_nonzero() == 0


def test_draws_depend_on_seed_step_and_process_alone(make):
    def drawn(step, **options):
        with make(**options).seeded(step):
            return torch.rand(4).tolist()

    first = drawn(3)
    torch.rand(5)
    assert drawn(3) == first
    others = [drawn(4), drawn(3, seed=43), drawn(3, process_index=1)]
    assert all(first != other for other in others)
    state = torch.get_rng_state()
    drawn(3)
    assert torch.equal(torch.get_rng_state(), state), "and those around it are left alone"


def test_all_processes_agree_who_writes(make):
    draws = [make(process_index=process).lmbda_draws(5, 6) for process in range(2)]
    assert draws[0] == draws[1] and make().lmbda_draws(6, 6) != draws[0] and make(seed=43).lmbda_draws(5, 6) != draws[0]
    assert all(0 <= draw < 1 for draw in draws[0])


def test_a_reference_is_cut_to_max_new_tokens(make):
    [[short, long]] = window([2, 9])
    references, _ = make(max_new_tokens=8).references([short, long])
    assert references == [(short, short.reference_ids), (long, long.reference_ids[:8])]


def test_what_the_teacher_writes_is_spelled_by_the_student_with_its_own_end_where_it_ended(make, monkeypatch):
    source, teachers = make(seq_kd=True, lmbda=0.0, teachers=ToyTeachers([""])), ToyTeachers([""])
    ids = teachers.side.tokenizer.encode("two hundred and what", add_special_tokens=False)
    monkeypatch.setattr(module, "write", lambda *args: [([*ids, teachers.only.stop_ids[0]], None), (ids, None)])
    spelled = student_tokenizer().encode("two hundred and what")
    prompts = window([2, 3])[0]
    (ended, cut), figures = source.references(prompts)
    assert ended == (prompts[0], [*spelled, student_tokenizer().eos_token_id])
    assert cut == (prompts[1], spelled)
    assert figures["seq_kd/left_out_fraction"][0] == 0 < figures["seq_kd/left_out_fraction"][1]


def test_a_reference_goes_on_from_its_own_prompt(make):
    """The generation prompt of the student opens a thought, which neither the dataset nor the teacher writes."""
    frame = Frame(reference=Reopened(1), student=Turn("t", {}).to_json()).to_json()
    [[first, second]] = window([4, 5])
    prompts = [replace(first, frame=frame), second]
    [batch], _ = make(lmbda=0.0).roll_out(None, [prompts], 0, "train", untimed)
    assert batch["prompt_lengths"].tolist() == [3, 5]
    assert completions(batch) == [prompt.reference_ids for prompt in prompts]
    shares = [Share(name, 0.5, [5, 6], frame) for name in ("one", "two")]
    reopened = replace(prompts[0], blend=to_json(shares)).before_reference()
    for read in (reopened, *(own for _, own in prompts_of(reopened).values())):
        assert read.framed.from_stem and read_turn(read.framed.student).tail == ""


def test_a_prompt_that_fills_the_teachers_context_is_refused(make):
    teachers = ToyTeachers([""])
    teachers.only.context = 2
    with pytest.raises(ValueError, match="a prompt of 2 teacher tokens leaves.*context of 2"):
        make(seq_kd=True, lmbda=0.0, teachers=teachers).references(window([3])[0])


def test_what_the_teacher_writes_ends_where_its_context_does(make, monkeypatch):
    teachers, seen = ToyTeachers([""]), []
    teachers.only.context = 8
    monkeypatch.setattr(
        module,
        "write",
        lambda model, ids, config, *own: seen.append(config.max_new_tokens) or [([], None) for _ in ids],
    )
    make(seq_kd=True, lmbda=0.0, teachers=teachers).references(window([3])[0])
    assert seen == [8 - 2]


@pytest.mark.parametrize(("process", "marked"), [(0, [False, False, False]), (1, [False, True, True])])
def test_padding_rows_of_the_last_batch_are_marked_and_not_scored(make, process, marked):
    source = make(process_index=process)
    source._accelerator.gradient_state = SimpleNamespace(
        end_of_dataloader=True, remainder=4, active_dataloader=SimpleNamespace(batch_sampler=None)
    )
    prompts = source.mark_padding_rows(window([2, 3, 4])[0])
    assert [prompt.is_padding for prompt in prompts] == marked
    [batch], metrics = source.roll_out(None, [prompts], 0, "train", untimed)
    assert (batch["labels"] == -100).all(1).tolist() == marked
    assert metrics["completions/truncated_fraction"][1] == marked.count(False)


@pytest.mark.parametrize("draws", [[0.1, 0.9], [0.9, 0.9], [0.1, 0.2]], ids=["both", "given", "own"])
def test_lengths_of_given_text_are_figures_of_their_own(make, draws):
    source = make(lmbda=0.5)
    source.lmbda_draws = lambda step, count: draws
    batches, figures = source.roll_out(None, window([2, 3], [4]), 0, "train", untimed)
    for prefix, on in (("", True), ("given/", False)):
        texts = [text for batch in batches if batch["on_policy"] == on for text in completions(batch)]
        assert figures[f"{prefix}completions/mean_length"] == (sum(map(len, texts)), len(texts))
        assert figures[f"{prefix}completions/truncated_fraction"] == (0 if on else len(texts), len(texts))


def test_only_text_whose_loss_reads_how_chunks_close_can_be_unclosed(make, monkeypatch):
    source = make(lmbda=0.5)
    source.lmbda_draws = lambda step, count: [0.1, 0.9]
    source._continuations = lambda on: {"one": None, "two": None} if on else {}
    monkeypatch.setattr(module, "unclosed", lambda rollout, tables: rollout.num_chunks - 1)
    monkeypatch.setattr(module, "add_going_on", lambda batch, rollouts, tables: None)
    _, metrics = source.roll_out(None, window([2, 3], [4, 5, 6]), 0, "train", untimed)
    assert metrics["closing/unclosed_fraction"] == (2, 2)


def test_padding_rows_count_neither_as_unclosed_nor_for_what_a_teacher_left_out(make, monkeypatch):
    [prompts] = window([2, 3, 4])
    prompts[1:] = [replace(prompt, is_padding=True) for prompt in prompts[1:]]
    source = make()
    source._continuations = lambda on: {"one": None, "two": None}
    monkeypatch.setattr(module, "unclosed", lambda rollout, tables: rollout.num_chunks - 1)
    monkeypatch.setattr(module, "add_going_on", lambda batch, rollouts, tables: None)
    [_], metrics = source.roll_out(None, [prompts], 0, "train", untimed)
    assert metrics["closing/unclosed_fraction"] == (1, 1)

    source = make(seq_kd=True, lmbda=0.0, teachers=ToyTeachers([""]))
    monkeypatch.setattr(module, "write", lambda model, ids, *own: [([], None) for _ in ids])
    source._respell = lambda prompt, ids: SimpleNamespace(prompt=prompt, ids=ids, size=10, left_out=4)
    assert source.references(prompts)[1] == {"seq_kd/left_out_fraction": (4, 10)}
