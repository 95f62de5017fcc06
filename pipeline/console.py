"""What a person sees: progress while work runs, tables when it is done, one line when it fails."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""

CELL = 80
"""Characters of a value that a table shows."""

error_console = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """A line for people, on stderr, so that stdout stays for results."""
    error_console.print(line, markup=False, soft_wrap=True)


def say_result(result: Any, as_json: bool, said: str) -> None:
    """Print a result on stdout, as JSON or as `said` tells it."""
    print(json.dumps(result) if as_json else said.format(**result))


@contextmanager
def stoppable(deadline: float | None) -> Iterator[Callable[[], tuple[str, int] | None]]:
    """Turn SIGTERM, Ctrl-C and a deadline into a wish to end, so that what is in hand can be finished.

    A second Ctrl-C ends at once.

    Parameters
    ----------
    deadline : float or None
        By `time.monotonic`.

    Yields
    ------
    callable
        Says whether to end: why, and with which exit code.
    """
    told: list[tuple[str, int]] = []

    def on_signal(number: int, frame: object) -> None:
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.append(("interrupted", 130) if number == signal.SIGINT else ("terminated", 143))

    def stopped() -> tuple[str, int] | None:
        if not told and deadline is not None and time.monotonic() >= deadline:
            told.append(("time is up (--max-seconds)", 7))
        return told[0] if told else None

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, else a line now and then; both on stderr.

    Yields
    ------
    callable
        To be called with what is done, what there is to do, and if known how busy the stages are.
    """
    # From the first call on, since models are loaded before it.
    first: list[tuple[float, int]] = []

    def rate_of(done: int) -> float:
        if not first:
            first.append((time.monotonic(), done))
        return (done - first[0][1]) / max(time.monotonic() - first[0][0], 1e-9)

    if not error_console.is_terminal:
        last = time.monotonic()

        def line(done: int, total: int, busy: str = "") -> None:
            nonlocal last
            now, rate = time.monotonic(), rate_of(done)
            if (now - last >= LINE_EVERY and rate) or done == total:
                last = now
                left = (total - done) / max(rate, 1e-9)
                say(f"{what}: {done:,} of {total:,} ({rate:,.0f}/s, {left:,.0f} s left{busy and f'; {busy}'})")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[busy]}"),
    )
    with Progress(*columns, console=error_console, transient=True) as bar:
        task = bar.add_task(what, total=None, rate="", busy="")

        def draw(done: int, total: int, busy: str = "") -> None:
            bar.update(task, completed=done, total=total, rate=f"{rate_of(done):,.0f}/s", busy=busy)

        yield draw


def table(columns: list[str], rows: list[tuple[Any, ...]], title: str | None = None) -> None:
    """Print a table on stdout; numbers to the right, nothing cut off where stdout is no terminal."""
    drawn = Table(box=None, pad_edge=False)
    for place, column in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[place]) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        # Data is no markup: a folder may be called "photos [test]".
        drawn.add_row(*(Text(str(cell)) for cell in row))
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = max(
            console.width, sum(max(len(str(row[n])) for row in [columns, *rows]) + 3 for n in range(len(columns)))
        )
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(drawn)


def short(cell: Any) -> str:
    """A value as a cell that fits on a line: numbers with few digits, of long texts and lists the beginning."""
    if isinstance(cell, float):
        return f"{cell:.6g}"
    if isinstance(cell, list):
        return f"[{', '.join(map(short, cell[:4]))}{', …' if len(cell) > 4 else ''}]"
    text = "" if cell is None else " ".join(str(cell).split())
    return text if len(text) <= CELL else f"{text[: CELL - 1]}…"


def _is_number(cell: Any) -> bool:
    return str(cell) in ("", "-", "undefined") or str(cell).lstrip("-")[:1].isdigit()
