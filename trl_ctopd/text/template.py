"""A tokenizer and its chat template: messages in, text and ids out, and what the template takes, found by trying.

- A template that refuses `system`, or drops it without a word, gets the system text at the head of the first user turn.
- The template writes the BOS, if there is one: what it writes is encoded without special tokens. Plain text gets the
  tokenizer's own opening (BOS, [CLS]) once, and never its closing.
- Calls and thoughts are given to each template in the form that it takes.
- A template that writes the day (`strftime_now`) writes one day, whenever it renders: else a run that is resumed tomorrow has
  other prompts. transformers makes text of a function given as a variable, so the calls in the source are replaced.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from functools import cached_property

import jinja2
from transformers import PreTrainedTokenizerBase

from .aligner import continuations
from .conversation import REASONING, Conversation, check_template_kwargs
from .token_bytes import token_table
from .turns import (
    ANSWER,
    ANSWER_PROBE,
    CALL,
    CALLS,
    KEY_PROBE,
    NAME_PROBE,
    RESULT,
    RESULT_PROBE,
    THOUGHT,
    THOUGHT_PROBE,
    TOOLS,
    USER,
    VALUE_PROBE,
    Unrenderable,
    probe_message,
)


THINKING = ("<think>", "</think>")
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdHIjmMpSUwWxXyY"]
_OF_THE_LAST_CALL = ("truncation", "padding")  # what a tokenizer keeps of how it was called


def _digest(state: object) -> str:
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


class Template:
    """A tokenizer, its chat template, and the template's kwargs.

    `chat_template_kwargs` hold for all rows; a row's own override them, unless `own_kwargs_win`. `day`: the one that a template
    writes which asks for it (today when None).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict | None = None,
        own_kwargs_win: bool = False,
        day: date | None = None,
    ):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        check_template_kwargs(self.chat_template_kwargs)
        self.own_kwargs_win = own_kwargs_win
        self.day = date.today() if day is None else day

    def __getstate__(self):
        # for processes that render rows, without the properties worked out so far
        return {
            "tokenizer": self.tokenizer,
            "chat_template_kwargs": self.chat_template_kwargs,
            "own_kwargs_win": self.own_kwargs_win,
            **({"day": self.day} if self.writes_day else {}),
        }

    def __setstate__(self, state):
        self.__init__(**state)

    @property
    def fingerprint(self) -> str:
        """The same for tokenizers and templates that render every conversation alike."""
        special = dict(self.tokenizer.special_tokens_map)
        if "pad_token" not in self.template:
            special.pop("pad_token", None)
        options = [getattr(self.tokenizer, "split_special_tokens", False), len(self.tokenizer)]
        template = [self.tokenizer.chat_template, self.chat_template_kwargs, self.own_kwargs_win]
        return _digest([self._made_of, special, options, *template])

    @cached_property
    def _made_of(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return _digest([type(self.tokenizer).__name__, self.tokenizer.get_vocab()])
        state = json.loads(backend.to_str())
        return _digest({key: value for key, value in state.items() if key not in _OF_THE_LAST_CALL})

    @property
    def cache_key(self) -> tuple:
        """Another one wherever a conversation is rendered otherwise, on another day too."""
        kind = type(self.tokenizer)
        is_slow = getattr(self.tokenizer, "backend_tokenizer", None) is None  # has options of its own
        day = self.day if self.writes_day else None
        return self.fingerprint, kind.__module__, kind.__qualname__, day, self.tokenizer if is_slow else None

    @cached_property
    def control_ids(self) -> set[int]:
        """Special ids, and the other added tokens that the template writes around plain turns (`<｜User｜>`).

        Thinking tags are content and not among them.
        """
        ids = set(token_table(self.tokenizer).special)
        if self.template:
            for turns in (("system", "user", "assistant", "user"), ("user", "assistant", "user")):
                messages = self._styled([{"role": role, "content": ANSWER_PROBE} for role in turns])
                tools = TOOLS if self.needs_tools else None
                if text := self._tried(messages, tools=tools, add_generation_prompt=True):
                    ids |= set(self.encode(text)) & self._plain_added.keys()
                    break
        return ids - {token for token, content in self._plain_added.items() if content in THINKING}

    @cached_property
    def controls(self) -> set[str]:
        """The strings of `control_ids`."""
        return set(self.tokenizer.convert_ids_to_tokens(sorted(self.control_ids)))

    @cached_property
    def markup(self) -> set[str]:
        """Added tokens that are not special and that the template's source names, such as `<tool_call>`."""
        return {content for content in self._plain_added.values() if content in self.template}

    @cached_property
    def prefills_thinking(self) -> bool:
        """Whether the generation prompt ends inside an open `<think>`."""
        return bool(self.template) and re.search(r"<think>\s*$", self._render([USER], open_ended=True)) is not None

    @cached_property
    def template(self) -> str:
        """The source of the chat template, of all of them where there are several, "" where there is none."""
        template = self.chat_template_kwargs.get("chat_template") or self.tokenizer.chat_template or ""
        return "\n".join(template.values()) if isinstance(template, Mapping) else template

    @property
    def writes_day(self) -> bool:
        """Whether the template asks for the day."""
        return "strftime_now" in self.template

    @cached_property
    def _name(self) -> str:
        return f"{type(self.tokenizer).__name__} {self.tokenizer.name_or_path!r}"

    @cached_property
    def _plain_added(self) -> dict[int, str]:
        added, special = self.tokenizer.added_tokens_decoder, token_table(self.tokenizer).special
        return {
            token: str(content)
            for token, content in added.items()
            if token not in special and not str(content).isspace()
        }

    # What the template takes, found by trying

    @cached_property
    def _takes_system(self) -> bool:
        messages = self._styled([{"role": "system", "content": ANSWER_PROBE}, USER])
        tools = TOOLS if self.needs_tools else None
        try:
            if ANSWER_PROBE in self._apply(messages, tools=tools, add_generation_prompt=True):
                return True
            reason = "leaves it out"
        except (jinja2.TemplateError, TypeError) as refusal:
            reason = f"refuses it: {refusal}"
        warnings.warn(
            f"system text goes into the first user turn, because the chat template of {self._name} {reason}",
            stacklevel=2,
        )
        return False

    @cached_property
    def _takes_parts_alone(self) -> bool:
        """Whether content must be a list of parts (`[{"type": "text", ...}]`): as a plain string it gets lost."""
        parts = [{"role": "user", "content": [{"type": "text", "text": ANSWER_PROBE}]}]
        plain, listed = (self._tried(turn) for turn in ([{"role": "user", "content": ANSWER_PROBE}], parts))
        return ANSWER_PROBE not in plain and ANSWER_PROBE in listed

    @cached_property
    def needs_tools(self) -> bool:
        return not self._tried([USER]) and bool(self._tried([USER], tools=TOOLS))

    @cached_property
    def _call_style(self) -> tuple[bool, dict] | None:
        """How calls must be given: whether arguments are JSON text, and what content goes beside them. None where the template
        leaves calls out either way."""
        for beside in ({"content": ""}, {}):
            for as_text in (False, True):
                message = {"role": "assistant", **beside, "tool_calls": [_call_as(CALL, as_text)]}
                text = self._tried([USER, message], tools=TOOLS) or self._tried([USER, message])
                text = text[text.rfind(USER["content"]) :]
                quoted = f'\\"{KEY_PROBE}'
                if all(probe in text for probe in (NAME_PROBE, KEY_PROBE, VALUE_PROBE)) and quoted not in text:
                    return as_text, beside
        return None

    @cached_property
    def _thought_style(self) -> Callable[[str, str], list | dict] | None:
        """Writes a thought and an answer as content, where the template reads thoughts from there. None where it reads them from a
        key of the message, or leaves them out."""
        tools = TOOLS if self.needs_tools else None
        if THOUGHT_PROBE in self._tried([USER, probe_message((THOUGHT, ANSWER), {})], tools=tools):
            return None
        for style in (_as_parts, _as_blocks):
            message = {"role": "assistant", "content": style(THOUGHT_PROBE, ANSWER_PROBE)}
            text = self._tried([USER, message], tools=tools)
            written = text[text.rfind(USER["content"]) :]
            if THOUGHT_PROBE in written and "type" not in written:  # not the list itself, as text
                return style
        return None

    @cached_property
    def _takes_results(self) -> bool:
        for message in (probe_message((CALLS,), CALL), {"role": "assistant", "content": ANSWER_PROBE}):
            for tools in (TOOLS, None):
                if RESULT_PROBE in self._tried(self._styled([USER, message, RESULT]), tools=tools):
                    return True
        return False

    @cached_property
    def _loses_calls(self) -> bool:
        """Whether the first of a message's calls is written and another left out, as gpt-oss's template does. Llama's refuses more than one."""
        second = {**CALL, "function": {"name": NAME_PROBE, "arguments": {KEY_PROBE: RESULT_PROBE}}}
        message = probe_message((CALLS,), CALL) | {"tool_calls": [CALL, second]}
        written = [self._tried(self._styled([USER, message]), tools=tools) for tools in (TOOLS, None)]
        return any(VALUE_PROBE in text for text in written) and not any(RESULT_PROBE in text for text in written)

    @cached_property
    def _takes_tools(self) -> bool:
        if NAME_PROBE in self._tried([USER], tools=TOOLS):
            return True
        warnings.warn(
            f"the chat template of {self._name} leaves out `tools`: this model is not shown them, and the other one may be",
            stacklevel=2,
        )
        return False

    @cached_property
    def _keeps_thoughts(self) -> bool:
        """Whether an earlier turn's reasoning is written."""
        turns = [USER, probe_message((THOUGHT, ANSWER), {}), USER]
        if THOUGHT_PROBE in self._tried(self._styled(turns)):
            return True
        warnings.warn(
            f"the chat template of {self._name} leaves out the reasoning of earlier turns: this model is not shown it, and the "
            "other one may be",
            stacklevel=2,
        )
        return False

    # Rendering and encoding

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _before_text(self, head: str) -> list[int]:
        """The ids of `head` when a word follows it: some tokenizers split whitespace at the end of a text in another way."""
        [word] = continuations(self.tokenizer, [ANSWER_PROBE])
        word = word or self.encode(ANSWER_PROBE)
        ids = self.encode(head + ANSWER_PROBE)
        return ids[: -len(word)] if ids[-len(word) :] == word else self.encode(head)

    def _encode_after(self, head: str, text: str) -> list[int]:
        """The ids of `text` where it follows `head`."""
        before, ids = self.encode(head), self.encode(head + text)
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text)

    def _encode_plain(self, text: str) -> list[int]:
        ids, opened = self.encode(text), self.tokenizer.encode(text)
        if not ids:
            return [token for token in opened[:1] if token == self.tokenizer.bos_token_id]
        return opened[: opened.index(ids[0])] + ids  # adds nothing where the text itself starts with the BOS

    def _render(self, messages: list[dict], conversation: Conversation | None = None, open_ended: bool = False) -> str:
        """The template's text for `messages`. `open_ended`: up to where the assistant goes on, in a new turn or in its own last
        one. Raises `Unrenderable`."""
        if any(message["role"] == "system" for message in messages) and not self._takes_system:
            messages = _fold_system(messages)
        goes_on = messages[-1]["role"] == "assistant"
        kwargs = {"add_generation_prompt": open_ended and not goes_on, "continue_final_message": open_ended and goes_on}
        if conversation:
            own = self.chat_template_kwargs if self.own_kwargs_win else {}
            kwargs |= {"tools": conversation.tools, **conversation.chat_template_kwargs, **own}
        elif self.needs_tools:
            kwargs["tools"] = TOOLS
        try:
            text = self._apply(self._styled(messages), **kwargs)
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise Unrenderable(f"the chat template of {self._name} cannot render the roles {roles}: {error}") from error
        if kwargs["continue_final_message"] and not (messages[-1].get("content") or "").strip():
            begun = self._render([*messages[:-1], {**messages[-1], "content": ANSWER_PROBE}], conversation, open_ended)
            before = begun.rpartition(ANSWER_PROBE)[0]
            # transformers cuts an empty answer off together with the line break before it (findings/empty_answers_lose_the_line_break.sh)
            return text if text.startswith(before) else before
        return text

    def _styled(self, messages: list[dict]) -> list[dict]:
        """Messages in the form that the template takes: calls by `_call_style`, thoughts by `_thought_style`, content as text or as
        parts."""
        if any(message.get("tool_calls") for message in messages):
            as_text, beside = self._call_style or (False, {"content": ""})
            messages = [
                {
                    **{key: value for key, value in message.items() if key != "content" or value},
                    **({} if message.get("content") else beside),
                    "tool_calls": [_call_as(call, as_text) for call in message["tool_calls"]],
                }
                if message.get("tool_calls")
                else message
                for message in messages
            ]
        if any(_thought_of(message) for message in messages) and (style := self._thought_style):
            messages = [
                {
                    **{key: value for key, value in message.items() if key not in REASONING},
                    "content": style(_thought_of(message), message.get("content") or ""),
                }
                if _thought_of(message) or (style is _as_blocks and message["role"] == "assistant")
                else message
                for message in messages
            ]
        if self._takes_parts_alone:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        return messages

    def _tried(self, messages: list[dict], **kwargs) -> str:
        """The template's rendering of messages as they are, "" where it refuses them."""
        try:
            return self._apply(messages, **kwargs)
        except (jinja2.TemplateError, TypeError):
            return ""

    def _apply(self, messages: list[dict], **kwargs) -> str:
        messages = [_with_thought(message) for message in messages]
        kwargs = {**self.chat_template_kwargs, **kwargs}
        if self.writes_day:
            source = self.tokenizer.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
            kwargs["chat_template"] = _strftime_of(self.day) + source
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)


