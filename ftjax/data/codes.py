"""Every code a verdict may have: its short name, how grave it is, and what usually sets it right.

E codes are about the form of a row and W codes about what is unusual in it (both: the table of
docs/data.md); the other letters belong to the step that gives them: F filter, P personal data and secrets,
D duplicates, C contamination, S synthesis, X extraction, L logs.
"""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Code(NamedTuple):
    name: str
    severity: Severity
    fix: str


CODES: dict[str, Code] = {
    # ── form ──
    "E001": Code("utf8", "error", "save the file as UTF-8"),
    "E002": Code("json", "error", "write one JSON object a line"),
    "E003": Code("not_object", "error", "each row has to be a JSON object"),
    "E004": Code("mixed_formats", "error", "put the formats into files of their own, or name one"),
    "E005": Code("duplicate_key", "error", "keep one of the values"),
    "E006": Code("character", "error", "take NUL and halves of surrogate pairs out of the text"),
    "E007": Code("shape", "error", "give the row the keys and types of its format"),
    "E008": Code("no_such_task", "error", "convert to a format that can say it"),
    "E010": Code("messages_missing", "error", "give a list of {role, content}"),
    "E011": Code("role_unknown", "error", "use a role of the format"),
    "E012": Code("content_type", "error", "give the content as a string, or as a list of parts"),
    "E013": Code("content_missing", "error", "give the message a content"),
    "E014": Code("no_assistant", "error", "add the answer to train on"),
    "E015": Code("last_not_assistant", "error", "end with an assistant message"),
    "E016": Code("weight_value", "error", "weight is 0 (not trained) or 1"),
    "E017": Code("weight_role", "error", "only assistant messages may have a weight"),
    "E018": Code("nothing_trained", "error", "give one assistant message the weight 1, or leave weights out"),
    "E020": Code("tool_schema", "error", "describe a tool as {type: function, function: {name, parameters}}"),
    "E021": Code("tool_name", "error", "call a tool by a name that `tools` has"),
    "E022": Code("arguments_not_json", "error", "arguments are the text of one JSON object"),
    "E023": Code("tool_id_unknown", "error", "answer with the id of a call made before"),
    "E024": Code("tool_call_unanswered", "error", "add the tool's message before the conversation goes on"),
    "E025": Code("tool_id_format", "error", "give each call an id of its own in the provider's form"),
    "E026": Code("turn_order", "error", "put the turns in an order that the provider takes"),
    "E030": Code("image_role", "error", "only user messages may hold images"),
    "E031": Code("image_format", "error", "give a JPEG, PNG or WEBP, as the provider takes it"),
    "E032": Code("image_limits", "error", "keep to the provider's number and size of images"),
    "E040": Code("pref_shape", "error", "give a prompt and two answers to it"),
    "E041": Code("pref_equal", "error", "leave out pairs of equal answers"),
    "E042": Code("pref_prompt_ends_assistant", "error", "end the prompt with the user's message"),
    "E050": Code("label_type", "error", "label is true or false"),
    "E060": Code("too_few_rows", "error", "add rows"),
    "E061": Code("file_too_big", "error", "split the file, or leave rows out"),
    "E070": Code("too_long", "error", "shorten the row: what is cut off its end is the answer"),
    "W101": Code("no_system", "warning", "use the system prompt that the model will be served with"),
    "W102": Code("same_role_twice", "warning", "join messages of one role that follow one another"),
    "W103": Code("extra_key", "warning", "leave out keys that the format does not have"),
    "W104": Code("whitespace_at_edges", "warning", "take the white space off, unless it is meant"),
    "W105": Code("empty_assistant", "warning", "leave out answers without text"),
    "W106": Code("developer_role", "warning", "it is written as system"),
    "W107": Code("near_duplicate", "warning", "ftjax data dedup"),
    "W108": Code("label_conflict", "warning", "decide on one answer to one prompt"),
    "W109": Code("pii", "warning", "ftjax data personal --mask"),
    "W110": Code("bom", "warning", "save the file as UTF-8 without a byte order mark"),
    "W111": Code("truncated_but_trained", "warning", "shorten the row: its end is cut off and not learnt"),
    "W112": Code("single_turn_system_drift", "warning", "use one system prompt, if one will be served"),
    "W113": Code("double_bos", "warning", "take the beginning-of-text token out of the data"),
    "W114": Code("weight_ignored", "warning", "drop what is not to be trained, or train it alike"),
    "W115": Code("blank_line", "warning", "leave blank lines out"),
    "W116": Code("leading_assistant", "warning", "begin with what is asked"),
    "W117": Code("none_value", "warning", "leave an input out that is none"),
    "W118": Code("lost", "warning", "keep the set in the format ftjax too"),
    "W119": Code("no_space_at_joint", "warning", "begin the completion with a space or a new line"),
    # ── filter ──
    "F001": Code("empty_answer", "warning", "write the answer, or leave the row out"),
    "F002": Code("placeholder", "warning", "write the answer, or leave the row out"),
    "F003": Code("refusal", "warning", "keep refusals only where the model is meant to refuse"),
    "F004": Code("boilerplate", "warning", "take the phrase out, or the model will say it always"),
    "F005": Code("cut_off", "warning", "get the whole answer: a larger token limit where it was generated"),
    "F006": Code("open_fence", "warning", "close the fence; the answer was probably cut off"),
    "F007": Code("repetition", "warning", "leave the row out: a model tuned on loops falls into them"),
    "F008": Code("prompt_echo", "warning", "take the repeated prompt out of the answer"),
    "F009": Code("language_mismatch", "warning", "answer in the prompt's language, or ask for the other one"),
    "F010": Code("mojibake", "warning", "decode the source as what it is (mostly UTF-8)"),
    "F011": Code("broken_json", "warning", "answer with JSON that parses"),
    "F012": Code("length_outlier", "warning", "look at the row: whole files and lost texts show like this"),
    "F013": Code("pair_alike", "warning", "leave the pair out: it says nothing of what is better"),
    "F014": Code("template_leak", "warning", "take the mark, and what follows it, out of the answer"),
    "F015": Code("no_end", "warning", "see whether it was cut off, and get the whole answer"),
    # ── personal data and secrets ──
    "P001": Code("email", "warning", "mask it (--mask), or leave the row out"),
    "P002": Code("phone", "warning", "mask it (--mask), or leave the row out"),
    "P003": Code("ip_address", "warning", "mask it (--mask), or leave the row out"),
    "P004": Code("card_number", "warning", "mask it (--mask), or leave the row out"),
    "P005": Code("iban", "warning", "mask it (--mask), or leave the row out"),
    "P006": Code("ssn", "warning", "mask it (--mask), or leave the row out"),
    "P007": Code("url_credentials", "warning", "mask it (--mask), and change the password"),
    "P008": Code("secret", "warning", "mask it (--mask), and revoke the key"),
    "P009": Code("likely_secret", "warning", "mask it (--mask), and revoke the key if it is one"),
    "P010": Code("private_key", "warning", "mask it (--mask), and replace the key pair"),
}
