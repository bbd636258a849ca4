"""The dataset, rendered and tokenized once for both models."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from os import PathLike

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, LargeList, List, Value
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset as TorchStream
from torch.utils.data import Sampler

from .. import __version__
from ..config import CrossTokenizerGKDConfig
from ..text.chat import Speaker
from ..text.conversation import read_example
from .blending import weights_of
from .frames import Frame, Prompt, Share, conversation_to_json, shares_of, to_json
from .rewards import row_as_json
from .tools import with_tools


logger = get_logger(__name__)
_stream_logger = logging.getLogger(__name__)

COLUMNS = ["prompt_ids", "teacher_prompt_ids", "reference_ids", "teacher", "frame"]
BLEND = "blend"  # beside them, where there are several teachers: those that read the row together, see `blending`
ROW = "row"  # beside them, where functions of the user's are called with it: the row as JSON
PADDING = "is_padding"  # beside them, in rows of a stream that only fill up its last batch
RENDERED_FOR = "rendered_for"  # beside them: the fingerprint of the row's two sides
_NAMED = 5  # rows that are dropped are named up to this many
_LOOKED_AT = 1000  # rows, for what Arrow has made of integers


def render_dataset(
    dataset: Dataset | IterableDataset,
    args: CrossTokenizerGKDConfig,
    student: Speaker,
    teachers: Mapping[str, Speaker],
    student_context: int | None,
    server_contexts: Mapping[str, int],
    dataset_name: str,
    tools: list[dict] | None = None,
    keep_rows: bool = False,
) -> Dataset | IterableDataset:
    """
    The rows of `dataset`, rendered and tokenized for both models: `COLUMNS`, and for which two. A dataset that has these comes
    back as it is.

    Args:
        student_context: tokens of prompt and completion, `None` for no limit.
        server_contexts: the same of teachers behind servers, by name, as far as they are known.
        dataset_name: for messages; references are read of "train" alone.
        tools: schemas of what is executed when the student calls it, shown to both models.
        keep_rows: keep each row as JSON beside them.

    Prompts that leave no room for a completion are an error, or dropped (`args.overlong_prompts`), which is logged.

    Raises `ValueError` for a dataset that was rendered for other models, one of which no row is left, and what `check_dataset`,
    `render_row` and `check_room` raise.
    """
    check_dataset(dataset, dataset_name)
    if dataset.column_names is not None and set(COLUMNS) <= set(dataset.column_names):
        check_rendered_for(dataset, student, teachers, dataset_name)
        if keep_rows and ROW not in dataset.column_names:
            raise ValueError(
                f"The {dataset_name} dataset was rendered without the columns that reward functions and gates are called with: give the "
                "trainer the dataset that it was rendered from."
            )
        return dataset
    dataset = dataset.with_format(None)  # rows as Python has them, whatever the user reads them as
    longest_prompt = None if student_context is None else student_context - args.max_new_tokens
    drops = args.overlong_prompts == "drop"
    fingerprints = {name: f"{student.fingerprint}-{teacher.fingerprint}" for name, teacher in teachers.items()}
    settings = {
        "longest_prompt": None if drops else longest_prompt,
        "max_new_tokens": None if drops or longest_prompt is None else args.max_new_tokens,
        "needs_reference": args.lmbda < 1 and not args.seq_kd and dataset_name == "train",
        "dataset_name": dataset_name,
        "fingerprints": fingerprints,
        "tools": tools,
        "keep_row": keep_rows,
        "teacher_weights": args.teacher_weights,
        "teacher_writes": args.seq_kd and dataset_name == "train",
    }
    options = {}
    if isinstance(dataset, Dataset):
        _warn_of_whole_floats(dataset, dataset_name)
        if dataset_name == "train":
            warn_of_plain_prompts(dataset, student, teachers)
        options = {
            "num_proc": args.dataset_num_proc,
            "desc": f"Rendering {dataset_name} dataset for both models",
            "new_fingerprint": rendered_fingerprint(dataset, student, teachers, settings),
        }
    with args.main_process_first(local=True, desc="dataset rendering"):
        rendered = dataset.map(
            render_row,
            with_indices=True,
            fn_kwargs={"student": student, "teachers": teachers, **settings},
            remove_columns=dataset.column_names or list(next(iter(dataset))),
            **options,
        )
    if drops:
        rendered = _without_overlong(rendered, longest_prompt, server_contexts, dataset_name)
    if isinstance(rendered, Dataset):
        check_room(rendered, server_contexts, args.max_new_tokens, dataset_name)
    return rendered


def rendered_fingerprint(
    dataset: Dataset, student: Speaker, teachers: Mapping[str, Speaker], settings: Sequence | Mapping
) -> str:
    """What `Dataset.map` keeps the rendered rows of `dataset` under. Its own fingerprint knows this package's functions by their names
    alone, so that rows which another release has rendered would be found again; and it pickles both tokenizers, a second for each."""
    versions = [__version__, version("transformers"), version("tokenizers")]
    sides = [student.cache_key, *((name, teacher.cache_key) for name, teacher in teachers.items())]
    return Hasher.hash((dataset._fingerprint, versions, sides, settings))


def check_dataset(dataset, dataset_name: str):
    """Raises `TypeError` for what is no dataset, and `ValueError` for a dataset without rows."""
    if not isinstance(dataset, Dataset | IterableDataset):
        way = "`Dataset.from_list(rows)` makes one of rows"
        if isinstance(dataset, str | PathLike):
            way = "`datasets.load_dataset` reads one, such as `load_dataset('json', data_files=path, split='train')`"
        elif isinstance(dataset, DatasetDict | IterableDatasetDict):
            way = "choose one of its splits"
        elif isinstance(dataset, Mapping):
            way = "`Dataset.from_dict(columns)` makes one of columns"
        raise TypeError(
            f"The {dataset_name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`: {way}."
        )
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"The {dataset_name} dataset is empty.")


def warn_of_plain_prompts(dataset: Dataset, student: Speaker, teachers: Mapping[str, Speaker]):
    """Warns of prompts that are all text where both models have a chat template, which none goes through. Text in which the first rows have
    the student's markup is rendered already."""
    is_text = getattr(dataset.features.get("prompt"), "dtype", None) in ("string", "large_string")
    if not (is_text and student.template and all(teacher.template for teacher in teachers.values())):
        return
    texts = dataset.select(range(min(len(dataset), _LOOKED_AT)))["prompt"]
    if not any(name in text for text in texts if isinstance(text, str) for name in student.controls):
        logger.warning(
            "All prompts are text, and the models have chat templates: none is used, and the student learns to go on with text as the teacher would. "
            "To train it to answer, give messages: [{'role': 'user', 'content': ...}]."
        )


