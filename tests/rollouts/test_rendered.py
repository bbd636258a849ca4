"""Rows come in whatever shape and format, go to the models that they were rendered for, and are named where they cannot."""

import pytest
from datasets import Dataset, IterableDataset
from toys import prompts, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd.rollouts.prompts import COLUMNS, RENDERED_FOR


def retemplated(tokenizer, old: str, new: str):
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return tokenizer


@pytest.mark.parametrize(
    "others",
    [
        {"processing_class": teacher_tokenizer, "model": teacher_model, "teacher_processing_class": teacher_tokenizer},
        {"processing_class": lambda: retemplated(student_tokenizer(), "assistant", "model")},
        {"teacher_processing_class": lambda: retemplated(teacher_tokenizer(), "<|end|>", "<|end|> ")},
        {"chat_template_kwargs": lambda: {"enable_thinking": False}},
    ],
    ids=["other tokenizer", "other student template", "other teacher template", "other template kwargs"],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_that_was_rendered_for_other_models_is_refused(build, others, streamed):
    rendered = build().train_dataset
    if streamed:
        rendered = rendered.to_iterable_dataset()
    with pytest.raises(ValueError, match="train dataset was rendered for other models .* than these .*rendered from"):
        build(dataset=rendered, **{name: make() for name, make in others.items()})


def test_a_dataset_that_was_rendered_for_the_same_models_is_taken_as_it_is(build, tmp_path):
    rendered = build().train_dataset
    rendered.save_to_disk(tmp_path / "rendered")
    again = build(dataset=Dataset.load_from_disk(tmp_path / "rendered")).train_dataset
    assert again[:] == rendered[:] and set(again.column_names) == {*COLUMNS, RENDERED_FOR}
    tokenizer = student_tokenizer()
    tokenizer(["one", "two three"], padding=True, truncation=True, max_length=2)  # it keeps how it was called
    build(dataset=rendered, processing_class=tokenizer)


def test_a_dataset_that_was_rendered_without_saying_for_whom_is_refused(build):
    rendered = build().train_dataset.remove_columns(RENDERED_FOR)
    with pytest.raises(ValueError, match="rendered for other models .an unknown pair."):
        build(dataset=rendered)


@pytest.mark.parametrize("read_as", ["torch", "numpy", "arrow", "pandas"])
@pytest.mark.parametrize("streamed", [False, True])
def test_rows_are_rendered_alike_whatever_format_they_are_read_in(build, read_as, streamed):
    expected = build().train_dataset
    rows = prompts()
    rows = rows.to_iterable_dataset().with_format(read_as) if streamed else rows.with_format(read_as)
    found = build(dataset=rows).train_dataset
    assert [row["prompt_ids"] for row in found] == [row["prompt_ids"] for row in expected]


PARTS = [{"type": "text", "text": "What is 3 plus 4?"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": [{"role": "user", "content": ["What", "is"]}]},
            "`prompt` holds content that is a list with 'What' in it",
        ),
        (
            {"prompt": [{"role": "user", "content": [*PARTS, {"type": "text"}]}]},
            "`prompt` holds a text part without `text`",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "`prompt` holds a text part without",
        ),
        ({"prompt": "half \ud83d of a face"}, r"`prompt` holds a lone surrogate .U\+D83D at character 5."),
        (
            {"messages": [{"role": "user", "content": "\udc00"}]},
            r"`messages` holds a lone surrogate .U\+DC00 at character 0.",
        ),
        ({"prompt": [{"role": "user", "content": 7}]}, "`prompt` holds content of the type int"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": 3}, ""),
    ],
)
def test_a_row_that_cannot_be_rendered_is_named(build, row, said):
    good = (
        {"prompt": "What is 3?"}
        if isinstance(row.get("prompt"), str)
        else {"prompt": [{"role": "user", "content": "Hi"}]}
    )
    stream = IterableDataset.from_generator(lambda: iter([good, row]))
    trainer = build(dataset=IterableDataset.from_generator(lambda: iter([good])))
    with pytest.raises(ValueError, match=f"Row 1 of the test dataset: .*{said}"):
        list(trainer._prepare_dataset(stream, None, trainer.args, False, None, "test"))
