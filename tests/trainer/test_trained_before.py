"""Models that another trainer has trained earlier in the process."""

from functools import partial

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from toys import SGD, fix_rollouts, step_of, trained_before
from trl.trainer.utils import add_fused_lm_head

from trl_ctopd.models.forwards import forget_preparation


# torch's sdpa on a CPU with AMX, told to do without vector instructions (ATEN_CPU_CAPABILITY), raises in bfloat16
student_model = partial(toys.student_model, attn_implementation="eager")
teacher_model = partial(toys.teacher_model, attn_implementation="eager")
ROWS = toys.prompts(4)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def adapted(model):
    torch.manual_seed(4)
    return get_peft_model(model, LORA)


def fused(model):
    add_fused_lm_head(model)
    return model


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "history",
    [
        lambda own, earlier: earlier(own),
        lambda own, earlier: fused(earlier(own)),
        lambda own, earlier: earlier(fused(own)),
        lambda own, earlier: earlier(adapted(own)),
        lambda own, earlier: adapted(earlier(own)),
    ],
    ids=["plain", "beneath TRL's fused head", "above TRL's fused head", "an adapter", "beneath an adapter"],
)
@pytest.mark.parametrize("side", ["model", "teacher"])
def test_a_model_that_was_trained_in_another_precision_computes_in_this_runs(build, tmp_path, side, history, bf16):
    makers = {"model": student_model, "teacher": teacher_model}

    def made(earlier):
        models = {name: make() for name, make in makers.items()}
        return fix_rollouts(build(**{**models, side: history(models[side], earlier)}, bf16=bf16, **SGD))

    fresh, before = made(lambda own: own), made(lambda own: trained_before(own, tmp_path, not bf16))
    torch.testing.assert_close(step_of(before), step_of(fresh), rtol=1e-4, atol=1e-7)
    [new], [old] = fresh.state.log_history[:1], before.state.log_history[:1]
    names = [name for name in new if name.startswith(("loss", "gap/", "student/", "teacher/"))]
    assert [old[name] for name in names] == pytest.approx([new[name] for name in names], rel=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_two_trainers_of_one_student_train_it_each_in_its_own_precision(build, bf16):
    student = student_model()
    first, second = (
        fix_rollouts(build(model=student, teacher=teacher_model(), bf16=own, **SGD)) for own in (not bf16, bf16)
    )
    first.train()
    alone = student_model()
    alone.load_state_dict(student.state_dict())
    alone = fix_rollouts(build(model=alone, teacher=teacher_model(), bf16=bf16, **SGD))
    torch.testing.assert_close(step_of(second), step_of(alone), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainers_that_take_turns_on_one_student_compute_each_in_its_own_precision(build, bf16):
    """Also one that evaluates before it trains, one that goes on after another was built or has evaluated, and one that trains again."""
    student = student_model()

    def made(precision, model):
        return fix_rollouts(build(model=model, teacher=teacher_model(), bf16=precision, eval_dataset=ROWS, **SGD))

    def measured(trainer):
        figures = trainer.evaluate()
        return [figures[name] for name in sorted(figures) if name.startswith(("eval_gap/", "eval_student/"))]

    def alone(precision):
        """Of a trainer that has had no other beside it."""
        model = student_model()
        model.load_state_dict(student.state_dict())
        return made(precision, model)

    first = made(not bf16, student)
    first.train()
    second = made(bf16, student)
    assert measured(first) == pytest.approx(measured(alone(not bf16)), rel=1e-5)
    assert measured(second) == pytest.approx(measured(alone(bf16)), rel=1e-5)
    assert measured(first) == pytest.approx(measured(alone(not bf16)), rel=1e-5)
    second.train()
    expected = step_of(alone(not bf16))
    torch.testing.assert_close(step_of(first), expected, rtol=1e-4, atol=1e-7)
    assert measured(second) == pytest.approx(measured(alone(bf16)), rel=1e-5)


def test_only_the_autocast_is_taken_off(tmp_path):
    """TRL's fused head stays, and what transformers puts around its own forward passes (`return_dict`)."""
    model, plain = fused(student_model()), student_model()
    forget_preparation(trained_before(model, tmp_path, bf16=True))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits, rtol=1e-5, atol=1e-6
        )
        assert model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs is not None
        assert isinstance(model(input_ids=IDS, return_dict=False), tuple)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, eos_token_id=None).shape[1] == IDS.shape[1] + 2
