"""What happens to rows that are bad or too long: raised, cut or counted, as the caller asked."""

from typing import Literal

from fastalign.batch import Group
from fastalign.data.checked import OnBadRow
from fastalign.data.report import DataReport
from fastalign.data.row import DataFault

OnTooLong = Literal["error", "skip", "truncate"]


def fit(
    group: Group, source: str, report: DataReport, max_length: int, on_too_long: OnTooLong
) -> Group | None:
    """The group within `max_length`, or None where it is left out and counted."""
    num_prompt = len(group.prompt_ids)
    longest = num_prompt + max(len(response) for response in group.response_ids)
    if longest <= max_length:
        return group
    room = max_length - num_prompt
    if on_too_long == "truncate" and room >= 1:
        cut = [list(response[:room]) for response in group.response_ids]
        masks = group.response_loss_mask
        cut_masks = None if masks is None else [list(mask[:room]) for mask in masks]
        kept = Group(group.prompt_ids, cut, cut_masks)
        learned = all(kept.targets_of(number) for number in range(len(cut)))
        if learned and (len(cut) < 2 or cut[0] != cut[1]):
            report.num_truncated += 1
            return kept
    # What nothing would be left of to learn from cannot be truncated.
    refuse_long(report, source, longest, max_length, "error" if on_too_long == "error" else "skip")
    return None


def refuse(report: DataReport, fault: DataFault, on_bad_row: OnBadRow) -> None:
    """Raises the fault, or counts it."""
    if on_bad_row == "error":
        raise fault
    report.faults.append(fault)


def refuse_long(
    report: DataReport, source: str, length: int, max_length: int, on_too_long: str
) -> None:
    """Raises for a row over `max_length`, or counts it."""
    if on_too_long == "error":
        raise DataFault(
            source,
            f"expected at most {max_length} tokens (data.max_length), got {length}; raise it, or "
            "say what to do with such rows (--data.on-too-long)",
        )
    report.num_too_long += 1


def require_rows(report: DataReport) -> None:
    """Raises when nothing is left of a source."""
    if report.num_used == 0:
        why = report.losses_line() or f"{report.source}: no rows"
        first = f"; the first fault: {report.faults[0]}" if report.faults else ""
        raise DataFault(report.source, f"no row is left to use: {why}{first}")
