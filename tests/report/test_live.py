"""Progress: plain lines and the live display."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from frugal_bonsai.progress import Progress
from frugal_bonsai.report import tracker
from frugal_bonsai.report.live import LiveProgress, PlainProgress, make_progress
from frugal_bonsai.report.tracker import Tracker

GIB = 2**30
SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def readings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Resident memory is a gibibyte and a half; how often it was read."""
    read: list[int] = []

    def resident_bytes() -> int:
        read.append(1)
        return 3 * GIB // 2

    monkeypatch.setattr(tracker, "resident_bytes", resident_bytes)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return read


def plain() -> tuple[PlainProgress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress(stream, clock=clock)
    progress.caps(2 * GIB, None)
    return progress, stream, clock


def test_more_steps_than_were_announced_are_counted_alone() -> None:
    clock = Clock()
    tracker = Tracker(clock)
    for announced, expected in ((0, "4 steps"), (1, "4 steps, 2 tokens/s"), (4, "4 of 4 steps")):
        tracker.sweep("adapting", announced, 8 * announced)
        for _ in range(4):
            clock.now += 4.0
            tracker.step("step")
        assert tracker.sweep_text().startswith(expected) and "left" not in tracker.sweep_text()
        assert tracker.finished == (announced == 4)
        assert tracker.sweep_share == (1.0 if announced else 0.0)


def test_a_round_and_a_finished_sweep_are_a_line_each() -> None:
    progress, stream, clock = plain()
    progress.round(3, 10, 0.1)
    progress.sweep("masks", 4, 8000)
    for layer in range(4):
        clock.now += 1
        progress.step(f"layer {layer}")
    assert stream.getvalue().splitlines() == [
        "round 3 of 10, 10.0% removed, memory 1.50 of 2.00 GiB",
        "  masks: 4 of 4 layers, 2,000 tokens/s, in 4 s, memory 1.50 of 2.00 GiB",
    ]


def test_inside_a_long_sweep_at_most_a_line_every_five_seconds() -> None:
    progress, stream, clock = plain()
    progress.sweep("statistics", 100, 1000)
    for layer in range(99):
        clock.now += 0.5
        progress.step(f"layer {layer}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 9
    assert lines[0] == (
        "  statistics: 10 of 100 layers, 20 tokens/s, 45 s left, memory 1.50 of 2.00 GiB"
    )


def test_time_left_of_the_run_is_estimated_from_finished_rounds() -> None:
    progress, stream, clock = plain()
    progress.round(4, 10, 0.15)  # resumed: rounds 1 to 3 were not timed
    clock.now += 1200
    progress.round(5, 10, 0.2)
    clock.now += 600
    progress.sweep("masks", 4, 0)
    clock.now += 6
    progress.step("layer 0")
    first, second, inside = stream.getvalue().splitlines()
    assert "of rounds left" not in first
    assert "round 5 of 10, 20.0% removed, about 2.0 h of rounds left" in second
    assert "about 110 min of rounds left" in inside or "about 1.8 h of rounds left" in inside
    assert "tokens/s" not in inside and "18 s left" in inside


def test_plain_lines_hold_no_control_characters_and_fit_the_encoding() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    progress = PlainProgress(stream)
    progress.note("two\nlines \x1b[31mred\r caf\u00e9")
    progress.sweep("perplexity on a\x07b.txt", 1, 10)
    progress.step("layer 0")
    text = raw.getvalue().decode("ascii")
    assert text.splitlines()[:2] == ["two", "lines \\x1b[31mred\\r caf\\xe9"]
    assert "a\\x07b.txt" in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_a_sweep_without_steps_and_a_step_without_a_sweep_do_no_harm() -> None:
    progress, stream, _ = plain()
    progress.step("layer 0")
    progress.sweep("nothing", 0, 0)
    progress.step("")
    assert stream.getvalue() == ""  # an unknown number of steps is never at its end


def test_memory_is_read_at_most_twice_a_second(readings: list[int]) -> None:
    clock = Clock()
    tracker = Tracker(clock)
    tracker.caps(2 * GIB, None)
    for _ in range(100):
        clock.now += 0.0101
        assert tracker.memory_text() == "memory 1.50 of 2.00 GiB"
    assert len(readings) == 2


def test_on_a_gpu_its_memory_stands_beside_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "reserved_gpu_bytes", lambda: 3 * GIB)
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.caps(2 * GIB, 24 * GIB)
    progress.round(1, 10, 0.0)
    expected = "memory 1.50 of 2.00 GiB, GPU 3.00 of 24.00 GiB"
    assert stream.getvalue() == f"round 1 of 10, 0.0% removed, {expected}\n"


def test_a_pipe_gets_plain_lines_and_a_terminal_the_display(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with make_progress(io.StringIO()) as progress:
        assert isinstance(progress, PlainProgress)
    with make_progress(Terminal()) as progress:
        assert isinstance(progress, LiveProgress)
    monkeypatch.setenv("TERM", "dumb")
    with make_progress(Terminal()) as progress:
        assert isinstance(progress, PlainProgress)
    # Colours that are forced do not make a terminal of a pipe.
    monkeypatch.setenv("FORCE_COLOR", "1")
    with make_progress(io.StringIO()) as progress:
        assert isinstance(progress, PlainProgress)


def test_the_default_is_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with make_progress() as progress:
        progress.note("said")
    captured = capsys.readouterr()
    assert captured.err == "said\n" and captured.out == ""


def shown(work: Callable[[Progress], None]) -> str:
    """What the live display wrote, without its control sequences."""
    stream = Terminal()
    with LiveProgress(stream) as progress:
        progress.caps(2 * GIB, None)
        work(progress)
        progress._live.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_the_display_shows_round_sweep_rate_and_memory() -> None:
    def work(progress: Progress) -> None:
        progress.round(3, 10, 0.1)
        progress.sweep("recovery", 32, 5000)
        progress.step("layer 0")

    text = shown(work)
    assert "round 3 of 10, 10.0% removed" in text
    assert "recovery" in text and "1 of 32 layers" in text and "tokens/s" in text
    assert "memory 1.50 of 2.00 GiB" in text


def test_the_display_cuts_a_long_name_and_no_figure_at_80_columns() -> None:
    def work(progress: Progress) -> None:
        progress.sweep("pruned: perplexity on file " + "x" * 90 + ".txt", 80, 123_456_789)
        for layer in range(12):
            progress.step(f"layer {layer}")

    text = shown(work)
    line = [line for line in re.split(r"[\r\n]+", text) if "12 of 80" in line][-1]
    assert re.search(r"12 of 80 layers, [\d,]+ tokens/s, \d+ s left", line)
    assert len(line) <= 80 and "\u2026" in line


def test_notes_stand_above_the_display_as_they_are() -> None:
    text = shown(lambda progress: progress.note("see [red]dir[/red] :smile:\nand more"))
    assert "see [red]dir[/red] :smile:" in text and "and more" in text
    assert text.rindex("and more") < text.rindex("memory")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_terminal_is_restored_whatever_happens(error: type[BaseException]) -> None:
    stream, before = Terminal(), (sys.stdout, sys.stderr)
    with pytest.raises(error), make_progress(stream) as progress:
        progress.sweep("masks", 4, 10)
        raise error
    assert HIDE_CURSOR in stream.getvalue()
    assert stream.getvalue().rindex(SHOW_CURSOR) > stream.getvalue().rindex(HIDE_CURSOR)
    assert (sys.stdout, sys.stderr) == before


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, io\n"
        "from frugal_bonsai.report import card, live, sheet, tables, words\n"
        "with live.make_progress(io.StringIO()) as p: p.round(1, 2, 0.0)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
