"""What half precision costs in nats: the log-probs of text that the student wrote, in bfloat16 against float32, of both models.

    python -m benchmarks.real_models.precision [--models FOLDER] [--data mbpp.jsonl]

Decisions:
- The text is one sampled answer of the student as published, in float32, to each of 24 prompts, read by each model behind its own
  rendering of the prompt.
- A model in bfloat16 has its weights and its sums in bfloat16, as it is loaded with `dtype="bfloat16"`. The log-softmax is in float32
  in both, as in training.
- `bias` is the mean difference, which does not average out over tokens.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from demo_real import problems
from demo_real.answering import answers
from demo_real.run import STUDENT, TEACHER, named
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import report
from benchmarks.speed.models import quiet
from trl_ctopd.teachers.local import LocalTeacher

from . import script


RESULTS = Path(__file__).parents[1] / "results" / "real_models" / "precision.json"
PROMPTS, TOKENS = 24, 64


def log_probs(model: str, dtype: torch.dtype, asked: Sequence[list[dict]], texts: Sequence[str]) -> torch.Tensor:
    """Of all tokens of the texts, one after the other, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = tokenizer.apply_chat_template(list(asked), add_generation_prompt=True, tokenize=False)
    prompts, completions = (tokenizer(list(own), add_special_tokens=False)["input_ids"] for own in (rendered, texts))
    reader = LocalTeacher(AutoModelForCausalLM.from_pretrained(model, dtype=dtype), Accelerator(cpu=True))
    return torch.cat(reader.log_probs(prompts, completions)).double()


def compared(rounded: torch.Tensor, exact: torch.Tensor) -> dict[str, float | int]:
    difference = rounded - exact
    return {
        "tokens": len(exact),
        "mean_absolute": round(difference.abs().mean().item(), 5),
        "bias": round(difference.mean().item(), 5),
        "bias_standard_error": round((difference.std() / len(difference) ** 0.5).item(), 5),
        "quantile_99": round(difference.abs().quantile(0.99).item(), 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script.parser(__doc__, RESULTS)
    options = parser.parse_args(arguments)
    quiet()
    figures = {**report.header(), "prompts": PROMPTS, "max_new_tokens": TOKENS, "models": {}}
    asked = [task.messages for task in problems.load_problems(options.data)[:PROMPTS]]
    drawn = answers(*script.loaded(named(STUDENT, options.models), None), asked, TOKENS, samples=1)
    texts = [text for text, _, _ in drawn]
    for name in (STUDENT, TEACHER):
        own = named(name, options.models)
        read = [log_probs(own, dtype, asked, texts) for dtype in (torch.bfloat16, torch.float32)]
        figures["models"][name] = compared(*read)
        print(name, figures["models"][name])
    report.save(options.output, figures)


if __name__ == "__main__":
    main()
