"""What a check says."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Verdict"]


@dataclass(frozen=True)
class Verdict:
    """One check's answer.

    Attributes:
        name: of the check, its file in sansmax.audit.
        passed: True, False, or None where it does not apply or could not be made; `reason` then says why.
        numbers: what was measured; differences are the largest, relative to the largest output.
        reason: one sentence.
    """

    name: str
    passed: bool | None
    numbers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
