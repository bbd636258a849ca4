"""A reward for GSM8K, as `examples/configs/rewards.yaml` names it."""

import re


def right_number(prompts, completions, answer, **columns):
    """1 for completions whose last number is the answer's, else 0."""
    said = [re.findall(r"-?\d[\d,]*", completion[0]["content"])[-1:] for completion in completions]
    true = [own.split("####")[-1].strip() for own in answer]
    return [
        float([one.replace(",", "")] == [n.replace(",", "") for n in own]) for own, one in zip(said, true, strict=True)
    ]
