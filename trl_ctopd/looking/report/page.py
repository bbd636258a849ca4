"""The report's page: what the run has logged, put into `template.html`."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from itertools import pairwise, zip_longest

import jinja2
import torch
from markupsafe import Markup
from transformers import PreTrainedModel
from trl.trainer.utils import get_config_model_id

from ...config import CrossTokenizerGKDConfig
from ...losses import DPCA, Loss, loss_name
from ...models.forwards import base_model
from ...redact import redacted
from ...rollouts.pairing import Rollout
from ...text.altered_text import REASONS
from .. import card, provenance
from ..history import BOOKKEEPING, GAP, GIVEN, figures
from ..samples import Sample, readers
from ..viewer import ScoredRollout, alignment_of, as_compared, stylesheet
from .advice import advice
from .charts import Series, curves


NOT_SHOWN = ("output_dir", "hub_token", "base_model_name_or_path", "auto_mapping", "task_type", "inference_mode")


def plain(value: float) -> str:
    """Three significant digits, without trailing zeros."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace("-", "−")
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def percent(value: float) -> str:
    return f"{plain(100 * value)} %"


@dataclass
class Chart:
    """Metrics drawn together: {name: label}. `everywhere`: also those of the evaluation sets."""

    title: str
    unit: str
    figures: dict[str, str]
    form: Callable[[float], str] = plain
    everywhere: bool = False
    unless_zero: bool = False


MAIN = [
    Chart(
        "Gap to the teacher",
        "nats a byte; at 0 the student writes as the teacher would",
        {GAP: "", GIVEN + GAP: "given text"},
        everywhere=True,
    ),
    Chart("Length of a completion", "student tokens", {"completions/mean_length": ""}, everywhere=True),
    Chart(
        "Truncated and empty",
        "share of completions",
        {"completions/truncated_fraction": "truncated", "completions/empty_fraction": "empty"},
        percent,
    ),
    Chart(
        "Masked and clipped",
        "share of student tokens",
        {
            "alignment/masked_fraction": "masked",
            "advantage/clipped_fraction": "advantage clipped",
            "ratio/clipped_fraction": "ratio clipped",
        },
        percent,
    ),
]
MORE = [
    Chart(
        "What the text costs each model",
        "nats a byte of what the student wrote",
        {"student/nats_per_byte": "student", "teacher/nats_per_byte": "teacher"},
    ),
    Chart("Entropy", "of the student's next token, nats", {"entropy": ""}),
    Chart(
        "One to one",
        "student tokens that are a chunk with one teacher token",
        {"alignment/one_to_one_fraction": ""},
        percent,
    ),
    Chart(
        "Why masked",
        "share of the text's bytes",
        {f"masked_bytes/{reason}": reason for reason in REASONS},
        percent,
        unless_zero=True,
    ),
    Chart(
        "Not scored",
        "chunks with a teacher's log-prob that is not finite; texts past its context, or with nothing to compare",
        {
            "alignment/neutralised_fraction": "chunks",
            "alignment/teacher_context_exceeded_fraction": "past the context",
            "alignment/unscored_fraction": "nothing to compare",
        },
        percent,
        unless_zero=True,
    ),
    Chart("Loss", "what is minimised; it need not fall", {"loss": ""}),
    Chart("Gradient norm", "before clipping", {"grad_norm": ""}),
    Chart("Learning rate", "", {"learning_rate": ""}),
]
PHASES = {
    "generation": "the student writes",
    "compilation": "torch compiles",
    "teacher": "the teacher reads",
    "teacher_wait": "waiting for the teacher's server",
    "rewards": "rewards and gate",
    "student": "the student learns",
    "optimizer": "update",
    "alignment": "alignment",
    "loss": "loss",
}


