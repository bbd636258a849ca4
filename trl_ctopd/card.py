"""The model card: what the student is, from whom and how it learned, with the figures of the run."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedTokenizerBase

from . import __version__
from .config import CrossTokenizerGKDConfig


PAPERS = {
    "dpca": (
        "Breaking the Tokenizer Barrier: On-Policy Distillation across Model Families",
        "Niu, Yifan and Xiao, Han and Liu, Dongyi and Wang, Zelong and Gong, Dihong and Wang, Yasheng and Li, Jia",
        "2606.09456",
    ),
    "alm": (
        "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching",
        "Minixhofer, Benjamin and Vuli{\\'c}, Ivan and Ponti, Edoardo Maria",
        "2503.20083",
    ),
    "sft": ("Sequence-Level Knowledge Distillation", "Kim, Yoon and Rush, Alexander M.", "1606.07947"),
}
SETTINGS = (
    "credit",
    "advantage_clip",
    "eos_policy",
    "lmbda",
    "temperature",
    "max_new_tokens",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_generations",
    "seed",
)
METRICS = ("loss", "gap/nats_per_byte", "student/nats_per_byte", "teacher/nats_per_byte", "alignment/one_to_one_fraction",
           "alignment/masked_fraction", "completions/truncated_fraction", "entropy")  # fmt: skip
PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "torch")


def model_card(
    *,
    model_name: str,
    hub_model_id: str | None,
    student: str,
    teacher: str,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    args: CrossTokenizerGKDConfig,
    adapter: bool,
    dataset_name: str | None,
    tags: list[str],
    log_history: list[dict],
) -> ModelCard:
    """
    The card of a run. `student` and `teacher` are hub names or folders; a folder is shown by its last part alone and
    never enters the metadata. `log_history` is the trainer state's: the last value logged of each figure is shown.
    """
    own_loss = callable(args.distillation_loss)
    paper = PAPERS["dpca" if own_loss else args.distillation_loss]  # the method whose chunks a loss of one's own uses
    last = {name: value for entry in log_history for name, value in entry.items()}
    names = [name for stem in METRICS for name in (stem, f"eval_{stem}") if name in last]
    return ModelCard.from_template(
        ModelCardData(
            base_model=student if _on_hub(student) else None,
            datasets=dataset_name,
            library_name="peft" if adapter else "transformers",
            pipeline_tag="text-generation",
            model_name=model_name,
            tags=["generated_from_trainer", *dict.fromkeys(tags)],
        ),
        template_path=str(files(__package__).joinpath("model_card.md")),
        model_name=model_name,
        hub_model_id=hub_model_id or model_name,
        student=_link(student),
        teacher=_link(teacher),
        student_tokenizer=_describe(student_tokenizer),
        teacher_tokenizer=_describe(teacher_tokenizer),
        method=_own_name(args.distillation_loss)
        if own_loss
        else f"`{args.distillation_loss}`, [{paper[0]}](https://huggingface.co/papers/{paper[2]})",
        citation=_citation(*paper),
        dataset_name=dataset_name,
        adapter=adapter,
        chat=bool(student_tokenizer.chat_template),
        steps=max((entry.get("step", 0) for entry in log_history), default=0),
        settings={name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None},
        metrics={name: f"{last[name]:.4g}" for name in names},
        versions={"trl_ctopd": __version__, **{name: version(name) for name in PACKAGES}},
    )


def _on_hub(name: str) -> bool:
    return bool(name) and name.count("/") == 1 and not Path(name).exists()


def _link(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _on_hub(name) else f"`{Path(name).name or 'a model made in place'}`"


def _describe(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"


def _own_name(loss) -> str:
    return f"`{getattr(loss, '__name__', type(loss).__name__)}`, a loss of the author's own"


def _citation(title: str, authors: str, arxiv: str) -> str:
    return "\n".join(
        (
            f"@article{{arxiv{arxiv.replace('.', '')},",
            f"  title   = {{{{{title}}}}},",
            f"  author  = {{{authors}}},",
            f"  year    = {{20{arxiv[:2]}}},",
            f"  journal = {{arXiv preprint arXiv:{arxiv}}},",
            "}",
        )
    )
