#!/usr/bin/env bash
# transformers 5.23.0, 4.57.3
#
# transformers 5 writes a model's rope_theta, and what `rope_scaling` held, into `rope_parameters` of config.json, and no longer under the old
# names. transformers 4 does not look there: the model gets the default of its class, and no scaling. No error, no warning.
#
# Seen: of configs with 500000 (Llama, scaled as Llama 3.1's) and 1000000 (Qwen2, Qwen3, Mistral) that 5.23.0 has saved, 4.57.3 reads a rope_theta
# of 10000, and no scaling. Those that 4.57.3 has saved are read rightly by both, and so are those of 5.23.0 with the old names written beside.
# Beside this script, random models of four layers: log-probs that 4.57.3 computes for what 5.23.0 saved are off by up to 5.7 in Llama, 4.3 in Qwen2,
# 5.1 in Qwen3, 2.0 in Mistral, 4.5 in DeepSeek-V3, 3.2 in OLMo 2 and 3.1 in GPT-NeoX. Of Mixtral and LFM2 with 1000000, their classes' default,
# they are the same.
#
# Why it matters: a student that was trained with transformers 5 is another model wherever version 4 reads it (an older engine, an evaluation in
# an environment of its own), and what is lost there looks like a bad distillation. So is a teacher that was merged or converted by version
# 5. Write rope_theta and rope_scaling into config.json beside rope_parameters.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 requests==2.32.5
"$folder/venv/bin/pip" install -qq --no-compile --no-deps --target "$folder/before" transformers==4.57.3 tokenizers==0.22.1 huggingface-hub==0.36.0
cat > "$folder/look.py" <<'PY'
import io
import json
import sys
import warnings
from pathlib import Path

import transformers
from transformers import AutoConfig

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SETTINGS = {
    "Llama": {"rope_theta": 500000.0, "rope_scaling": SCALED, "max_position_embeddings": 131072},
    "Qwen2": {"rope_theta": 1000000.0},
    "Qwen3": {"rope_theta": 1000000.0},
    "Mistral": {"rope_theta": 1000000.0},
}

task, folder = sys.argv[1], Path(sys.argv[2])
version = transformers.__version__
for name, own in SETTINGS.items() if task == "write" else ():
    config = getattr(transformers, f"{name}Config")(**own)
    config.architectures = [f"{name}ForCausalLM"]
    config.save_pretrained(folder / name)
for name, own in SETTINGS.items() if task == "mend" else ():
    file = folder / name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
right = []
for name, own in SETTINGS.items() if task == "read" else ():
    said = io.StringIO()
    transformers.utils.logging.get_logger().handlers[0].setStream(said)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        config = AutoConfig.from_pretrained(folder / name)
    found = config.rope_parameters if version >= "5" else {"rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    theta, factor = found["rope_theta"], found.get("factor")
    print(
        f"seen: {name} with {own['rope_theta']:.0f}, saved by {folder.name}, read by {version}: rope_theta {theta:.0f}, scaled by {factor}, "
        f"warnings {len(warned)} {said.getvalue()!r}"
    )
    if warned or said.getvalue():
        sys.exit("it is said now")
    right.append(theta == own["rope_theta"] and factor == own.get("rope_scaling", {}).get("factor"))
    if version < "5" and folder.name == "5.23.0" and (theta, factor) != (10000, None):
        sys.exit("neither the right one nor the default")
lost = version < "5" and folder.name == "5.23.0"
sys.exit(any(right) if lost else not all(right))
PY
five() { "$folder/venv/bin/python" "$folder/look.py" "$@"; }
four() { PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$folder/look.py" "$@"; }
{
    five write "$folder/5.23.0"
    four write "$folder/4.57.3"
    four read "$folder/5.23.0"
    cp -r "$folder/5.23.0" "$folder/5.23.0 and old names"
    four mend "$folder/5.23.0 and old names"
    four read "$folder/5.23.0 and old names"
    five read "$folder/5.23.0 and old names"
    four read "$folder/4.57.3"
    five read "$folder/5.23.0"
    five read "$folder/4.57.3"
} 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
