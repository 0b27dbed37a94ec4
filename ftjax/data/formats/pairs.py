"""Preference records of two answers or of two whole conversations, for the formats that have them."""

from typing import Any

from ftjax.data.formats.messages import as_context
from ftjax.data.record import Findings, Record


def pair_of_conversations(
    chosen: list[dict], rejected: list[dict], found: Findings, tools=None, meta: dict[str, Any] | None = None
) -> Record:
    """The record of two whole conversations: their common beginning is the prompt, up to the last turn that
    leaves both an assistant's."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen and shared == len(chosen) == len(rejected):
        found.add("E041", "rejected", "chosen and rejected are the same")
    if shared in (len(chosen), len(rejected)):
        # One goes on where the other stops, so the last turn that both have is what is compared.
        shared -= 1
        while shared >= 0 and chosen[shared]["role"] != "assistant":
            shared -= 1
    shared = max(0, shared)
    return pair(chosen[:shared], chosen[shared:], rejected[shared:], found, tools, meta=meta)


def pair(
    prompt: list[dict],
    chosen: list[dict],
    rejected: list[dict],
    found: Findings,
    tools=None,
    raw: tuple[str, ...] | None = None,
    meta: dict[str, Any] | None = None,
) -> Record:
    """The record of a prompt and two answers, nothing of the prompt trained."""
    if found.error is None:
        for name, part in (("chosen", chosen), ("rejected", rejected)):
            if not any(m["role"] == "assistant" for m in part):
                text = f"{name} has no assistant turn of its own, so nothing to compare"
                found.add("E014", name, text)
        if found.error is None and chosen == rejected:
            found.add("E041", "rejected", "chosen and rejected are the same")
    return Record(
        "preference",
        as_context(prompt),
        chosen=chosen,
        rejected=rejected,
        tools=tools,
        raw=raw,
        meta=meta or {},
    )
