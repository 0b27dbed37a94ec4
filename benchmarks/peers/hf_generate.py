"""Greedy decoding by transformers, static cache and torch.compile, on one GPU; one JSON line.

PYTHON hf_generate.py --model FOLDER [--batch 64] [--prompt 128] [--new 512]
"""

import argparse
import json
import time

import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--prompt", type=int, default=128)
parser.add_argument("--new", type=int, default=512)
args = parser.parse_args()

model = transformers.AutoModelForCausalLM.from_pretrained(
    args.model, dtype=torch.bfloat16, device_map="cuda"
).eval()
ids = torch.randint(4, model.config.vocab_size, (args.batch, args.prompt), device="cuda")
how = dict(
    do_sample=False,
    min_new_tokens=args.new,
    max_new_tokens=args.new,
    pad_token_id=2,
    attention_mask=torch.ones_like(ids),
    cache_implementation="static",
)
with torch.inference_mode():
    model.generate(ids, **how)
    torch.cuda.synchronize()
    clock = time.perf_counter()
    out = model.generate(ids, **how)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - clock
made = (out.shape[1] - ids.shape[1]) * args.batch
print(
    json.dumps(
        {
            "peer": f"transformers {transformers.__version__}, static cache, compiled",
            "rate": made / seconds,
            "gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    ),
    flush=True,
)
