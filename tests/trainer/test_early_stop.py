"""Rollouts that end early, through the trainer: what is written, what takes part, and what is refused."""

import numpy as np
import pytest
import torch
from toys import prompts

from trl_ctopd.rollouts.early_stop import Growing, _dealt_out


KAT = {"window": 4, "patience": 2, "warmup_steps": 0, "warmup_rollouts": 1, "exempt": 6}
ORDER = {"train_sampling_strategy": "sequential", "max_new_tokens": 24, "early_stop": "kat", "early_stop_kwargs": KAT}
EVERYTHING_IS_LOW, NOTHING_IS_LOW = [1e9] * 4, [0.0] * 4


def fixed(trainer, lowest=EVERYTHING_IS_LOW):
    """The student 'writes' a text that depends on its prompt alone, piece by piece where it is asked to, and tells its true
    log-probs. `calls`: how many tokens each row got in each call."""
    tokenizer, calls = trainer.processing_class, []
    starts = [list(row) for row in trainer.train_dataset["prompt_ids"]]

    def write(model, asked, step, limit=24):
        written = []
        for prompt in asked:
            [start] = [own for own in starts if own == prompt.student_ids[: len(own)]]
            whole = tokenizer.encode(
                f"{len(start)} is the sum of what and two" + " eleven plus one minus three" * (3 + sum(start) % 4)
            )
            whole = [*whole[:23], tokenizer.eos_token_id]
            have = len(prompt.student_ids) - len(start)
            ids = whole[have : have + limit]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([[*prompt.student_ids, *ids]])).logits[0].log_softmax(-1)
            before = len(prompt.student_ids)
            written.append((ids, [scores[before + n - 1, token].item() for n, token in enumerate(ids)]))
        calls.append([len(ids) for ids, _ in written])
        return written

    trainer.rollouts.write, trainer.calls = write, calls
    if lowest:
        trainer.rollouts.early_stop._rule.remember(lowest)
    return trainer


def batches_of(trainer):
    """The micro-batches of the first step."""
    window = [next(iter(trainer.get_train_dataloader()))["prompts"]]
    with trainer.rollouts.seeded(0):
        return trainer.rollouts.roll_out(trainer.model, window, 0, "train", trainer._timers["train"])


def scored(batch):
    return (batch["labels"] != -100).sum(1)


def test_what_follows_a_cut_takes_no_part_and_is_counted(build):
    [whole], _ = batches_of(fixed(build(**ORDER), NOTHING_IS_LOW))
    [cut], figures = batches_of(fixed(build(**ORDER)))
    for row, start in enumerate(cut["prompt_lengths"].tolist()):
        chunks = whole["student_chunks"][row].numpy()
        tokens = np.flatnonzero(chunks >= 0)
        dropped = set(chunks[tokens[KAT["exempt"] :]].tolist())  # every window is low: cut after the exempt tokens
        wanted = np.where(np.isin(chunks, list(dropped)), -1, chunks)
        assert cut["student_chunks"][row].tolist() == wanted.tolist() and (wanted >= 0).sum() <= KAT["exempt"]
        teacher = whole["teacher_chunks"][row].numpy()
        assert cut["teacher_chunks"][row].tolist() == np.where(np.isin(teacher, list(dropped)), -1, teacher).tolist()
        assert cut["labels"][row, start:].tolist()[-1] == -100  # the turn end was behind the cut
    before, after = scored(whole).sum().item(), scored(cut).sum().item()
    assert figures["early_stop/masked_fraction"] == (before - after, before)
    assert figures["early_stop/cut_fraction"] == (4, 4) and figures["early_stop/threshold"] == (1e9, 1)


def test_a_rollout_whose_windows_are_not_low_is_left_whole_and_goes_into_the_memory(build):
    trainer = fixed(build(**ORDER), NOTHING_IS_LOW)
    _, figures = batches_of(trainer)
    assert figures["early_stop/cut_fraction"] == (0, 4) and figures["early_stop/masked_fraction"][0] == 0
    lowest = list(trainer.rollouts.early_stop._rule.lowest)
    assert len(lowest) == 8 and min(lowest[4:]) > 0


def test_pieces_are_written_until_the_rule_ends_a_rollout_and_cut_where_whole_texts_are(build):
    whole = fixed(build(**ORDER))
    pieces = fixed(build(**ORDER, early_stop_tokens=12))
    [wanted], _ = batches_of(whole)
    [found], _ = batches_of(pieces)
    assert whole.calls == [[24] * 4] and pieces.calls == [[12] * 4]
    for row, (ours, theirs) in enumerate(zip(found["student_chunks"], wanted["student_chunks"], strict=True)):
        assert ours.tolist() == theirs[: len(ours)].tolist(), row
    assert (found["labels"] != -100).sum() == (wanted["labels"] != -100).sum()


def test_pieces_that_are_written_on_are_the_whole_text_with_its_log_probs(build):
    [wanted], _ = batches_of(fixed(build(**ORDER), NOTHING_IS_LOW))
    trainer = fixed(build(**ORDER, early_stop_tokens=10), NOTHING_IS_LOW)
    [found], _ = batches_of(trainer)
    assert trainer.calls == [[10] * 4, [10] * 4, [4] * 4]
    assert torch.equal(found["input_ids"], wanted["input_ids"]) and torch.equal(found["labels"], wanted["labels"])
    torch.testing.assert_close(found["sampled_log_probs"], wanted["sampled_log_probs"], rtol=0, atol=1e-4)


