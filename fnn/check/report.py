"""What a gradient check found: a table, and the error that holds it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Kink:
    """A place where the function has no derivative: its slopes to either side differ.

    where: the entry of the arguments, such as `x[0, 3]`.
    left, right: the one-sided differences by it of the sum of the results; not finite at the
        edge of the function's domain.
    rule: what the rule says instead of them.
    """

    where: str
    left: float
    right: float
    rule: float

    def __str__(self):
        left, right = (f"{slope + 0.0:.6g}" for slope in (self.left, self.right))
        return (
            f"kink at {self.where}: slope {left} on the left, {right} on the right; "
            f"the rule says {self.rule:.6g}"
        )


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison of all entries of two arrays.

    what: the quantity, such as "gradient, vmapped".
    against: "autodiff" (of the plain definition), "differences", or what else is the measure.
    order: of the derivative, 0 for values.
    mode: "reverse", "forward", "forward over reverse", ...
    error: the largest relative error over the entries without a kink.
    worst: the entry it occurs at, such as `W[1, 2]`, or "" if there is none.
    rule, reference: the two numbers there.
    tolerance: what the error may be.
    kinks: how many entries were left out.
    skipped: why it was not done, or "".
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

    @property
    def verdict(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        kinks = f", {self.kinks} at kinks" if self.kinks else ""
        return ("ok" if self.ok else "WRONG") + kinks


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `check_rule` and `check_grads` found; prints as a table, one row a check.

    name: of the function.
    checks: in the order they were made.
    kinks: the places without a derivative.
    notes: what else the reader should know, such as that only a sample was checked.
    """

    name: str
    checks: tuple[Check, ...]
    kinks: tuple[Kink, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The first wrong check of the lowest order; if none is wrong, that of largest error."""
        wrong = [c for c in self.checks if not c.ok]
        if wrong:
            return min(wrong, key=lambda c: c.order)
        return max(self.checks, key=lambda c: c.error, default=None)

    def __repr__(self):
        result = "all pass" if self.ok else "WRONG"
        return f"<Report of {self.name}: {len(self.checks)} checks, {result}>"

    def __str__(self):
        header = ("", "against", "dtype", "order", "mode", "error", "at", "verdict")
        rows = [header]
        for c in self.checks:
            error = "" if c.skipped else f"{c.error:.1e}"
            order = str(c.order)
            rows.append((c.what, c.against, c.dtype, order, c.mode, error, c.worst, c.verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        title = f"{self.name}: {'all checks pass' if self.ok else 'WRONG'}"
        rule = "─" * max(map(len, lines))
        below = [str(k) for k in self.kinks[:10]]
        if len(self.kinks) > 10:
            below.append(f"... and {len(self.kinks) - 10} more kinks")
        return "\n".join([title, lines[0], rule, *lines[1:], *below, *self.notes])


class GradientError(AssertionError):
    """A derivative is wrong. `check` is the worst comparison, `report` holds them all."""

    def __init__(self, report: Report):
        c = report.worst
        assert c is not None  # an empty report holds nothing wrong
        self.report, self.check = report, c
        super().__init__(
            f"{report.name}: the {c.what} ({c.mode}, order {c.order}, {c.dtype}) is wrong. At "
            f"{c.worst} it is {c.rule:.9g} but should be {c.reference:.9g} by {c.against} "
            f"(relative error {c.error:.2g}, tolerance {c.tolerance:.2g}).\n\n{report}"
        )