def check_datasets(train_dataset, eval_dataset):
    """`check_dataset` for what a trainer is given, before TRL meets it. Either may be None, and `eval_dataset` several by name."""
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    for name, dataset in [("train", train_dataset), *evaluated.items()]:
        if dataset is not None:
            check_dataset(dataset, name)


def _warn_of_whole_floats(dataset: Dataset, dataset_name: str):
    """An Arrow column has one type for all values of an argument: beside a fraction in any row, the integers of the others are floats."""
    for column, feature in dataset.features.items():
        if any(isinstance(own, Value) and own.dtype.startswith("float") for own in _below_calls(feature)):
            rows = dataset.select(range(min(len(dataset), _LOOKED_AT)))[column]
            found = next((own for own in _below_calls(list(rows)) if isinstance(own, float) and own.is_integer()), None)
            if found is not None:
                logger.warning(
                    f"Arguments of tool calls in `{column}` of the {dataset_name} dataset are floats, and both models read {found} where "
                    "the rows may have had an integer: datasets keeps one type for an argument. Make the dataset with "
                    "Dataset.from_list(rows, on_mixed_types='use_json'), or give `arguments` as JSON text."
                )


def _below_calls(value, below: bool = False) -> Iterator:
    """What stands below `tool_calls` in a row, or in its features."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _below_calls(item, below or key == "tool_calls")
    elif isinstance(value, list | List | LargeList):
        for item in value if isinstance(value, list) else [value.feature]:
            yield from _below_calls(item, below)
    elif below:
        yield value


def render_row(
    example: Mapping,
    index: int,
    student: Speaker,
    teachers: Mapping[str, Speaker],
    longest_prompt: int | None,
    needs_reference: bool,
    dataset_name: str = "train",
    fingerprints: Mapping[str, str] | None = None,
    tools: list[dict] | None = None,
    keep_row: bool = False,
    teacher_weights: Mapping[str, float] | None = None,
    teacher_writes: bool = False,
    max_new_tokens: int | None = None,
) -> dict[str, list[int] | str]:
    """
    The ids of one row for both models (`COLUMNS`); `reference_ids` are student ids, empty unless `needs_reference`. Among
    several `teachers`, the row names its own, one or more (`blending.weights_of`, with `teacher_weights` for rows that name none); the
    only one is called "". `frame` is what pairing must know
    of how the two templates write the turn, "" where both begin with the answer. `teacher_writes`: the teacher writes the references later.

    Raises:
        ValueError: naming the row, and the model that cannot read it where it is one of them, whatever is wrong: where it has no prompt,
            cannot be rendered, has no reference though one is needed, names none of several teachers, has several with tools, or is longer
            than `longest_prompt` student tokens, which is what `max_new_tokens` leaves of the context.
    """
    reading = ""
    try:
        conversation = read_example(example)
        if tools:
            conversation = with_tools(conversation, tools)
        weights = {"": 1.0} if "" in teachers else weights_of(example, teachers, teacher_weights)
        if tools and len(weights) > 1:
            raise ValueError(f"it has the teachers {' and '.join(weights)}, and with tools a row has one: name one")
        reading = "as the student reads it, "
        opened = student.opened(conversation.for_student)
        prompt_ids, teachers_opened = opened.ids, {}
        for name in weights:
            reading = f"as the teacher{f' {name!r}' if name else ''} reads it, "
            teachers_opened[name] = teachers[name].opened(conversation.for_teacher)
            reading = ""
            blanks = student.blanks(conversation.for_student), teachers[name].blanks(conversation.for_teacher)
            if blanks[0] != blanks[1]:
                raise ValueError(
                    f"its prompt ends in the begun answer {conversation.begun!r}, after which the student's template leaves {blanks[0]!r} "
                    f"and the teacher's {blanks[1]!r}, so that the two would go on from different texts: take the whitespace off its "
                    "end (`str.rstrip`)"
                )
        if needs_reference and conversation.reference is None:
            missing = "no completion and no final assistant message"
            if example.get("completion", ...) is None:
                missing = "its `completion` is None"
            raise ValueError(
                f"{missing}, which `lmbda` < 1 learns from: add one, or set lmbda=1.0, or seq_kd=True to let the teacher write it"
            )
        before, reference_ids = opened.stem if teacher_writes else prompt_ids, []
        if needs_reference:
            reading = "as the student reads it, "
            before, reference_ids = student.reference(conversation.for_student)
    except ValueError as error:
        raise ValueError(f"Row {index} of the {dataset_name} dataset: {reading}{error}.") from error
    except Exception as error:  # of a template or a tokenizer that meets what it was not made for
        said = f"{reading}{type(error).__name__}: {error}"
        raise ValueError(f"Row {index} of the {dataset_name} dataset: {said}.") from error
    if longest_prompt is not None and len(prompt_ids) > longest_prompt:
        context = longest_prompt + max_new_tokens
        lower = ", or lower max_new_tokens" if len(prompt_ids) < context else ""
        raise ValueError(
            f"Row {index} of the {dataset_name} dataset: its prompt has {len(prompt_ids)} student tokens, and a context of {context} (max_length or "
            f'the student\'s own, the shorter) leaves room for {longest_prompt} beside max_new_tokens={max_new_tokens}. Set overlong_prompts="drop" '
            f"to leave such rows out{lower}."
        )
    asked = conversation_to_json(conversation) if tools else ""
    shares = [
        Share(name, weight, own.ids, Frame.of(opened, own, before, asked, teacher_writes).to_json())
        for (name, own), weight in zip(teachers_opened.items(), weights.values(), strict=True)
    ]
    first = shares[0]
    rendered = dict(zip(COLUMNS, (prompt_ids, first.ids, reference_ids, first.teacher, first.frame), strict=True))
    if "" not in teachers:
        rendered[BLEND] = to_json(shares) if len(shares) > 1 else ""
    if keep_row:
        rendered[ROW] = row_as_json(example, conversation.prompt, index, dataset_name)
    return (
        rendered
        if fingerprints is None
        else {**rendered, RENDERED_FOR: " ".join(fingerprints[name] for name in weights)}
    )


def check_rendered_for(
    dataset: Dataset | IterableDataset, student: Speaker, teachers: Mapping[str, Speaker], dataset_name: str
):
    """Raises `ValueError` for rows that were rendered for other tokenizers or templates than these; of a stream, for the first."""
    known = {f"{student.fingerprint}-{teacher.fingerprint}" for teacher in teachers.values()}
    if RENDERED_FOR not in dataset.column_names:
        found = {None}
    elif isinstance(dataset, Dataset):
        found = set(dataset.unique(RENDERED_FOR))
    else:
        found = {next(iter(dataset))[RENDERED_FOR]}
    if other := sorted({own for each in found for own in (each.split() if each else ["an unknown pair"])} - known):
        raise ValueError(
            f"The {dataset_name} dataset was rendered for other models ({other[0]}) than these ({', '.join(sorted(known))}; "
            "tokenizer and template of the student, and of the teacher): its ids are of other vocabularies. Give the trainer the "
            "dataset that it was rendered from."
        )


def check_room(dataset: Dataset, contexts: Mapping[str, int], max_new_tokens: int, dataset_name: str):
    """
    Warns where a completion of a rendered `dataset` may be too long for its teacher's context, `contexts` tokens by name.
    How many of a teacher's tokens a completion has is known once it is written.

    Raises `ValueError` for prompts that leave no room for any.
    """
    for name, (rows, lengths) in _teachers_lengths(dataset, contexts).items():
        context = contexts[name]
        whose = f"the teacher {name!r}" if name else "the teacher"
        if len(full := np.flatnonzero(lengths >= context)):
            raise ValueError(
                f"Row {rows[full[0]]} of the {dataset_name} dataset: its prompt has {lengths[full[0]]} tokens for {whose}, whose "
                f"server takes {context} with the completion ({len(full)} such rows of {len(rows)}). Filter them out, or start "
                "the server with a larger `--max-model-len`."
            )
        if len(rows) and (longest := lengths.max()) + max_new_tokens > context:
            logger.warning(
                f"The longest prompt of the {dataset_name} dataset has {longest} tokens for {whose}, whose server takes "
                f"{context} with the completion: of completions of max_new_tokens={max_new_tokens} student tokens, some may be "
                "too long, and would take no part (alignment/teacher_context_exceeded_fraction counts them). Start the server "
                "with a larger `--max-model-len`, or lower max_new_tokens."
            )


def _teachers_lengths(dataset: Dataset, names: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By teacher of `names`: the rows of a rendered `dataset` that it reads, alone or blended with others, and each one's prompt's
    length in its tokens."""
    names, found = list(names), {}
    if not names:
        return found
    kept = [column for column in ("teacher_prompt_ids", "teacher", BLEND) if column in dataset.column_names]
    columns = dataset.select_columns(kept).with_format("arrow")[:]
    lengths = pc.list_value_length(columns["teacher_prompt_ids"]).to_numpy()
    teachers = columns["teacher"].to_numpy()
    for name in names:
        rows = np.flatnonzero(teachers == name)
        found[name] = [*zip(rows.tolist(), lengths[rows].tolist(), strict=True)]
    for row, text in enumerate(columns[BLEND].to_pylist() if BLEND in kept else []):
        for share in shares_of(text):
            if share.teacher in found and share.teacher != teachers[row]:  # the heaviest is in the columns
                found[share.teacher].append((row, len(share.ids)))
    return {name: tuple(np.array(pairs, dtype=np.int64).reshape(-1, 2).T) for name, pairs in found.items()}


