"""Text of HTML pages by other tools; run by benchmarks/extract.py with the Python that has them.

python extract_html.py TOOL FILE…     a JSON line for each file: {"seconds", "text"}
"""

import json
import sys
import time


def tool(name: str):
    if name == "trafilatura":
        import trafilatura

        return lambda page: trafilatura.extract(
            page,
            output_format="markdown",
            include_formatting=True,
            include_tables=True,
            include_comments=False,
        )
    if name == "resiliparse":
        from resiliparse.extract.html2text import extract_plain_text

        return lambda page: extract_plain_text(page, main_content=True, preserve_formatting=True)
    raise SystemExit(f"no tool {name}")


def main() -> None:
    extract = tool(sys.argv[1])
    extract("<html><body><main><p>warm</p></main></body></html>")
    for path in sys.argv[2:]:
        with open(path, encoding="utf-8", errors="replace") as file:
            page = file.read()
        began = time.process_time()
        text = extract(page) or ""
        print(json.dumps({"seconds": time.process_time() - began, "text": text}))


if __name__ == "__main__":
    main()
