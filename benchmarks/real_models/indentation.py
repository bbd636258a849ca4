"""What a student of the pretrained pair is told of indentation: the gaps of three ways to go on after the head of a function, with
chunks closed on the student's side alone and on both, and what the student writes there, also with a trained adapter.

    python -m benchmarks.real_models.indentation [--models FOLDER] [--data mbpp.jsonl] [--adapter FOLDER]

The texts are the beginnings of answers to one of the held-out tasks. A gap is that of `dpca` with closed chunks, in nats.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from demo_real import problems
from demo_real.run import STUDENT, TEACHER, build, named, prompts_of
from peft import PeftModel

from benchmarks import report
from benchmarks.speed.models import quiet
from trl_ctopd.losses import DPCA

from . import script


RESULTS = Path(__file__).parents[1] / "results" / "real_models" / "indentation.json"
HEAD, TASK = "```python\ndef volume_sphere(r):", 2
BODIES = {
    "indented": "\n    return 4 * r",
    "at the margin": "\n# Calculate\nreturn 4 * r",
    "a blank line": "\n\n    return 4 * r",
}


def chunks(trainer, batch, row: int) -> list[dict]:
    """Both sides' tokens of each chunk, and its gap with one side closed and with both."""
    loss, found = DPCA(advantage_clip=None), []
    gaps = [loss._gaps(own)[row].tolist() for own in (replace(batch, teacher_close_log_probs=None), batch)]
    for chunk in range(batch.num_chunks):
        ids = (batch.student_ids, batch.student_chunks), (batch.teacher_ids, batch.teacher_chunks)
        tokenizers = trainer.processing_class, trainer.teacher_processing_class
        texts = [
            [tokenizer.decode([token]) for token in own[row][places[row] == chunk].tolist()]
            for tokenizer, (own, places) in zip(tokenizers, ids, strict=True)
        ]
        if texts[0]:
            one, both = (round(gap[chunk], 2) for gap in gaps)
            found.append({"student": texts[0], "teacher": texts[1], "one side": one, "both sides": both})
    return found


@torch.no_grad()
def likeliest(model, tokenizer, prompt: list[int], count: int = 4) -> dict[str, float]:
    """The next tokens after the head, with their probabilities."""
    ids = [*prompt, *tokenizer.encode(HEAD, add_special_tokens=False)]
    p = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    return {tokenizer.decode([token]): round(p[token].item(), 4) for token in p.topk(count).indices.tolist()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script.parser(__doc__, RESULTS)
    parser.add_argument("--adapter", help="folder of a trained adapter")
    options = parser.parse_args(arguments)
    quiet()
    figures = {**report.header(), "head": HEAD}
    rows = prompts_of([problems.load_problems(options.data)[TASK]] * len(BODIES))
    student, teacher = (named(name, options.models) for name in (STUDENT, TEACHER))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"distillation_loss": "dpca", "max_new_tokens": 64, "length_grouped": False}
        trainer = build(student, teacher, rows, Path(folder), per_device_train_batch_size=len(rows), **settings)
        tokenizer = trainer.processing_class
        texts = [tokenizer.encode(HEAD + body, add_special_tokens=False) for body in BODIES.values()]
        trainer.rollouts.write = lambda model, prompts, step: [([*own, tokenizer.eos_token_id], None) for own in texts]
        prompts = trainer.data_collator(list(trainer.train_dataset))["prompts"]
        [inputs] = trainer._roll_out(trainer.model, [prompts], "train")
        batch, _, _ = trainer._score(trainer.model, trainer._prepare_inputs(inputs))
        figures["chunks"] = {name: chunks(trainer, batch, row) for row, name in enumerate(BODIES)}
        base = trainer.model.get_base_model()
        with trainer.model.disable_adapter():
            figures["student"] = likeliest(base, tokenizer, prompts[0].student_ids)
        if options.adapter:
            own = PeftModel.from_pretrained(trainer.model.unload(), options.adapter)
            figures["trained"] = likeliest(own, tokenizer, prompts[0].student_ids)
    for name, found in figures["chunks"].items():
        print(name, *found, sep="\n  ")
    report.save(options.output, figures)


if __name__ == "__main__":
    main()
