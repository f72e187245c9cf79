"""What a check says: Verdict; with the check's name, a Finding."""

from dataclasses import dataclass
from typing import NamedTuple


class NotApplicable(Exception):
    """Raised by a check that cannot be applied to this network; the text says why, in a clause."""


class Verdict(NamedTuple):
    """A check's answer. cause and remedy are the likely mistake and its mending, for one that did not pass."""

    passed: bool
    measured: str
    expected: str
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's report. passed None: not applicable, and `measured` says why."""

    check: str
    passed: bool | None
    measured: str
    expected: str = ""
    cause: str = ""
    remedy: str = ""

    @property
    def result(self) -> str:
        return {True: "ok", False: "FAILED", None: "n/a"}[self.passed]


def report(findings: list[Finding]) -> str:
    """A table of all checks, then the cause and the remedy of each that failed, then the counts."""
    rows = [("check", "result", "measured", "expected")]
    rows += [(finding.check, finding.result, finding.measured, finding.expected) for finding in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    widths.append(min(max(len(row[2]) for row in rows), 58))  # a long reason does not push the last column away
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    failed = [finding for finding in findings if finding.passed is False]
    for finding in failed:
        lines += ["", f"{finding.check}: {finding.cause}", f"  mend it: {finding.remedy}"]
    counts = [sum(finding.passed is kind for finding in findings) for kind in (True, False, None)]
    lines += ["", "{} checks passed, {} failed, {} not applicable".format(*counts)]
    return "\n".join(lines)
