"""Where an activated LoRA begins."""

import random

import torch
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

from trl_ctopd.models.activated import activation, active_tokens


def test_an_adapter_begins_where_peft_has_it_begin_in_a_prompt():
    draw, found = random.Random(0), set()
    for _ in range(300):
        invocation = [draw.randrange(3) for _ in range(draw.randint(1, 3))]
        prompt = [draw.randrange(3) for _ in range(draw.randint(1, 8))]
        config = {"default": LoraConfig(alora_invocation_tokens=invocation)}
        [expected] = calculate_alora_offsets(config, "default", torch.tensor([prompt]))
        assert active_tokens(invocation, prompt) == (expected or 0)
        found.add(expected)
    assert found == {None, *range(1, 9)}


def test_what_follows_a_prompt_is_counted_where_the_adapter_is_on():
    assert activation([5, 6], [[1, 5, 6, 2], [5, 5]], [10, 20]) == {"alora_offsets": [13, 0]}
    assert activation(None, [[1]], [10]) == {}
