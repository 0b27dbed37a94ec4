"""Fail if a test that every machine must run was skipped: python tests/must_run.py JUNIT.xml"""

import collections
import importlib.util
import platform
import sys
import xml.etree.ElementTree

# Prefixes of "classname::name": the proofs that need nothing a plain machine lacks.
MUST_RUN = (
    "tests.models.test_reference",
    "tests.test_checkpoint",
    "tests.test_faults",
    "tests.test_invariance",
    "tests.test_golden",
    "tests.data.test_render",
    "tests.data.test_pack",
    "tests.data.test_loader",
    "tests.test_bad_input",
    "tests.test_bucket",
    "tests.test_distributed",
    "tests.test_sharding",
    "tests.test_launch",
    "tests.test_estimate",
)
if importlib.util.find_spec("torch"):
    MUST_RUN += ("tests.models.test_parity", "tests.test_peft", "tests.test_objectives")
if (sys.platform, platform.machine()) == ("linux", "x86_64"):  # where libtpu is to be had
    MUST_RUN += ("tests.test_tpu::",)
    if sys.version_info < (3, 12):  # the last jax for it is known, and its programs are among the golden ones
        MUST_RUN += ("tests.test_tpu_programs",)


def reason_of(skip: xml.etree.ElementTree.Element) -> str:
    message, text = (skip.get("message") or "", skip.text or "")
    if message == "collection skipped":  # a whole file; its text is "('FILE', LINE, 'Skipped: REASON')"
        return text.rpartition("Skipped: ")[2].removesuffix("')")
    return message


def main(path: str) -> int:
    ran, skipped, reasons = collections.Counter(), [], collections.Counter()
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skip = case.find("skipped")
        if skip is not None:
            reasons[reason_of(skip)[:100]] += 1
        for prefix in MUST_RUN:
            if name.startswith(prefix):
                ran[prefix] += skip is None
                if skip is not None:
                    skipped.append(name)
    for reason, count in reasons.most_common():
        print(f"skipped {count}: {reason}")
    missing = [prefix for prefix in MUST_RUN if not ran[prefix]]
    for name in skipped:
        print(f"must run, but was skipped: {name}")
    for prefix in missing:
        print(f"must run, but no test of it ran: {prefix}")
    return 1 if skipped or missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