def test_the_students_own_generation_stops_early_and_tells_what_it_sampled_with(build):
    rule = {**KAT, "window": 2, "patience": 1, "exempt": 2}
    settings = {**ORDER, "early_stop_kwargs": rule, "early_stop_tokens": 12, "eval_dataset": prompts(4)}
    trainer = build(**settings)
    trainer.rollouts.early_stop._rule.remember([1e9] * 99)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["early_stop/cut_fraction"] > 0 and log["completions/mean_length"] <= 12
    assert log["sampling/log_prob_difference"] < 1e-4
    assert trainer.evaluate()["eval_completions/mean_length"] > 12


def test_random_cuts_keep_the_shares_that_kat_keeps_on_other_rows(build):
    def shares(kind):
        rule = {**KAT, "patience": 1, "quantile": 0.5}
        settings = {**ORDER, "early_stop": kind, "early_stop_kwargs": rule, "per_device_train_batch_size": 8}
        trainer = fixed(build(**settings), None)
        [whole], _ = batches_of(
            trainer
        )  # fills the memory, so that half of these very rows have a window below its median
        [cut], _ = batches_of(trainer)
        return (scored(cut) / scored(whole)).tolist()

    kat, at_random = shares("kat"), shares("random")
    assert kat != at_random and 0 < sum(share == 1 for share in kat) < 8
    assert sum(share == 1 for share in kat) == sum(share == 1 for share in at_random)
    assert sum(kat) == pytest.approx(sum(at_random), abs=8 * 0.12)  # a chunk that is cut through is dropped whole


def test_a_growing_limit_is_what_the_student_may_write(build):
    rule = Growing(start=4, steps=10)
    assert [rule.limit(step, 24) for step in (0, 5, 9, 10, 99)] == [4, 14, 22, 24, 24]
    settings = {**ORDER, "early_stop": "growing", "early_stop_kwargs": {"start": 4, "steps": 2}, "max_steps": 3}
    trainer = build(**settings)
    trainer.train()
    logs = trainer.state.log_history[:3]
    assert [log["early_stop/max_new_tokens"] for log in logs] == [4, 14, 24]
    assert logs[0]["completions/mean_length"] <= 4 < logs[2]["completions/mean_length"]


def test_a_resumed_run_has_the_memory_of_the_one_that_was_killed(build):
    settings = {**ORDER, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = build(**settings)
    whole.train()
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
    memories = [list(trainer.rollouts.early_stop._rule.lowest) for trainer in (whole, resumed)]
    assert len(memories[0]) > 4 and memories[0] == memories[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stop": "never"}, "Unknown early_stop 'never': choose one of kat, random, growing"),
        ({"early_stop": None, "early_stop_kwargs": None, "early_stop_tokens": 8}, "has no effect without early_stop"),
        ({"early_stop_kwargs": {"windows": 3}}, "has no setting 'windows': it takes window, patience"),
        ({"early_stop_kwargs": None}, "reads at least 67 tokens before it cuts .* max_new_tokens=24"),
        ({"early_stop": "random", "early_stop_tokens": 8}, "is for early_stop='kat', and early_stop='random'"),
        ({"early_stop_tokens": 24}, "early_stop_tokens=24 is not below max_new_tokens=24"),
        ({"early_stop": "growing", "early_stop_kwargs": {"start": 30}}, "starts at 30 tokens, and max_new_tokens=24"),
        ({"early_stop_tokens": 8, "use_vllm": True}, "early_stop_tokens=8 needs another max_new_tokens.*only masked"),
        ({"early_stop": "growing", "early_stop_kwargs": {"start": 8}, "use_vllm": True}, "vLLM writes whole"),
        ({"generation_backend": "transformers_continuous"}, "does not tell: choose 'transformers'"),
        ({"top_p": 0.9}, "top_p changes them"),
        ({"generation_kwargs": {"repetition_penalty": 1.2}}, "generation_kwargs changes them"),
        ({"lmbda": 0.0}, "no effect with lmbda=0.0"),
        ({"early_stop_tokens": 8, "teacher_gate": bool}, "would judge texts that have been left unfinished"),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_way_out(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**{**ORDER, **settings})


def test_the_last_chunk_of_a_piece_that_goes_on_decides_nothing(build):
    rule = {**KAT, "window": 1, "patience": 1, "exempt": 11}
    trainer = fixed(build(**{**ORDER, "early_stop_kwargs": rule}, early_stop_tokens=12))
    batches_of(trainer)
    assert trainer.calls == [[12] * 4, [12] * 4]  # the one token that is not exempt is in it


def test_a_dealt_out_share_is_rounded_up():
    found = [_dealt_out({0: 3, 1: None}, {0: 10, 1: 7}) for _ in range(50)]
    assert {(cuts[0], cuts[1]) for cuts in found} == {(3, 7), (10, 3)}


def test_text_that_the_student_did_not_write_is_in_no_figure_of_cuts(build):
    settings = {**ORDER, "length_grouped": False}
    [whole], _ = batches_of(fixed(build(**settings), NOTHING_IS_LOW))
    trainer = fixed(build(**settings))
    masked = trainer.rollouts.early_stop.masked
    trainer.rollouts.early_stop.masked = lambda rollouts, sampled, *given: masked(
        rollouts, [*sampled[:2], None, None], *given
    )
    [cut], figures = batches_of(trainer)
    before, after = scored(whole), scored(cut)
    assert after[2:].tolist() == before[2:].tolist() and figures["early_stop/cut_fraction"] == (2, 2)
    assert figures["early_stop/masked_fraction"] == ((before - after).sum().item(), before[:2].sum().item())