def _without_overlong(
    dataset: Dataset | IterableDataset, longest_prompt: int | None, contexts: Mapping[str, int], dataset_name: str
) -> Dataset | IterableDataset:
    """The rows of a rendered `dataset` whose prompts leave room for a completion, in `longest_prompt` student tokens and in their
    teacher's context. Of a stream, rows are dropped as they come."""
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Roomy(longest_prompt, dict(contexts), dataset_name), with_indices=True)
    long = np.full(len(dataset), False)
    if longest_prompt is not None:
        ours = dataset.select_columns(["prompt_ids"]).with_format("arrow")[:]
        long |= pc.list_value_length(ours["prompt_ids"]).to_numpy() > longest_prompt
    for name, (rows, lengths) in _teachers_lengths(dataset, contexts).items():
        long[rows[lengths >= contexts[name]]] = True
    dropped = np.flatnonzero(long)
    if not len(dropped):
        return dataset
    said = _no_room(longest_prompt, contexts)
    if len(dropped) == len(dataset):
        raise ValueError(
            f"All {len(dataset)} rows of the {dataset_name} dataset have prompts that leave no room for a completion ({said}): lower "
            "max_new_tokens or raise max_length."
        )
    named = ", ".join(map(str, dropped[:_NAMED])) + (", ..." if len(dropped) > _NAMED else "")
    logger.warning(
        f"{len(dropped)} of {len(dataset)} rows of the {dataset_name} dataset are dropped, whose prompts leave no room for a completion "
        f"({said}): row{'s' * (len(dropped) > 1)} {named}."
    )
    return dataset.select(np.flatnonzero(~long))


