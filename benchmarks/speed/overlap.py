"""
What it saves that the teacher reads in a thread of its own (`teacher_overlap`): a run with it and one without, in turns.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.overlap              # from the repository root; two cores of a CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.speed.overlap --gpu        # on one GPU, which both share, each on a stream of its own

Writes `overlap.json` (`overlap_gpu.json`) to `benchmarks/results/speed/`. The folder holds `datasets/gsm8k/train.jsonl`, and for `--gpu`
`tokenizers/llama-3.2` and `tokenizers/qwen2.5`.

Decisions:
- Models have random weights and write text of full length, as in `models.py`, in four micro-batches of two prompts. On the CPU torch has
  one thread, so that learning takes one core and the teacher another. How times are taken is in `threads.py`.
- On the CPU the student is `WIDE`, and its teacher the same or some six times as large.
"""

from benchmarks.speed.models import WIDE
from benchmarks.speed.threads import program


LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 12} | {
    "num_key_value_heads": 6,
    "tie_word_embeddings": True,
}
SHAPES = {"a teacher of the student's size": (WIDE, WIDE), "a larger teacher": (WIDE, LARGE)}
SIDES = {"in turn": {"teacher_overlap": False}, "beside": {"teacher_overlap": True}}


if __name__ == "__main__":
    program(__doc__, "overlap", 4, lambda gpu: (2, 4), SHAPES, lambda gpu: SIDES)
