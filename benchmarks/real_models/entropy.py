"""How sure the models are of their own answers: entropy of the next token, of the student before and after training and of the teacher.

    python -m benchmarks.real_models.entropy [--models FOLDER] [--data mbpp.jsonl] [--adapter demo_real_output/student]

Decisions:
- Each model samples one answer to each of 32 prompts that `make demo-real` holds out, and reads it again: the entropy of its
  next-token distribution at each token of the answer, without the end of the turn.
- Tokens of two tokenizers are not alike. Entropy per byte can be compared: by the chain rule the sum over an answer's tokens is on average
  the entropy of the text.
- Standard errors are over prompts.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from demo_real import problems
from demo_real.answering import answers
from demo_real.measuring import ratio
from demo_real.run import STUDENT, TEACHER, named
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import report
from benchmarks.speed.models import quiet

from . import script


RESULTS = Path(__file__).parents[1] / "results" / "real_models" / "entropy.json"
PROMPTS, TOKENS = 32, 64


@torch.no_grad()
def entropies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[list[dict]], texts: Sequence[str]
) -> list[tuple[float, int, int]]:
    """Of each text, behind its prompt: the sum over its tokens of the next-token distribution's entropy in nats, the tokens, and the
    bytes."""
    found = []
    for conversation, text in zip(asked, texts, strict=True):
        prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        before, own = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        if own:
            p = model(torch.tensor([before + own])).logits[0, len(before) - 1 : -1].softmax(-1)
            found.append((torch.special.entr(p).sum().item(), len(own), len(text.encode())))
    return found


def told(rows: Sequence[tuple[float, int, int]]) -> dict[str, float | int]:
    by_token, by_byte = (ratio([(row[0], row[place]) for row in rows]) for place in (1, 2))
    names = "nats_per_token", "nats_per_token_error", "nats_per_byte", "nats_per_byte_error"
    figures = dict(zip(names, (*by_token, *by_byte), strict=True))
    return {name: round(value, 4) for name, value in figures.items()} | {"tokens": sum(row[1] for row in rows)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script.parser(__doc__, RESULTS)
    parser.add_argument("--adapter", type=Path, help="folder of a trained adapter")
    options = parser.parse_args(arguments)
    quiet()
    asked = [task.messages for task in problems.load_problems(options.data)[:PROMPTS]]
    wanted = {"student": (STUDENT, None), "teacher": (TEACHER, None)}
    if options.adapter:
        wanted["trained"] = STUDENT, options.adapter
    figures = {**report.header(), "prompts": PROMPTS, "max_new_tokens": TOKENS, "models": {}}
    for name, (published, adapter) in wanted.items():
        model, tokenizer = script.loaded(named(published, options.models), adapter)
        texts = [text for text, _, _ in answers(model, tokenizer, asked, TOKENS, samples=1)]
        figures["models"][name] = told(entropies(model, tokenizer, asked, texts))
        print(name, figures["models"][name])
    report.save(options.output, figures)


if __name__ == "__main__":
    main()
