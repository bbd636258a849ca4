"""What a run has logged, by metric and by dataset."""

import re
from collections.abc import Iterator, Sequence


BOOKKEEPING = re.compile(
    r"epoch|total_flos|num_input_tokens_seen|train_\w+|compute_overhead|seconds/\w+|off_policy_fraction|runtime"
    r"|(samples|steps)_per_second|model_preparation_time|alignment/(student|teacher)_tokens_per_chunk"
)  # metrics that say nothing about how well the student does

GAP = "gap/nats_per_byte"
GIVEN = "given/"  # begins the names of figures of text that the student did not write


def evaluation_prefix(entry: dict) -> str:
    """The prefix of an evaluation's metrics, found by its runtime: `eval_math_` for the dataset "math" of several."""
    return next(_runtimes(entry), "eval_runtime").removesuffix("runtime")


def is_evaluation(entry: dict) -> bool:
    return next(_runtimes(entry), None) is not None


def _runtimes(entry: dict) -> Iterator[str]:
    return (name for name in entry if name.endswith("_runtime") and name != "train_runtime")


def figures(log_history: Sequence[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{metric: {"training" or the name of an evaluation: [(step, value)]}}."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in log_history:
        prefix = evaluation_prefix(entry)
        dataset = prefix.removeprefix("eval_").strip("_")
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                where = (
                    (f"evaluation on {dataset}" if dataset else "evaluation") if name.startswith(prefix) else "training"
                )
                sets = found.setdefault(name.removeprefix(prefix), {})
                sets.setdefault(where, []).append((entry["step"], float(value)))
    return found