def _no_room(longest_prompt: int | None, contexts: Mapping[str, int]) -> str:
    """What there is room for, in words."""
    rooms = (
        [] if longest_prompt is None else [f"context and max_new_tokens leave room for {longest_prompt} student tokens"]
    )
    for name, context in contexts.items():
        whose = f"the server of the teacher {name!r}" if name else "the teacher's server"
        rooms.append(f"{whose} takes {context} tokens with the completion")
    return "; ".join(rooms)


class _Roomy:
    """Whether a row of a stream is kept; the first that are not, and then the number of them at every power of ten, are logged."""

    def __init__(self, longest_prompt: int | None, contexts: dict[str, int], dataset_name: str):
        self._longest_prompt, self._contexts, self._dataset_name = longest_prompt, contexts, dataset_name
        self._dropped: set[int] = set()

    def __call__(self, row: Mapping, index: int) -> bool:
        read = [(share.teacher, share.ids) for share in shares_of(row.get(BLEND, ""))]
        read = read or [(row["teacher"], row["teacher_prompt_ids"])]
        long = self._longest_prompt is not None and len(row["prompt_ids"]) > self._longest_prompt
        if not long and all(len(ids) < self._contexts.get(name, math.inf) for name, ids in read):
            return True
        if index not in self._dropped:  # another epoch brings it again
            self._dropped.add(index)
            count = len(self._dropped)
            if count <= _NAMED or set(str(count)[1:]) == {"0"}:
                _stream_logger.warning(  # a data loader's own process may read the stream, which Accelerate does not know
                    f"Row {index} of the {self._dataset_name} dataset is dropped, the {count}. so far: its prompt leaves no room for a "
                    f"completion ({_no_room(self._longest_prompt, self._contexts)})."
                )
        return False


