"""Trials of a model at the start, on adapters that have learned nothing yet."""

import needs
import pytest
import torch
from peft import get_peft_model
from test_heads import FAMILIES, OPT, model_of
from toys import student_model, student_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    CpmAntConfig,
    MBartConfig,
    OPTConfig,
    TrOCRConfig,
)

from trl_ctopd.models.loading import disable_dropout
from trl_ctopd.models.trials import check_causal, draws_noise, stirred


QV = {"target_modules": ["q_proj", "v_proj"]}
POLICIES = {
    "LoRA": ("Lora", QV),
    "DoRA and a trained head": ("Lora", {**QV, "use_dora": True, "modules_to_save": ["lm_head"]}),
    "activated LoRA": ("Lora", {**QV, "alora_invocation_tokens": [5, 6]}),
    "IA3": ("IA3", {**QV, "feedforward_modules": []}),
    "trained tokens": ("TrainableTokens", {"token_indices": [1, 2]}),
    "a second network": ("Shadow", {}),
    "virtual tokens": ("PromptTuning", {"num_virtual_tokens": 3}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def adapted(name: str, settings: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return get_peft_model(student_model().to(dtype), needs.adapter(name, **settings)).train()


@DTYPES
def test_an_adapter_that_has_learned_nothing_is_stirred_and_put_back_to_the_bit(dtype):
    model, ids = adapted("Lora", QV, dtype).eval(), torch.arange(8)[None]
    kept, drawn = [own.detach().clone() for own in model.parameters()], torch.get_rng_state()
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="amid"), stirred(model):
            assert not torch.allclose(model(ids).logits, before, rtol=0.1)
            raise RuntimeError("amid")
        assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(own, one) for own, one in zip(model.parameters(), kept, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_whole_model_is_not_stirred():
    model = student_model()
    kept = [own.detach().clone() for own in model.parameters()]
    with stirred(model):
        assert all(torch.equal(own, one) for own, one in zip(model.parameters(), kept, strict=True))


BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 48, "is_decoder": True}
ROUND = {
    "OPT": OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=16, dropout=0.1
    ),
    "mBART's decoder": MBartConfig(**BART, is_encoder_decoder=False, dropout=0.1),
    "TrOCR": TrOCRConfig(**BART, dropout=0.1),
}


def going_round(name: str) -> torch.nn.Module:
    """A model whose own forward pass goes round its backbone."""
    torch.manual_seed(0)
    config = ROUND[name]
    config.vocab_size, config.max_position_embeddings = len(student_tokenizer()), 256
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ROUND)
def test_models_whose_own_forward_pass_goes_round_their_backbone_are_tried_as_well(name):
    model = going_round(name)
    assert draws_noise(model), "dropout"
    disable_dropout(model)
    assert not draws_noise(model)
    assert draws_noise(get_peft_model(going_round(name), needs.adapter("Lora", **QV)))
    check_causal("student", get_peft_model(going_round(name), needs.adapter("Lora", **QV)))
    with pytest.raises(ValueError, match=r"adapter \(LILY\)"):
        check_causal("student", get_peft_model(going_round(name), needs.adapter("Lily", r=4, **QV)))
    ids = torch.arange(4)[None]
    assert model.eval()(ids, use_cache=False).logits.shape == (1, 4, len(student_tokenizer())), "its own pass is back"


@pytest.mark.parametrize("adapted", [False, True])
def test_opt_can_be_a_student(build, adapted):
    trainer = build(going_round("OPT"), peft_config=needs.adapter("Lora", **QV) if adapted else None)
    trainer.train()
    assert trainer.state.global_step == 1


@DTYPES
@pytest.mark.parametrize("name", POLICIES)
def test_adapters_under_which_a_token_depends_on_its_past_alone_pass(name, dtype):
    model = adapted(*POLICIES[name], dtype)
    check_causal("student", model)
    assert model.training and all(own.grad is None for own in model.parameters())


