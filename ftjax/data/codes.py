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
    "W109": Code("pii", "warning", "ftjax data filter, which masks"),
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
    # ── extraction ──
    "X001": Code("unreadable", "error", "look whether the file is whole, or save it in another format"),
    "X002": Code("no_text", "warning", "written by a script, it needs a browser: try knowledgesdk:ADDRESS"),
    "X003": Code("same_document", "note", "the first one is kept; nothing to do"),
    "X004": Code("format_not_read", "note", "save it as HTML, Markdown, PDF, DOCX, RST, .ipynb or .txt"),
    "X005": Code("robots_refused", "warning", "ask the site's owner, or allow it in your robots.txt"),
    "X006": Code("not_fetched", "error", "look at the address in a browser; run again later"),
    "X007": Code("scanned", "error", "recognise its text first (OCR), e.g. by ocrmypdf"),
    "X008": Code("only_links", "note", "an index or a list of links; nothing to do"),
    "X009": Code("document_too_large", "error", "raise max_mb, or split the document"),
    "X010": Code("outside", "note", "give its address as a source of its own if you want it"),
    "X011": Code("limit_reached", "warning", "raise max_pages, or narrow the source"),
    "X012": Code("charset", "warning", "look for � and wrong letters; save it as UTF-8"),
    "X013": Code("code_cut", "note", "raise max_tokens to keep the block whole"),
    "X014": Code("service", "error", "see the service's message; run again later"),
    # ── synthesis ──
    "S001": Code("no_answer", "error", "start the same command again: what was answered is kept"),
    "S002": Code("cost_limit", "error", "raise max_cost: the same command goes on and pays nothing twice"),
    "S003": Code("cut_off", "warning", "raise max_tokens, or ask for fewer (count)"),
    "S004": Code("not_json", "warning", "a larger model, or json_mode: schema where the endpoint takes it"),
    "S005": Code("wrong_form", "warning", "a larger model, or json_mode: schema where the endpoint takes it"),
    "S006": Code("section_short", "note", "lower min_section where such sections say something"),
    "S007": Code("nothing_to_ask", "note", "nothing is wrong where the section says little"),
    "S008": Code("no_section", "error", "give sections, as ftjax data extract makes them"),
    "S010": Code("quote_not_found", "warning", "the pair is left out: its evidence is made up"),
    "S011": Code("quote_short", "warning", "the pair is left out: its evidence proves nothing"),
    "S012": Code("fact_not_found", "warning", "the pair is left out: part of its answer is made up"),
    "S013": Code("not_self_contained", "warning", "the pair is left out: its question needs the section"),
    "S014": Code("echo", "warning", "the pair is left out: its answer says nothing"),
    "S015": Code("length", "warning", "set min_words and max_words, where such answers are wanted"),
    "S016": Code("asked_twice", "note", "one of them is kept"),
    "S020": Code("no_answer_again", "warning", "the pair is left out: the section may not answer it"),
    "S021": Code("other_answer_again", "warning", "compare: judge, where answers differ in words alone"),
    "S022": Code("answerable", "warning", "the example is left out: the section has the answer"),
    "S030": Code("judged_wrong", "warning", "the pair is left out"),
    "S031": Code("rejected_is_right", "warning", "the pair is left out: its rejected answer is a good one"),
}
