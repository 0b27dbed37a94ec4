"""Lengths of real examples, in tokens: what the packed part of benchmarks.gpu draws its documents from.

    python -m benchmarks.lengths FOLDER TOKENIZER.json > benchmarks/packed_lengths.json

FOLDER holds snips (its train_*_full.json: an utterance, and its intent and slots as JSON), gsm8k
(train.jsonl: question and answer) and mt_bench (question.jsonl with reference_gpt-4.jsonl: each turn, what
was said before it being part of the prompt). Of the first two an evenly spaced 400 and 300 are taken; no
template is applied. Only lengths are kept: [prompt, answer] pairs, interleaved.
"""

import json
import sys
from pathlib import Path


def snips(folder: Path):
    for file in sorted(folder.glob("train_*_full.json")):
        text = file.read_text("utf-8", errors="replace")
        ((intent, rows),) = json.loads(text).items()
        for row in rows:
            slots = {part["entity"]: part["text"] for part in row["data"] if "entity" in part}
            said = "".join(part["text"] for part in row["data"])
            yield said, json.dumps({"intent": intent, **slots}, ensure_ascii=False)


def gsm8k(folder: Path):
    for line in (folder / "train.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        yield row["question"], row["answer"]


def mt_bench(folder: Path):
    rows = [json.loads(x) for x in (folder / "question.jsonl").read_text("utf-8").splitlines()]
    turns = {row["question_id"]: row["turns"] for row in rows}
    for line in (folder / "reference_gpt-4.jsonl").read_text("utf-8").splitlines():
        row, before = json.loads(line), ""
        for asked, answer in zip(turns[row["question_id"]], row["choices"][0]["turns"], strict=False):
            yield before + asked, answer
            before += f"{asked}\n{answer}\n"


def main(folder: str, tokenizer: str) -> None:
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(tokenizer).encode
    found = []
    for read, count in ((snips, 400), (gsm8k, 300), (mt_bench, 60)):
        rows = list(read(Path(folder) / read.__name__))
        chosen = [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
        lengths = [tuple(len(encode(x, add_special_tokens=False).ids) for x in pair) for pair in chosen]
        found += [((i + 0.5) / len(lengths), pair) for i, pair in enumerate(lengths)]
    pairs = [pair for _, pair in sorted(found)]
    print(json.dumps({"made_by": "python -m benchmarks.lengths", "pairs": pairs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
