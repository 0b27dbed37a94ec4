"""The LoRA step of transformers + PEFT, with Liger's kernels where installed, on one GPU; one JSON line.

PYTHON hf_lora.py --model FOLDER [--rows 4] [--length 2048] [--checkpointing]
"""

import argparse
import json
import statistics
import time

import peft
import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--rows", type=int, default=4)
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--checkpointing", action="store_true")
args = parser.parse_args()
name = f"transformers {transformers.__version__} + PEFT {peft.__version__}"
try:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    name += " + Liger"
except ImportError:
    pass

model = transformers.AutoModelForCausalLM.from_pretrained(
    args.model, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cuda"
)
config = peft.LoraConfig(
    r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"
)
model = peft.get_peft_model(model, config)
if args.checkpointing:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
ids = torch.randint(3, model.config.vocab_size, (args.rows, args.length), device="cuda")


def step():
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()


for _ in range(4):
    step()
seconds = []
for _ in range(args.steps):
    clock = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - clock)
gib = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps({"peer": name, "rate": ids.numel() / statistics.median(seconds), "gib": gib}), flush=True)
