import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftjax.data.personal import Personal, PersonalOptions, entropy, find, iban, luhn, mask
from ftjax.data.record import Record
from ftjax.errors import UserError

pytestmark = pytest.mark.fast

KEY = "sk-proj-Zx81kQw0Lm2Np3Rt4Sv5Ux6Wy7Az"  # made up
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "kind, text, value",
    [
        ("email", "Write to j.doe+x@mail.firm.co.uk, please.", "j.doe+x@mail.firm.co.uk"),
        ("email", "<jane@example.com>", "jane@example.com"),
        ("phone", "It is (415) 555-2671 now", "(415) 555-2671"),
        ("phone", "It is +44 20 7946 0958.", "+44 20 7946 0958"),
        ("phone", "My phone number: 030 1234567", "030 1234567"),
        ("ip", "from 93.184.216.34 to", "93.184.216.34"),
        ("ip", "from 2a02:8108:4e1:9f::3c to", "2a02:8108:4e1:9f::3c"),
        ("card", "Card 4111 1111 1111 1111.", "4111 1111 1111 1111"),
        ("card", "Card 378282246310005 it is", "378282246310005"),
        ("iban", "to GB29 NWBK 6016 1331 9268 19 by", "GB29 NWBK 6016 1331 9268 19"),
        ("iban", "to DE89370400440532013000, AND", "DE89370400440532013000"),
        ("ssn", "SSN 536-90-4399 is", "536-90-4399"),
        ("credentials", "git clone https://me:hunter22@host.org/x", "me:hunter22"),
        ("secret", f"key: {KEY}.", KEY),
        ("secret", "ghp_16C7e42F292c6912E7710c838347Ae178B4a x", "ghp_16C7e42F292c6912E7710c838347Ae178B4a"),
        ("secret", "id AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
        (
            "secret",
            "AIza" + "SyA1b2C3d4E5f6G7h8I9j0KlMnOpQrStUvW",
            "AIza" + "SyA1b2C3d4E5f6G7h8I9j0KlMnOpQrStUvW",
        ),
        ("secret", "xoxb-" + "2718281828-Ab3dEf6hIj9k", "xoxb-" + "2718281828-Ab3dEf6hIj9k"),
        (
            "secret",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln",
        ),
        ("likely", 'password = "q8#Lz0pW!x"', "q8#Lz0pW!x"),
        ("likely", "Authorization: Bearer 9f86d081884c7d659a2f", "9f86d081884c7d659a2f"),
        ("private_key", PEM, PEM),
    ],
)
def test_found_and_masked(kind, text, value):
    (f,) = find(text)
    assert (f.kind, text[f.start : f.end]) == (kind, value)
    name = {"likely": "SECRET", "credentials": "CREDENTIALS"}.get(kind, kind.upper())
    assert mask(text) == text.replace(value, f"[{name}_1]")


@pytest.mark.parametrize(
    "text",
    [
        "icon@2x.png and @handle and a @ b",
        "It took 3.14159265358979 s for 1,234,567,890 rows; 20 + 12345678 = 12345698.",
        "On 2024-01-31 12:30:15, version 1.20.3.40, at 127.0.0.1, std::vector<a::b>.",
        "ISBN 978-3-16-148410-0, order 4111 1111 1111 1112, number 1234567890123456",
        "GB29 NWBK 6016 1331 9268 18 is no account",
        "000-12-3456, 666-12-3456, 900-12-3456, 123-00-4567, 123-45-0000",
        "https://host.org:8080/@user",
        "sk-your-api-key-goes-here, task-list-of-the-team",
        "password: ********, token = os.environ['T0KEN_A1'], secret: your-secret-123",
        "The key is simplicity. max_tokens: 1024",
        "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
    ],
)
def test_look_alikes_are_left_alone(text):
    assert find(text) == []


def test_check_digits_by_hand():
    # 7 9 9 2 7 3 9 8 7 1 -> 7+(1+8)+9+4+7+6+9+(1+6)+7+2 = 67, so the last digit is 3
    assert [d for d in range(10) if luhn(f"7992739871{d}")] == [3]
    # 3214282912345698765432161182 = 97 · 33136937034491739852908259 + 59; with 82 it leaves 1 (ISO 13616)
    assert int("3214282912345698765432161182") % 97 == 1 and iban("GB82 WEST 1234 5698 7654 32")
    assert [k for k in range(2, 99) if iban(f"GB{k:02}WEST12345698765432")] == [82]
    assert not iban("GB82WEST1234569876543")  # too short for its country
    assert entropy("abab") == 1 and entropy("abcd") == 2


