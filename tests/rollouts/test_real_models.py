"""A reasoning reply of a student with another template, read by a pretrained teacher: what it costs there, and in the teacher's own
rendering."""

import runpy
from pathlib import Path

import needs
import pytest
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
from trl_ctopd.text.chat import Conversation


census = runpy.run_module("benchmarks.templates.census")
FOLDER = Path(trl.__file__).parent / "chat_templates"
REPLIES = [
    (
        "A shop sells pens at 3 for 2 euros. How much are 12 pens?",
        "12 pens are four times 3 pens. Each 3 pens cost 2 euros, so this is 4 * 2 = 8 euros.",
        "Twelve pens cost **8 euros**.",
    ),
    (
        "Write a Python function that reverses a string.",
        "Slicing with a step of -1 goes through the string backwards.\n\nNo loop is needed.",
        "```python\ndef reverse(text):\n    return text[::-1]\n```\nIt returns a new string.",
    ),
    (
        "Is 91 a prime number?",
        "I try small primes: 2, 3 and 5 do not divide 91. 7 * 13 = 91.",
        "No: 91 = 7 · 13.",
    ),
]


def with_template(tokenizer, name):
    source = (FOLDER / f"{name}.jinja").read_text()
    controls = {str(t) for t in census["tokenizer_for"](source).added_tokens_decoder.values() if t.special}
    tokenizer.add_tokens(sorted(controls - set(tokenizer.get_vocab()) - {"<BOS>", "<EOS>"}), special_tokens=True)
    tokenizer.chat_template = source
    return tokenizer


@pytest.mark.parametrize("template", ["gptoss", "glm4moe", "lfm2_2_5"])
def test_a_reasoning_reply_costs_a_teacher_what_it_costs_in_its_own_rendering(template, tmp_path):
    models = needs.models()
    student = AutoModelForCausalLM.from_pretrained(models / "smollm2-135m-instruct")
    tokenizer = with_template(AutoTokenizer.from_pretrained(models / "smollm2-135m-instruct"), template)
    student.resize_token_embeddings(len(tokenizer))
    teacher_tokenizer = with_template(AutoTokenizer.from_pretrained(models / "qwen2.5-coder-0.5b-instruct"), "qwen3")
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "reasoning_content": thought, "content": answer},
            ]
        }
        for question, thought, answer in REPLIES
    ]
    args = CrossTokenizerGKDConfig(
        str(tmp_path / "run"),
        lmbda=0.0,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        length_grouped=False,
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer = CrossTokenizerGKDTrainer(
        model=student,
        teacher_model=str(models / "qwen2.5-coder-0.5b-instruct"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizer,
    )
    [batch] = trainer._roll_out(trainer.model, [trainer.data_collator(list(trainer.train_dataset))["prompts"]], "train")
    side = trainer.panel.only.side
    for row, (found, scores) in enumerate(zip(rows, batch["teacher_log_probs"], strict=True)):
        prompt, reference = found["messages"]
        before, ids = side.reference(Conversation([prompt], reference))
        [own] = trainer.teacher.log_probs([before], [ids])
        size = len((reference["reasoning_content"] + reference["content"]).encode())
        assert (batch["teacher_chunks"][row] >= 0).sum() > 0.9 * len(ids)
        through, alone = -scores.sum().item() / size, -own.sum().item() / size
        print(f"{template}, reply {row}: {through:.4f} nats a byte, in its own rendering {alone:.4f}")
        assert through == pytest.approx(alone, rel=0.01)
