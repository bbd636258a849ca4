"""The same conversation rendered for two models, and where each one's turn ends.

- Only the prompt goes through a template. The completion is appended by the caller, so no reference answer can reach a
  prompt, and what a generation prompt adds (`<think>\\n`) stays on the side that adds it.
- Each side uses its own template, tools and kwargs included, and is then encoded without special tokens: the template
  writes the BOS, if there is one. Plain text gets the tokenizer's own opening (BOS, [CLS]) once, and never its closing.
- A template that refuses `system`, or drops it in silence, gets the system text at the head of the first user turn.
- No template: `User:\\n...` turns joined by blank lines, open at `Assistant:\\n`.
- Markup that only one side knows is named by `unshared_markup`, for the caller to mask. It is never translated.

Left out: context lengths, truncation, images, several reference messages in one row.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import jinja2
from transformers import GenerationConfig, PreTrainedTokenizerBase


THINKING = ("<think>", "</think>")
_PROBE = "qzprobezq"  # a text that no template writes or changes
_USER = {"role": "user", "content": "Hi"}


@dataclass(frozen=True)
class Conversation:
    """One dataset row: what is asked and, off-policy, what to answer.

    `prompt` is text (standard) or messages (conversational). `reference` is text for the former, one assistant message
    for the latter, None for a prompt-only row.
    """

    prompt: str | list[dict]
    reference: str | dict | None = None
    tools: list[dict] | None = None
    chat_template_kwargs: dict = field(default_factory=dict)


def read_example(example: Mapping) -> Conversation:
    """Reads a row of any TRL shape: `prompt`, `prompt` + `completion`, or `messages`; `tools`, `chat_template_kwargs`.

    The last message of `messages` is the reference if the assistant wrote it; a `prompt` that ends in an assistant
    message is continued. None is the same as absent, inside messages and tools too, where Arrow puts it.

    Raises `ValueError` for a row without exactly one of `prompt` and `messages`, and for a malformed one.
    """
    row = {column: value for column, value in example.items() if value is not None}
    if ("prompt" in row) == ("messages" in row):
        raise ValueError(
            f"a row needs either `prompt` or `messages`, and this one has the columns {sorted(row)}: rename or remove "
            "columns of the dataset (`dataset.rename_column`, `dataset.remove_columns`) so that one of the two is left"
        )
    rest = {
        "tools": _tools(row.get("tools")),
        "chat_template_kwargs": _without_none(row.get("chat_template_kwargs", {})),
    }
    if "messages" in row:
        *prompt, last = _messages(row["messages"], "messages")
        if last["role"] != "assistant":
            return Conversation([*prompt, last], **rest)
        if not prompt:
            raise ValueError("`messages` holds an assistant turn only: put the turn that it answers before it")
        return Conversation(prompt, last, **rest)
    if isinstance(row["prompt"], str):
        completion = row.get("completion")
        if completion is not None and not isinstance(completion, str):
            raise ValueError(
                f"`prompt` is text and `completion` is {type(completion).__name__}: make both the same kind"
            )
        return Conversation(row["prompt"], completion, **rest)
    prompt = _messages(row["prompt"], "prompt")
    if "completion" not in row:
        return Conversation(prompt, **rest)
    completion = _messages(row["completion"], "completion")
    if [message["role"] for message in completion] != ["assistant"]:
        raise ValueError(
            "a conversational `completion` is one assistant message, and this one has the roles "
            f"{[message['role'] for message in completion]}: move the earlier turns to `prompt`"
        )
    return Conversation(prompt, completion[0], **rest)


class Speaker:
    """One model's side of every conversation: its tokenizer, its template, and the template's kwargs.

    `chat_template_kwargs` hold for all rows; a row's own override them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}

    def __getstate__(self):
        # what a dataset's cache is keyed by, so without the properties worked out so far
        return {"tokenizer": self.tokenizer, "chat_template_kwargs": self.chat_template_kwargs}

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids after which the completion starts.

        Raises `ValueError`, with the template's own message, where it cannot render the conversation.
        """
        if isinstance(conversation.prompt, str):
            ids = self._encode_plain(conversation.prompt)
        elif self.template:
            ids = self._encode(self._render(conversation.prompt, conversation, open_ended=True))
        else:
            ids = self._encode_plain(_plain_text(conversation.prompt, conversation.tools))
        if not ids:
            raise ValueError(f"the prompt is empty and {self._name} writes no BOS, so there is nothing to go on from")
        return ids

    def reference_ids(self, conversation: Conversation) -> list[int]:
        """The ids that this model would write for the reference, `turn_end` included.

        Text is encoded with control strings as plain text. A message with more than `content` (tool calls, reasoning)
        is what the template writes after the prompt. Raises `ValueError` where that cannot be told apart.
        """
        reference = conversation.reference
        if isinstance(reference, Mapping) and not set(reference) <= {"role", "content"} and self.template:
            return self._rendered_reference(conversation)
        text = _content(reference) if isinstance(reference, Mapping) else reference
        text = text.removesuffix(self.tokenizer.eos_token or "")
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) + self.turn_end

    def stop_ids(self, generation_config: GenerationConfig | None = None) -> list[int]:
        """All ids that end this model's turn: `eos_token_id` of both configurations, and the last of `turn_end`.

        Empty where nothing does.
        """
        ids = getattr(generation_config, "eos_token_id", None)
        ids = list(ids) if isinstance(ids, list | tuple) else [ids]
        ids += [self.tokenizer.eos_token_id, *self._written_turn_end[-1:]]
        return [token for token in dict.fromkeys(ids) if token is not None]

    @cached_property
    def turn_end(self) -> list[int]:
        """What the template writes after an assistant turn, up to and including its first control token.

        The EOS token where no template writes a control token there. Raises `ValueError` without either.
        """
        if self._written_turn_end:
            return self._written_turn_end
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"{self._name} has no EOS token and no chat template that ends an assistant turn with a control "
                "token: set `tokenizer.eos_token`"
            )
        return [self.tokenizer.eos_token_id]

    @cached_property
    def control_ids(self) -> set[int]:
        """Special ids, and the other added tokens that the template writes around plain turns (`<｜User｜>`).

        Thinking tags are content and not among them.
        """
        added = self.tokenizer.added_tokens_decoder
        ids = {token for token, content in added.items() if content.special} | set(self.tokenizer.all_special_ids)
        if self.template:
            turns = [{"role": role, "content": _PROBE} for role in ("system", "user", "assistant", "user")]
            ids |= set(self._encode(self._render(turns, open_ended=True))) & self._plain_added.keys()
        return ids - {token for token, content in self._plain_added.items() if content in THINKING}

    @cached_property
    def markup(self) -> set[str]:
        """Added tokens that are not special and that the template's source names, such as `<tool_call>`."""
        return {content for content in self._plain_added.values() if content in self.template}

    @cached_property
    def prefills_thinking(self) -> bool:
        """Whether the generation prompt ends inside an open `<think>`."""
        return bool(self.template) and re.search(r"<think>\s*$", self._render([_USER], open_ended=True)) is not None

    @cached_property
    def template(self) -> str:
        """The source of the chat template, of all of them where there are several, "" where there is none."""
        template = self.chat_template_kwargs.get("chat_template") or self.tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, Mapping) else template

    @cached_property
    def _name(self) -> str:
        return f"{type(self.tokenizer).__name__} {self.tokenizer.name_or_path!r}"

    @cached_property
    def _plain_added(self) -> dict[int, str]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {token: str(content) for token, content in added if not content.special and not str(content).isspace()}

    @cached_property
    def _written_turn_end(self) -> list[int]:
        if not self.template:
            return []
        answered = [_USER, {"role": "assistant", "content": _PROBE}]
        for turns in (answered, [*answered, _USER]):  # GLM's answers end where the next turn's header begins
            text = self._render(turns)
            if _PROBE not in text:
                raise ValueError(f"the chat template of {self._name} does not write the assistant's content")
            head = text[: text.rindex(_PROBE) + len(_PROBE)]
            after = self._encode(text)[len(self._encode(head)) :]
            for n, token in enumerate(after, start=1):
                if token in self.control_ids:
                    return after[:n]
        return []

    @cached_property
    def _takes_system(self) -> bool:
        try:
            if _PROBE in self._apply([{"role": "system", "content": _PROBE}, _USER], add_generation_prompt=True):
                return True
            reason = "leaves it out"
        except (jinja2.TemplateError, TypeError) as refusal:
            reason = f"refuses it: {refusal}"
        warnings.warn(
            f"system text goes into the first user turn, because the chat template of {self._name} {reason}",
            stacklevel=2,
        )
        return False

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_plain(self, text: str) -> list[int]:
        ids, opened = self._encode(text), self.tokenizer.encode(text)
        if not ids:
            return [token for token in opened[:1] if token == self.tokenizer.bos_token_id]
        return opened[: opened.index(ids[0])] + ids  # adds nothing where the text itself starts with the BOS

    def _render(self, messages: list[dict], conversation: Conversation | None = None, open_ended: bool = False) -> str:
        """`open_ended`: up to where the assistant goes on, in a new turn or in its own last one."""
        if any(message["role"] == "system" for message in messages) and not self._takes_system:
            messages = _fold_system(messages)
        goes_on = messages[-1]["role"] == "assistant"
        kwargs = {"add_generation_prompt": open_ended and not goes_on, "continue_final_message": open_ended and goes_on}
        if conversation:
            kwargs |= {"tools": conversation.tools, **conversation.chat_template_kwargs}
        try:
            return self._apply(messages, **kwargs)
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise ValueError(f"the chat template of {self._name} cannot render the roles {roles}: {error}") from error

    def _apply(self, messages: list[dict], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **{**self.chat_template_kwargs, **kwargs})

    def _rendered_reference(self, conversation: Conversation) -> list[int]:
        prompt = self.prompt_ids(conversation)
        ids = self._encode(self._render([*conversation.prompt, conversation.reference], conversation))
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                f"the chat template of {self._name} writes a reference with {sorted(conversation.reference)} so that "
                "it does not go on from its prompt: give the reference as `content` alone"
            )
        written = ids[len(prompt) :]
        if self.turn_end[-1] in written:
            return written[: written.index(self.turn_end[-1]) + 1]
        return written + self.turn_end


