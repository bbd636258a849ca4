"""
Runs a script on the CPU under DeepSpeed or FSDP2, to test a setting without a GPU:

    accelerate launch --config_file examples/accelerate_configs/cpu/fsdp2.yaml \
        examples/accelerate_configs/cpu/on_cpu.py examples/distill.py --use_cpu --bf16 false ...

Without it, two things fail: Accelerate turns FSDP on the CPU into plain DDP, and DeepSpeed compiles an all-reduce of its own for
processes on one machine, which takes minutes and a compiler. Here gloo's all-reduce is used.
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState


def take_fsdp_for_what_it_is():
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        process = PartialState(cpu=True)
        if process.distributed_type == DistributedType.MULTI_CPU:
            process.distributed_type = DistributedType.MULTI_GPU  # Accelerate looks for FSDP only under this type
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def main(script: str):
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_fsdp_for_what_it_is()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    del sys.argv[0]
    main(sys.argv[0])