def collate_prompts(rows: list[dict]) -> dict:
    """A batch of rendered rows; `Prompt` objects pass through data loaders and device placement as they are."""
    return {"prompts": [_prompt(row) for row in rows]}


def _prompt(row: Mapping) -> Prompt:
    beside = {"row": row.get(ROW, ""), "blend": row.get(BLEND, ""), "is_padding": row.get(PADDING, False)}
    return Prompt(*(row[column] for column in COLUMNS), **beside)


class WholeBatches(TorchStream):
    """
    The rows of a stream, then rows from its beginning, which are marked, until the last batch has `size` rows.

    Several processes take turns in what this yields. Accelerate would fill up itself, with rows that nobody can tell from others; and it
    would give each process shards of its own, which end at different times.
    """

    def __init__(self, rows: IterableDataset, size: int):
        self._rows, self._size = rows, size

    def set_epoch(self, epoch: int):
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        first, count = [], 0
        for row in self._rows:
            if count < self._size:
                first.append(row)
            count += 1
            yield row
        for index in range(-count % self._size):
            yield {**first[index % len(first)], PADDING: True}


class RepeatedWindows(Sampler[int]):
    """
    Rows, `window` at a time, each window `repeats` times over; shuffled unless `seed` is `None`, in an order that depends
    on it and the epoch alone.
    Rows that fill no window are left for another epoch.
    """

    def __init__(self, rows: int, window: int, repeats: int, seed: int | None):
        assert rows >= window, "one window's worth"
        self._rows, self._window, self._repeats, self._seed = rows, window, repeats, seed
        self._epoch = 0

    def set_epoch(self, epoch: int):
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows // self._window * self._window * self._repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._rows))
        if self._seed is not None:
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            order = torch.randperm(self._rows, generator=generator).tolist()
        for start in range(0, self._rows - self._window + 1, self._window):
            for _ in range(self._repeats):
                yield from order[start : start + self._window]