def record() -> Record:
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "send", "arguments": {"to": ["ann@firm.org"], "by": {"tel": "+1 415 555 2671"}}},
    }
    return Record(
        "sft",
        [
            {"role": "system", "content": [{"type": "text", "text": "You write to Ann@firm.org"}]},
            {"role": "user", "content": "Mail ann@firm.org and bob@firm.org"},
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "ann@firm.org!"},
            {"role": "tool", "content": "sent", "tool_call_id": "c1"},
        ],
        raw=("bob@firm.org", "x"),
        meta={"source": "f.jsonl", "line": 3, "author": "eve@firm.org"},
    )


def test_masking_is_one_numbering_over_the_whole_record():
    (j,) = Personal(PersonalOptions(mask=True)).apply([record()], None, 0)
    assert j.changed and j.record
    messages = j.record.messages
    assert messages[0]["content"] == [{"type": "text", "text": "You write to [EMAIL_1]"}]
    assert messages[1]["content"] == "Mail [EMAIL_1] and [EMAIL_2]"
    arguments = messages[2]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"to": ["[EMAIL_1]"], "by": {"tel": "[PHONE_1]"}}
    assert messages[2]["reasoning_content"] == "[EMAIL_1]!" and messages[2]["tool_calls"][0]["id"] == "c1"
    assert j.record.raw == ("[EMAIL_2]", "x") and j.record.meta["author"] == "eve@firm.org"
    paths = [v.path for v in j.verdicts]
    assert (
        "messages[2].tool_calls[0].function.arguments.by.tel" in paths
        and "messages[0].content[0].text" in paths
    )
    assert all((v.source, v.line) == ("f.jsonl", 3) for v in j.verdicts)
    # what is reported does not spread it
    assert "ann@firm.org" not in json.dumps([v.to_json() for v in j.verdicts])


def test_one_value_in_other_spellings_has_one_number():
    text = "Ann@Firm.org, ann@firm.org, a.nn@firm.org; 415-555-2671 or (415) 555-2671"
    assert mask(text) == "[EMAIL_1], [EMAIL_1], [EMAIL_2]; [PHONE_1] or [PHONE_1]"


def test_flag_drop_and_kinds():
    (j,) = Personal(PersonalOptions()).apply([record()], None, 0)
    assert j.record == record() and not j.changed and j.verdicts[0].code == "P001"
    (j,) = Personal(PersonalOptions(drop=True)).apply([record()], None, 0)
    assert j.record is None and j.verdicts
    (j,) = Personal(PersonalOptions(kinds=["ip"], drop=True)).apply([record()], None, 0)
    assert j.record and not j.verdicts
    clean = Record("sft", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    (j,) = Personal(PersonalOptions(mask=True)).apply([clean], None, 0)
    assert j.record is clean and not j.changed
    with pytest.raises(UserError, match="mask and drop"):
        PersonalOptions(mask=True, drop=True)
    with pytest.raises(UserError, match="no kind 'name'"):
        PersonalOptions(kinds=["name"])  # type: ignore[arg-type]


def test_values_that_belong_to_nobody_can_be_left():
    real = PersonalOptions(examples=False)
    for text in (
        "jane@example.com",
        "202-555-0143",
        "4111 1111 1111 1111",
        "192.168.0.17",
        "http://user:password@h.org",
    ):
        assert find(text) and not find(text, real), text
    assert find("jane@firm.org", real) and find("93.184.216.34", real)


PIECES = st.sampled_from(
    [
        *("ann@firm.org", "+1 415 555 2671", "415-555-2671", "4111 1111 1111 1111", "DE89370400440532013000"),
        *("93.184.216.34", "2a02:8108:4e1:9f::3c", "536-90-4399", KEY, "https://me:hunter22@host.org/x", PEM),
        *(
            "password: q8#Lz0pW!x9",
            "phone",
            "call",
            "is",
            "token",
            "=",
            "4155552672",
            "0301234567",
            "(",
            ")",
            "+",
        ),
        *("[EMAIL_1]", "[PHONE_1]", "secret", "12", "-", ".", "é", "\n"),
    ]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=12).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda by: by.join(parts))
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
@example("phone jane.with.a.long.name@some.long.host.org 4155552672")  # near the word once the mail is short
def test_masked_text_holds_nothing_found_and_masking_again_changes_nothing(text):
    masked = mask(text)
    assert find(masked) == [] and mask(masked) == masked
    found = find(text)
    assert (masked == text) == (not found)
    for f in found:
        if len(text[f.start : f.end]) > 10 and text.count(text[f.start : f.end]) == 1:
            assert text[f.start : f.end] not in masked


@given(st.integers(0, 10**15 - 1))
def test_luhn_finds_every_changed_digit(number):
    body = f"{number:015}"
    (check,) = [d for d in range(10) if luhn(f"{body}{d}")]
    for i in range(15):
        other = (int(body[i]) + 1) % 10
        assert not luhn(f"{body[:i]}{other}{body[i + 1 :]}{check}")