def page(trainer, first: dict[str, list[dict]], last: dict[str, list[dict]]) -> str:
    """The whole document. `first` and `last`: the first and last samples, by the prefix of their metrics."""
    args, state = provenance.settings_of(trainer), trainer.state
    logged = figures(state.log_history)
    drawn = {name for chart in MAIN + MORE for name in chart.figures}
    evaluated = [
        Chart(name, "", {name: ""}, everywhere=True)
        for name, sets in logged.items()
        if name not in drawn and BOOKKEEPING.fullmatch(name) is None and set(sets) != {"training"}
    ]
    own = [
        Chart(name, "", {name: ""})
        for name, sets in logged.items()
        if name not in drawn and BOOKKEEPING.fullmatch(name) is None and set(sets) == {"training"}
    ]
    return _template().render(
        student=_name(base_model(trainer.model)),
        teacher=", ".join(_teacher_name(*seat) for seat in trainer.panel.seats.items()),
        status=_status(state),
        updated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        warnings=advice(state.log_history, args, trainer.panel.context),
        tiles=_tiles(logged),
        charts=_charts([MAIN[0], *evaluated, *MAIN[1:]], logged),
        more=_charts([*own, *MORE], logged),
        phases=_phases(logged),
        samples=_samples(trainer, first, last),
        figures=_table(logged),
        facts=_facts(trainer, args),
        settings=_settings(args),
        adapter=_adapter(trainer.model),
        versions=provenance.versions(),
        stylesheet=Markup(stylesheet()),
    )


@cache
def _template() -> jinja2.Template:
    source = files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    return jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)


def _name(model: PreTrainedModel) -> str:
    """The hub's or the folder's name, or the class of a model created in memory."""
    return provenance.short_name(get_config_model_id(model.config)) or type(model).__name__


def _teacher_name(key: str, seat) -> str:
    """Several go by their names in the run, too."""
    model = provenance.short_name(seat.name) if seat.remote else _name(seat.teacher.base_model)
    return f"{key} ({model})" if key else model


def _whose(rollout: Rollout) -> str:
    """Which of several teachers has read a sample, and whose tokens are shown."""
    names = readers(rollout)
    if rollout.parts:
        return f"teachers {names}, with the tokens of {rollout.parts[0].rollout.prompt.teacher}"
    return names and f"teacher {names}"


def _status(state) -> str:
    step = f"step {state.global_step:,}"
    return f"{step} of {state.max_steps:,}" if state.max_steps > 0 else step


def _tiles(logged: dict) -> list[dict[str, str]]:
    """The most important metrics: their current and their first values."""
    tiles = []
    gap = (GAP, "gap, nats a byte", plain)
    if "training" not in logged.get(GAP, {}):
        gap = (GIVEN + GAP, "gap on given text, nats a byte", plain)
    for name, title, form in (
        gap,
        ("completions/mean_length", "tokens a completion", plain),
        ("completions/truncated_fraction", "truncated", percent),
        ("alignment/masked_fraction", "masked", percent),
        ("seconds/step", "seconds a step", plain),
    ):
        if points := logged.get(name, {}).get("training"):
            was = f"{form(points[0][1])} at step {points[0][0]:,}" if len(points) > 1 else ""
            tiles.append({"title": title, "now": form(points[-1][1]), "was": was})
    return tiles


def _charts(charts: Iterable[Chart], logged: dict) -> list[dict]:
    """The charts that have something to draw."""
    shown = []
    for chart in charts:
        series = [
            Series(label or where if where == "training" or not label else f"{label}, {where}", points)
            for name, label in chart.figures.items()
            for where, points in logged.get(name, {}).items()
            if where == "training" or chart.everywhere
        ]
        series = [own for own in series if own.points and (any(v for _, v in own.points) or not chart.unless_zero)]
        if series:
            keys = [(own.label, chart.form(own.points[-1][1])) for own in series]
            shown.append({"title": chart.title, "unit": chart.unit, "svg": curves(series, chart.form), "keys": keys})
    return shown


def _phases(logged: dict) -> list[dict]:
    """Mean seconds of each phase of a step, and of the time between phases."""
    steps = sorted({step for step, _ in logged.get("seconds/step", {}).get("training", [])})
    # a log is a mean over the steps since the one before
    covered = {step: step - before for before, step in pairwise([0, *steps])}
    means = {
        name: sum(value * covered.get(step, 0) for step, value in sets["training"]) / sum(covered.values())
        for name, sets in logged.items()
        if name.startswith("seconds/") and "training" in sets and steps
    }
    if not means.get("seconds/step"):
        return []
    total = means.pop("seconds/step")
    parts = {words: means[f"seconds/{phase}"] for phase, words in PHASES.items() if f"seconds/{phase}" in means}
    parts["the rest"] = max(0.0, total - sum(parts.values()))
    return [
        {"name": name, "seconds": plain(value), "share": f"{100 * value / total:.1f}"} for name, value in parts.items()
    ]


