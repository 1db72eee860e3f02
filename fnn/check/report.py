"""What a gradient check found: a table, and the error that holds it."""

from __future__ import annotations

import dataclasses
import math

from fnn import text

_ROWS, _LINES, _NAME = 30, 5, 40


def short(name: str) -> str:
    """A name, cut in the middle where it is long."""
    half = (_NAME - 1) // 2
    return name if len(name) <= _NAME else f"{name[:half]}…{name[-half:]}"


@dataclasses.dataclass(frozen=True)
class Kink:
    """A place where the function has no derivative: its slopes to either side differ.

    where: the entry of the arguments, such as `x[0, 3]`.
    left, right: the one-sided derivatives with respect to it of the sum of the results: inf where
        they grow without bound near it, nan where the function isn't defined on that side.
    rule: the derivative that the rule gives there.
    """

    where: str
    left: float
    right: float
    rule: float

    def __str__(self):
        left, right = (f"{slope + 0.0:.6g}" for slope in (self.left, self.right))
        what = "edge of the domain" if math.isnan(self.left) or math.isnan(self.right) else "kink"
        if math.isnan(self.left) and math.isnan(self.right):
            sides = "not defined on either side"
        elif math.isnan(self.left):
            sides = f"not defined on the left, slope {right} on the right"
        elif math.isnan(self.right):
            sides = f"slope {left} on the left, not defined on the right"
        else:
            sides = f"slope {left} on the left, {right} on the right"
        return f"{what} at {short(self.where)}: {sides}; the rule says {self.rule:.6g}"


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison of all entries of two arrays.

    what: the quantity, such as "gradient, vmapped".
    against: "autodiff" (of the plain definition), "differences", or what else is the measure.
    order: of the derivative, 0 for values.
    mode: "reverse", "forward", "forward over reverse", ...
    error: the largest relative error over the entries without a kink, of what goes beyond rounding
        and the differences' own error; 0 where these explain all.
    worst: the entry it occurs at, such as `W[1, 2]`, or "" if there is none.
    rule, reference: the two numbers there.
    tolerance: what the error may be.
    kinks: how many entries were left out: those at kinks and edges, and infinite ones.
    skipped: why it was not done, or "".
    ok: whether it found nothing wrong.
    why: if it isn't ok because there was nothing to compare, why that is.
    between: the slopes between which the rule's number should lie, at a kink.
    """

    what: str
    against: str
    dtype: str
    order: int
    mode: str
    error: float = 0.0
    worst: str = ""
    rule: float = float("nan")
    reference: float = float("nan")
    tolerance: float = 0.0
    kinks: int = 0
    skipped: str = ""
    ok: bool = True
    why: str = ""
    between: tuple[float, float] | None = None

    @property
    def off(self) -> str:
        """The error as text: "≤ rounding" where it is 0, which isn't to say that all is equal."""
        if self.skipped or self.why:
            return ""
        return f"{self.error:.1e}" if self.error else "≤ rounding"

    @property
    def verdict(self) -> str:
        if self.why:
            return f"NOT CHECKED: {self.why}"
        if self.skipped:
            return f"skipped: {self.skipped}"
        kinks = f", {self.kinks} left out" if self.kinks else ""
        return ("ok" if self.ok else "WRONG") + kinks

    def replace(self, **changes) -> Check:
        return dataclasses.replace(self, **changes)

    def __str__(self):
        """What is wrong, in a sentence."""
        if self.why:
            return self.why
        if self.between is not None:
            low, high = self.between
            if low == high:
                wanted = f"should be {low:.9g}, the slope on the one side that there is"
            else:
                wanted = f"should lie between {low:.9g} and {high:.9g}, the slopes on its two sides"
        else:
            wanted = f"should be {self.reference:.9g} by {self.against}"
        mode = ", ".join(t for t in (self.mode, f"order {self.order}", self.dtype) if t)
        return (
            f"the {self.what} ({mode}) is wrong. At {short(self.worst)} it is {self.rule:.9g} but "
            f"{wanted} (relative error {self.error:.2g}, tolerance {self.tolerance:.2g})"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `check_rule` and `check_grads` found; prints as a table, one row a check.

    name: of the function.
    checks: in the order they were made.
    kinks: the places without a derivative.
    notes: what else the reader should know, such as that only a sample was checked.
    ok: whether something was checked, and all of it is right.
    """

    name: str
    checks: tuple[Check, ...]
    kinks: tuple[Kink, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The first wrong check of the lowest order; if none is wrong, that of largest error."""
        wrong = [c for c in self.checks if not c.ok]
        if wrong:
            # A number that is wrong says more than that nothing could be checked.
            return min(wrong, key=lambda c: (bool(c.why), c.order))
        return max(self.checks, key=lambda c: c.error, default=None)

    @property
    def verdict(self) -> str:
        """ "all checks pass", "WRONG", or why nothing was checked."""
        if self.ok:
            return "all checks pass"
        worst = self.worst
        return f"NOT CHECKED: {worst.why}" if worst is not None and worst.why else "WRONG"

    def __repr__(self):
        done = sum(not c.skipped and not c.why for c in self.checks)
        kinks = f", {len(self.kinks)} kinks" if self.kinks else ""
        return f"<Report of {short(self.name)}: {self.verdict} ({done} checks{kinks})>"

    def __str__(self):
        title = f"{short(self.name)}: {self.verdict}"
        header = ("", "against", "dtype", "order", "mode", "error", "at", "verdict")
        shown = self._shown()
        rows = []
        for c in shown:
            order, at = str(c.order), short(c.worst)
            rows.append((c.what, c.against, c.dtype, order, c.mode, c.off, at, c.verdict))
        table = [text.table(header, rows)] if rows else []
        hidden = [c for c in self.checks if not c.why and c not in shown]
        if hidden:
            wrong = sum(not c.ok for c in hidden)
            how = f"{wrong} of them WRONG" if wrong else "none of them wrong"
            table.append(f"… and {len(hidden)} more checks, {how}")
        return "\n".join([title, *table, *_some(self.kinks, "kinks"), *_some(self.notes, "notes")])

    def _shown(self) -> list[Check]:
        """As many rows as fit, the wrong ones first, in their order."""
        rows = [c for c in self.checks if not c.why]
        order = sorted(range(len(rows)), key=lambda i: (rows[i].ok, i))
        return [rows[i] for i in sorted(order[:_ROWS])]


def _some(things, what: str) -> list[str]:
    more = [f"… and {len(things) - _LINES} more {what}"] if len(things) > _LINES else []
    return [str(t) for t in things[:_LINES]] + more


class GradientError(AssertionError):
    """A derivative is wrong, or there was none to check.

    `check` is the worst comparison, `report` holds them all.
    """

    def __init__(self, report: Report):
        c = report.worst
        assert c is not None  # an empty report holds nothing wrong
        self.report, self.check = report, c
        if c.why:
            message = f"{short(report.name)} could not be checked: {c}."
        else:
            message = f"{short(report.name)}: {c}."
        super().__init__(f"{message}\n\n{report}")

    def __reduce__(self):
        return GradientError, (self.report,)