def _strftime_of(day: date) -> str:
    """A macro in the place of the template's `strftime_now`, however that is called: a variable that is a function would arrive as
    text. It writes nothing by itself."""
    written = "".join(f"|replace('{directive}', '{day.strftime(directive)}')" for directive in _DIRECTIVES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{written} }}}}{{%- endmacro +%}}"


def _with_thought(message: dict) -> dict:
    """The message with its thought under both names that templates read, as transformers gives it from 5.21 on."""
    thought = _thought_of(message)
    return {"thinking": thought, **message, "reasoning_content": thought} if thought else message


def _thought_of(message: dict) -> str:
    return next((message[name] for name in ("reasoning_content", "thinking", "reasoning") if message.get(name)), "")


def _as_parts(thought: str, answer: str) -> list[dict]:
    """As Mistral's templates read thoughts."""
    text = [{"type": "text", "text": answer}] if answer else []
    return [{"type": "thinking", "thinking": thought}, *text]


def _as_blocks(thought: str, answer: str) -> dict:
    """As Apertus's template reads all of an assistant's messages where one has a thought."""
    parts = {"thoughts": thought, "response": answer}
    return {"blocks": [{"type": kind, "text": text} for kind, text in parts.items() if text]}


def _fold_system(messages: list[dict]) -> list[dict]:
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    for n, message in enumerate(turns):
        if message["role"] == "user":
            return [*turns[:n], {**message, "content": f"{system}\n\n{message['content']}"}, *turns[n + 1 :]]
    return [{"role": "user", "content": system}, *turns]


def _call_as(call: Mapping, as_text: bool) -> dict:
    """The call with its arguments as JSON text, or as they are."""
    if not as_text:
        return dict(call)
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