def unshared_markup(student: Speaker, teacher: Speaker) -> list[str]:
    """The strings to mask wherever a completion has them, sorted: markup that one side has no equivalent of.

    - Added tokens (not special) that one side's template names and that the other knows neither as an added token nor
      from its template.
    - Both thinking tags, where exactly one side's generation prompt opens `<think>`.
    """
    texts = set()
    for one, other in ((student, teacher), (teacher, student)):
        known = {str(content) for content in other.tokenizer.added_tokens_decoder.values()}
        texts |= {text for text in one.markup - known if text not in other.template}
    if student.prefills_thinking != teacher.prefills_thinking:
        texts.update(THINKING)
    return sorted(texts)


def _messages(value, column: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{column}` must be a list of at least one message, got {value!r}")
    return [_message(message, column) for message in value]


def _message(value, column: str) -> dict:
    if not isinstance(value, Mapping) or value.get("role") is None:
        raise ValueError(f"`{column}` must hold dicts with `role` and `content`, got {value!r}")
    message = _without_none(value)
    if isinstance(message.get("content"), list):
        parts = message["content"]
        if any(part.get("type") != "text" for part in parts):
            raise ValueError(
                f"`{column}` holds {[part.get('type') for part in parts]} content: only text can be distilled"
            )
        message["content"] = "".join(part["text"] for part in parts)
    if "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"`{column}` holds a {message['role']} message with neither `content` nor `tool_calls`")
    return message


def _tools(value) -> list | None:
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"`tools` is text that is not JSON ({error}): {value!r}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"`tools` must be a list or the JSON text of one, got {value!r}")
    return _without_none(tools) or None  # Llama's template takes [] for tools


def _without_none(value):
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _fold_system(messages: list[dict]) -> list[dict]:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    for n, message in enumerate(turns):
        if message["role"] == "user":
            return [*turns[:n], {**message, "content": f"{system}\n\n{message['content']}"}, *turns[n + 1 :]]
    return [{"role": "user", "content": system}, *turns]


def _plain_text(messages: list[dict], tools: list[dict] | None) -> str:
    turns = [f"Tools:\n{json.dumps(tools, ensure_ascii=False)}"] if tools else []
    turns += [f"{message['role'].capitalize()}:\n{_content(message)}" for message in messages]
    return "\n\n".join(turns if messages[-1]["role"] == "assistant" else [*turns, "Assistant:\n"])


def _content(message: dict) -> str:
    text = [message["content"]] if "content" in message else []
    calls = [json.dumps(message["tool_calls"], ensure_ascii=False)] if message.get("tool_calls") else []
    return "\n".join(text + calls)
