"""Unsloth's LoRA step (FastLanguageModel, AdamW fused) on one GPU; prints one JSON line.

    PYTHON unsloth_lora.py --model FOLDER [--rows 4] [--length 2048] [--checkpointing unsloth|off] [--bits 4]

Run by benchmarks.gpu with the python of an environment that has unsloth. With --lengths (a JSON of [prompt,
answer] lengths) rows are such documents, padded to the longest of their batch, and tok_s counts answers.
"""

import argparse
import json
import os
import random
import statistics
import time

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--rows", type=int, default=4)
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--checkpointing", default="off", choices=("unsloth", "off"))
parser.add_argument("--bits", type=int, default=16)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--lengths")
args = parser.parse_args()
os.environ["HF_HUB_OFFLINE"] = os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

from unsloth import FastLanguageModel  # noqa: E402,I001 - it has to come before transformers
import torch  # noqa: E402
import unsloth  # noqa: E402

model, _ = FastLanguageModel.from_pretrained(
    args.model,
    max_seq_length=args.length,
    dtype=torch.bfloat16,
    load_in_4bit=args.bits == 4,
    local_files_only=True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r=args.rank,
    lora_alpha=2 * args.rank,
    lora_dropout=0,
    bias="none",
    use_gradient_checkpointing="unsloth" if args.checkpointing == "unsloth" else False,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
vocabulary = model.config.vocab_size
pairs = json.load(open(args.lengths))["pairs"] if args.lengths else None
draw = random.Random(0)


def batch():
    """(ids, labels, attention mask or None, how many tokens count)."""
    if pairs is None:
        ids = torch.randint(3, vocabulary, (args.rows, args.length), device="cuda")
        return ids, ids.clone(), None, ids.numel()
    # as many documents as fill rows × length tokens
    chosen, room = [], args.rows * args.length
    while room > 0:
        chosen.append(draw.choice(pairs))
        room -= sum(chosen[-1])
    longest = max(map(sum, chosen))
    ids = torch.randint(3, vocabulary, (len(chosen), longest), device="cuda")
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(chosen):
        labels[i, prompt : prompt + answer] = ids[i, prompt : prompt + answer]
        mask[i, : prompt + answer] = 1
    return ids, labels, mask, sum(answer for _, answer in chosen)


def step():
    ids, labels, mask, count = batch()
    more = {} if mask is None else {"attention_mask": mask}
    model(input_ids=ids, labels=labels, **more).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return count


result = {"peer": f"Unsloth {unsloth.__version__}"}
with torch.autocast("cuda", dtype=torch.bfloat16):
    for _ in range(4):
        step()
    rates = []
    for _ in range(args.steps):
        clock = time.perf_counter()
        count = step()
        rates.append(count / (time.perf_counter() - clock))
result["rate"] = statistics.median(rates)
result["gib"] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(result), flush=True)
