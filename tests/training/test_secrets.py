"""A run's settings, as they are printed, logged, saved and put on the card, are without what is secret."""

import copy

import torch
from toys import SGD

from trl_ctopd import CrossTokenizerGKDConfig


SECRET = "Sesame0penNow"
SETTINGS = {
    "hub_token": SECRET,
    "model_init_kwargs": {"token": SECRET},
    "chat_template_kwargs": {"api_key": SECRET},
}


def config(tmp_path, **settings) -> CrossTokenizerGKDConfig:
    return CrossTokenizerGKDConfig(str(tmp_path / "run"), use_cpu=True, report_to=[], **{**SETTINGS, **settings})


def test_settings_that_are_printed_or_logged_show_no_secret(tmp_path):
    args = config(tmp_path)
    for shown in (repr(args), str(args), args.to_json_string(), repr(args.to_dict()), repr(args.to_sanitized_dict())):
        assert SECRET not in shown
    assert "learning_rate=1e-06" in repr(args)
    assert args.hub_token == SECRET and args.model_init_kwargs == {"token": SECRET}, "what is used stays"


def test_a_copy_of_the_settings_keeps_what_a_saved_file_does_not(tmp_path):
    args = config(tmp_path)
    torch.save(args, tmp_path / "training_args.bin")
    assert SECRET.encode() not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None and loaded.learning_rate == args.learning_rate
    for other in (copy.copy(args), copy.deepcopy(args)):
        assert other.hub_token == SECRET and other.model_init_kwargs == {"token": SECRET}


def test_no_file_of_a_run_has_the_secrets_of_its_settings(build, tmp_path):
    settings = {"hub_token": SECRET, "chat_template_kwargs": {"api_key": SECRET}}
    trainer = build(save_strategy="steps", save_steps=1, report=True, **settings, **SGD)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"training_args.bin", "README.md", "report.html"} <= {path.name for path in files}
    assert not [path.name for path in files if SECRET.encode() in path.read_bytes()]