def _samples(trainer, first: dict[str, list[dict]], last: dict[str, list[dict]]) -> list[dict]:
    """Samples of evaluations, where the same prompts come again, or else of training."""
    groups = []
    for prefix in [name for name in first if name] or list(first):
        dataset = prefix.removeprefix("eval_").strip("_")
        moments = [first[prefix], last[prefix]] if first[prefix] != last[prefix] else [first[prefix]]
        views = [[(own[0]["step"], *view) for view in _views(trainer, own)] for own in moments]
        groups.append(
            {
                "title": f"of the evaluation{f' on {dataset}' if dataset else ''}" if prefix else "of training",
                "rows": list(zip_longest(*views, fillvalue=None)),
            }
        )
    return groups


def _views(trainer, samples: list[dict]) -> list[tuple[str, Markup]]:
    """Whose tokens each sample shows, "" where there is one teacher, and the sample."""
    loss = trainer.distillation_loss
    shown = isinstance(loss, Loss) and loss.signal == "logprobs" and not loss.reads_more
    # dpca with closed chunks has the expected gradient of reverse_kl, and tells it token by token
    by = loss if shown else DPCA(event="closed")
    samples = [Sample(**sample) for sample in samples]
    shown = []
    rollouts = trainer.panel.align_completions(
        [own.ids for own in samples], [own.teacher for own in samples], [own.frame for own in samples]
    )
    for sample, rollout in zip(samples, rollouts, strict=True):
        # a mixture of teachers has no tokens of its own that could be shown
        alignment = alignment_of(rollout.parts[0].rollout if rollout.parts else rollout)
        if sample.student_chunks is not None:
            alignment = as_compared(alignment, sample.student_chunks)
        if sample.teacher_log_probs and not rollout.parts and all(map(math.isfinite, sample.student_log_probs)):
            log_probs = sample.student_log_probs, sample.teacher_log_probs
            view = ScoredRollout.from_log_probs(alignment, *log_probs, prompt=sample.prompt, loss=by).html_fragment()
        else:
            view = Markup('<p class="prompt">{}</p>{}').format(sample.prompt, Markup(alignment.html_fragment()))
        shown.append((_whose(rollout), Markup(view)))
    return shown


def _table(logged: dict) -> list[list[str]]:
    rows = []
    for name, sets in logged.items():
        for where, points in sets.items():
            values = [value for _, value in points if math.isfinite(value)]
            if values and not re.match("train_|total_flos|epoch", name):
                rows.append([name, where, *map(plain, (values[0], values[-1], min(values), max(values)))])
    return sorted(rows)


def _facts(trainer, args: CrossTokenizerGKDConfig) -> dict[str, str]:
    """Models, dataset, step size, what else the trainer was given, devices."""
    dataset = trainer.train_dataset
    source = provenance.dataset_source(dataset)
    rows = f"{len(dataset):,} prompts" if hasattr(dataset, "__len__") else "streamed"
    given = provenance.given_to(trainer)
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type
    facts = {
        "method": loss_name(card.learned_by(args)[0]),
        "student's tokenizer": provenance.describe(trainer.processing_class),
        "teacher's tokenizer": "; ".join(
            f"{key}: {provenance.describe(seat.tokenizer)}" if key else provenance.describe(seat.tokenizer)
            for key, seat in trainer.panel.seats.items()
        ),
        "dataset": f"{provenance.short_name(source)}, {rows}" if source else rows,
        "a step": provenance.step(args),
        "reward functions": ", ".join(given["reward_funcs"]),
        "gate": given["teacher_gate"] or "",
        "tools": ", ".join(given["tools"]),
        "seed": str(args.seed),
        "device": f"{device}, {args.world_size} process{'es' * (args.world_size > 1)}",
        "command": provenance.command() or "",
    }
    return {name: value for name, value in facts.items() if value}


def _settings(args) -> dict[str, str]:
    """Settings that shape every run, and those that differ from their defaults."""
    values = args.to_dict()
    defaults = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(args)
    }
    names = [name for name in defaults if name in card.SETTINGS or getattr(args, name) != defaults[name]]
    shown = {name: values[name] for name in names if name not in NOT_SHOWN and values.get(name) is not None}
    return {name: provenance.without_folder(str(value)) for name, value in sorted(shown.items())}


def _adapter(model) -> dict[str, str]:
    config = getattr(model, "active_peft_config", None)
    if config is None:
        return {}
    usual = type(config)().to_dict()
    own = {
        name: redacted(value, name)
        for name, value in config.to_dict().items()
        if value != usual[name] and name not in NOT_SHOWN
    }
    return {
        name: ", ".join(sorted(value)) if isinstance(value, set | list) else str(value) for name, value in own.items()
    }