@DTYPES
def test_an_adapter_under_which_a_token_depends_on_its_future_is_refused(dtype):
    message = r"the student's adapter \(LILY\) a token's probability depends on what follows it.*such as LoRA"
    with pytest.raises(ValueError, match=message):
        check_causal("student", adapted("Lily", {"r": 4, **QV}, dtype))


BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
AHEAD = {
    "BERT-Generation": BertGenerationConfig(**BERT, is_decoder=False, bos_token_id=2, eos_token_id=1),
    "CPM-Ant": CpmAntConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=2, dim_head=16, dim_ff=48, num_hidden_layers=2
    ),
}


def looking_ahead(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AHEAD[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as large as trained ones
                parameter.normal_(0, 0.2)
    return model.to(dtype).train()


@DTYPES
@pytest.mark.parametrize("name", AHEAD)
def test_a_model_that_looks_ahead_by_itself_is_refused_by_its_own_name(name, dtype):
    model = looking_ahead(name, dtype)
    with pytest.raises(ValueError, match=f"the teacher's {type(model).__name__} a token's.*choose a causal language"):
        check_causal("teacher", model)
    assert model.training


def test_a_model_that_looks_ahead_is_refused_with_an_adapter_too_which_is_not_to_blame():
    model = get_peft_model(
        looking_ahead("BERT-Generation"), needs.adapter("Lora", target_modules=["query"], init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="the student's BertGenerationDecoder a token's.*is_decoder=True"):
        check_causal("student", model)


def test_a_trainer_refuses_a_student_that_looks_ahead_before_it_looks_at_its_padding(build):
    with pytest.raises(
        ValueError, match="the student's CpmAntForCausalLM a token's probability depends on what follows"
    ):
        build(looking_ahead("CPM-Ant"))


def test_bert_passes_where_its_config_makes_it_causal():
    config = BertGenerationConfig(**BERT, is_decoder=True, bos_token_id=2, eos_token_id=1)
    check_causal("student", AutoModelForCausalLM.from_config(config))


@DTYPES
@pytest.mark.parametrize("family", [*FAMILIES, *OPT])
def test_usual_families_pass_as_they_are(family, dtype):
    model = model_of(family, dtype).train()
    drawn = torch.get_rng_state()
    check_causal("student", model)
    assert model.training and torch.equal(torch.get_rng_state(), drawn)


def test_an_adapter_under_which_a_row_depends_on_the_others_is_refused():
    model = adapted("Lora", QV)
    model.base_model.model.model.layers[0].register_forward_hook(lambda module, args, output: output + output.mean(0))
    with pytest.raises(ValueError, match="or on the other rows of its batch"):
        check_causal("student", model)


@DTYPES
@pytest.mark.parametrize(("name", "noisy"), [("Pvera", True), ("Lora", False)])
def test_noise_is_found_that_is_no_dropout(name, noisy, dtype):
    model = adapted(name, {"r": 8, **QV}, dtype).eval()
    assert draws_noise(model) is noisy
    assert not model.training


def test_a_student_that_draws_noise_is_told_of_and_not_packed(build, caplog):
    assert build(peft_config=needs.adapter("Pvera", r=8, **QV)).rollouts._packer is None
    [message] = [message for message in caplog.messages if "draws noise" in message]
    assert "though disable_dropout=True" in message and "not packed" in message
    caplog.clear()
    assert build(peft_config=needs.adapter("Pvera", r=8, **QV), disable_dropout=False).rollouts._packer is None
    assert "draws noise" not in caplog.text


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_trainer_refuses_an_adapter_that_is_no_policy_on_either_side(build, side):
    model = adapted("Lily", {"r": 4, **QV})
    if side == "student":
        arguments = {"model": model}
    else:
        with torch.no_grad():
            for name, own in model.named_parameters():
                if "lily_B" in name:
                    own.fill_(0.1)
        arguments = {"teacher": model, "teacher_processing_class": build().processing_class}
    with pytest.raises(ValueError, match=rf"the {side}'s adapter \(LILY\)"):
        build(**arguments)
