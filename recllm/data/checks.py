"""What checking a data set found: findings with line numbers, and facts, as text and as JSON."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

LINES_SHOWN = 5

Severity = Literal["warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One kind of peculiarity: how often, and the first places. A line counts from 1 and the header is one."""

    severity: Severity
    code: str
    message: str
    count: int
    lines: tuple[int, ...] = ()
    file: str = ""

    def text(self) -> str:
        """One readable line."""
        where = f" ({self.file}, {_places(self.lines, self.count)})" if self.lines else ""
        return f"{self.severity}: {self.message}: {self.count:,}{where}"


@dataclass(frozen=True)
class CheckReport:
    """Findings and facts (rows read and kept, columns, order, ties, users, items) of one data set."""

    findings: tuple[Finding, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Readable text: the facts, then the findings."""
        shown = [f"{name.replace('_', ' ')}: {_fact(value)}" for name, value in self.facts.items()]
        return shown + [finding.text() for finding in self.findings]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        findings = [
            {
                "severity": finding.severity,
                "code": finding.code,
                "message": finding.message,
                "count": finding.count,
                "file": finding.file,
                "lines": list(finding.lines),
            }
            for finding in self.findings
        ]
        return {"findings": findings, "facts": dict(self.facts)}

    def count(self, code: str) -> int:
        """How often the finding `code` was made; 0 where it was not."""
        return sum(finding.count for finding in self.findings if finding.code == code)


class Checks:
    """Findings and facts while they are collected."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.facts: dict[str, Any] = {}

    def add(
        self,
        severity: Severity,
        code: str,
        message: str,
        count: int,
        *,
        file: str = "",
        lines: Iterable[int] = (),
    ) -> None:
        """Note a finding, unless `count` is 0."""
        if count:
            self.findings.append(Finding(severity, code, message, count, tuple(lines)[:LINES_SHOWN], file))

    def report(self) -> CheckReport:
        """What was collected; warnings stand first."""
        ordered = sorted(self.findings, key=lambda finding: finding.severity != "warning")
        return CheckReport(tuple(ordered), self.facts)


def _places(lines: tuple[int, ...], count: int) -> str:
    more = ", …" if count > len(lines) else ""
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(str(line) for line in lines)}{more}"


def _fact(value: Any) -> str:  # noqa: ANN401  facts are what JSON can hold
    if isinstance(value, dict):
        return ", ".join(f"{key} = {part}" for key, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
