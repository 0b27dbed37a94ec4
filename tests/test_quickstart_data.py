import json
import re
from collections import Counter

import pytest

from ftjax.quickstart import task

pytestmark = pytest.mark.fast

ITEM_WORDS = {
    "kettle": r"kettle|water boiler",
    "toaster": r"toaster|toster",
    "blender": r"blender|smoothie maker",
    "vacuum": r"vacuum|hoover|vac\b",
    "heater": r"heater|radiator",
    "fan": r"\bfan\b",
    "lamp": r"lamp|reading light",
    "scale": r"\bscales?\b",
}
DAY = r"tomorrow|tonight|weekend|24th|(?:mon|tues|wednes|thurs|fri|satur|sun)day\b"
PAST_OR_OPENING_DAY = r"supposed to be here on tuesday|open on \w+|stuck since monday"
STRANGER = (
    r"somebody else is|somebody paid|someone else|somone else|used my card|logged in with my|did not place"
    r"|stranger|was not me|wasn't me|hacked|didn't do that|never bought|never ordered|stolen|not your cu"
    r"|not authorise"
)
DANGER = (
    r"smok|fire\b|shock|spark|melted|burn|bleeding|explode|tingle|scorched|flames|bare wires|blew up"
    r"|cut my hand|swollen|steam shot|bang|hurt|casing of the"
)


def letters(message):
    return {message[i : i + 5] for i in range(len(message) - 4)}


@pytest.fixture(scope="module")
def everything():
    return [row for split in task.SPLITS for row in task.rows(split)]


def test_sizes(everything):
    sizes = {split: len(task.rows(split)) for split in task.SPLITS}
    assert sizes["train"] >= 400 and sizes["eval"] >= 60 and sizes["test"] >= 100
    assert len({row.message.lower() for row in everything}) == len(everything)


@pytest.mark.parametrize("split", task.SPLITS)
def test_files_hold_the_short_prompt_and_the_compact_answer(split):
    lines = task.path(split).read_text(encoding="utf-8").splitlines()
    for line, row in zip(lines, task.rows(split), strict=True):
        answer = {"role": "assistant", "content": row.answer}
        assert json.loads(line) == {"messages": [*task.short_prompt(row.message), answer]}
        assert list(row.ticket) == task.schema()["required"]


@pytest.mark.parametrize("split", task.SPLITS)
def test_every_answer_is_valid_and_scores_itself(split):
    rows = task.rows(split)
    scores = task.score([f"Here you are:\n```json\n{row.answer}\n```" for row in rows], rows)
    assert all(scores.exact) and all(scores.valid) and all(map(all, scores.fields.values()))


def test_the_instruction_names_every_value():
    for name, field in task.schema()["properties"].items():
        for value in (name, *field.get("enum", ())):
            assert json.dumps(value) in task.INSTRUCTION or f"{name}:" in task.INSTRUCTION


def test_every_value_is_in_every_split():
    for name in ("team", "priority", "item"):
        for split in task.SPLITS:
            counts = Counter(row.ticket[name] for row in task.rows(split))
            assert set(counts) == set(task.schema()["properties"][name]["enum"])


def test_orders_are_the_only_long_numbers(everything):
    for row in everything:
        order = row.ticket["order"]
        assert re.findall(r"\d{4,}", row.message) == ([order] if order else []), row
    orders = [row.ticket["order"] for row in everything if row.ticket["order"]]
    assert len(set(orders)) == len(orders)  # copied, not remembered


def test_items_follow_from_the_words(everything):
    for row in everything:
        found = {item for item, words in ITEM_WORDS.items() if re.search(words, row.message.lower())}
        assert found == ({row.ticket["item"]} if row.ticket["item"] else set()), row


def test_priorities_follow_from_the_rules(everything):
    for row in everything:
        message = row.message.lower()
        if re.search(DANGER, message):
            wanted = "urgent"
        elif re.search(STRANGER, message) or re.search(DAY, re.sub(PAST_OR_OPENING_DAY, "", message)):
            wanted = "high"
        else:
            wanted = "normal"
        assert row.ticket["priority"] == wanted, row
        assert wanted != "urgent" or row.ticket["team"] == "repair", row


def test_held_out_messages_are_no_near_duplicates():
    train = [letters(row.message.lower()) for row in task.rows("train")]
    for split in ("eval", "test"):
        for row in task.rows(split):
            own = letters(row.message.lower())
            nearest = max(len(own & other) / len(own | other) for other in train)
            assert nearest < 0.6, row


def test_few_shot_examples_come_from_train_and_are_a_prefix():
    largest = task.few_shot_examples(max(candidate.k for candidate in task.FEW_SHOT_CANDIDATES))
    assert all(row in task.rows("train") for row in largest)
    assert len({row.message for row in largest}) == len(largest)
    assert task.few_shot_examples(2) == largest[:2]
    assert {row.ticket["team"] for row in task.few_shot_examples(8)} == set(
        task.schema()["properties"]["team"]["enum"]
    )
    assert task.FEW_SHOT in task.FEW_SHOT_CANDIDATES


def test_prompts():
    assert task.short_prompt("Hi")[-1] == {"role": "user", "content": "Hi"}
    assert [turn["role"] for turn in task.instruction_prompt("Hi")] == ["system", "user"]
    examples = task.few_shot_examples(2)
    turns = task.few_shot_prompt("Hi", examples, task.FewShot(2, "none"))
    assert [turn["role"] for turn in turns] == ["system"] + ["user", "assistant"] * 2 + ["user"]
    assert turns[0]["content"] == task.SYSTEM and turns[2]["content"] == examples[0].answer
    turns = task.few_shot_prompt("Hi", examples, task.FewShot(2, "system"))
    assert turns[0]["content"] == task.INSTRUCTION


@pytest.mark.parametrize("style", task.FEW_SHOT_CANDIDATES, ids=str)
def test_few_shot_prompts_differ_in_the_message_only(style):
    examples = task.few_shot_examples(style.k)
    one, other = (task.few_shot_prompt(message, examples, style) for message in ("One", "Other"))
    assert len(one) == (2 * style.k + 2 if style.turns else 2) and one[:-1] == other[:-1]
    head, _, tail = one[-1]["content"].rpartition("One")
    assert other[-1]["content"] == f"{head}Other{tail}" and tail == ("\nJSON:" if style.cue else "")
    text = "".join(turn["content"] for turn in one)
    assert text.count(task.INSTRUCTION) == (style.instruction != "none")
    for row in examples:
        assert text.count(row.message) == text.count(row.answer) == 1
    if style.instruction == "user":
        assert one[1]["content"].startswith(task.INSTRUCTION)


def test_parse_forgives_prose_and_not_broken_json():
    assert task.parse('Sure! {"team": "sales"} Anything else?') == {"team": "sales"}
    assert task.parse('{"team": "sales"') is None and task.parse("sales") is None
