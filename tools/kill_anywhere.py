"""Kill commands with SIGKILL at random moments, run them again, and compare what comes out.

    python tools/kill_anywhere.py [--kills 200] [--commands prune,adapt,shrink,export] [--seed 0]

Each command first runs undisturbed. Then it is started again and again, killed at a moment drawn
from its undisturbed duration, and resumed (``--resume`` where the command has it, else the same
command), which may be killed too. After every kill an output that exists must be whole; at the end
every file must equal the undisturbed one to the byte, but for the card and the report, which state
times. Prints one JSON line a trial and a table; ends with code 1 if anything was lost.

Commands are forks of this process, which has imported the libraries and computed nothing. So a
moment is one of the command's own work. Linux only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUICK = ["--window", "32", "--windows", "12", "--max-cpu-mem", "2GB"]
# They state seconds, memory and dates.
TIMED = {
    *("README.md", "pruning_report.json", "adaptation_report.json", "report.html"),
    "events.jsonl",
}


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        words: Of the command line, without ``--out``.
        out: Name of the output.
        resumes: It has ``--resume``.
    """

    words: list[str]
    out: str
    resumes: bool


def commands(folder: Path) -> dict[str, Command]:
    """Return the commands; each reads what earlier ones have left in ``folder``."""
    prune = ["prune", "example", "--sparsity", "0.3", "--step", "0.15", "--layout", "per-layer"]
    masks = ["--masks", "8", "--mask-windows", "4", "--self-windows", "2", "--refine", "1"]
    pruned = str(folder / "whole-prune")
    adapt = ["adapt", pruned, "--teacher", "example", "--data", "stdlib", "--tokens", "2000"]
    mask = str(folder / "whole-prune" / "pruning_mask.json")
    return {
        "prune": Command([*prune, *masks, *QUICK], "prune", resumes=True),
        "shrink": Command(
            ["shrink", "example", "--mask", mask, "--layout", "per-layer"], "shrink", resumes=False
        ),
        "adapt": Command([*adapt, *QUICK], "adapt", resumes=True),
        "export": Command(["export", pruned, "--format", "gguf"], "model.gguf", resumes=False),
    }


def start(words: list[str], log: Path) -> int:
    """Run a command in a fork and return the process's number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["frugal-bonsai", *words]
        from frugal_bonsai.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(child: int, log: Path) -> None:
    """Wait for a good end."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise RuntimeError(f"ended with {code}: {log.read_text(errors='replace')[-2000:]}")


def contents(out: Path) -> dict[str, str]:
    """Return a hash of each file of an output that must be the same in every run."""
    files = [out] if out.is_file() else sorted(p for p in out.rglob("*") if p.is_file())
    return {
        str(path.relative_to(out.parent)).partition("/")[2] or "file": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in files
        if path.name not in TIMED
    }


class Trials:
    """Trials of one command.

    Args:
        command: The command.
        name: Its name.
        folder: Where it writes.
        draws: Random draws.
    """

    def __init__(self, command: Command, name: str, folder: Path, draws: random.Random) -> None:
        self._command, self._name, self._folder, self._draws = command, name, folder, draws
        self._log = folder / "log.txt"
        whole = folder / ("whole.gguf" if name == "export" else f"whole-{name}")
        began = time.monotonic()
        finish(start([*command.words, "--out", str(whole)], self._log), self._log)
        self.seconds, self._whole = time.monotonic() - began, contents(whole)

    def run(self, most_kills: int) -> dict[str, Any]:
        """Kill, resume and compare once; return the trial's figures."""
        out = self._folder / "killed" / self._command.out
        moments, lost, complete = list[float](), list[str](), 0
        while len(moments) < most_kills and (not moments or self._draws.random() < 0.4):
            if out.exists():
                break
            moment = self._draws.uniform(0, self.seconds)
            child = start(self._words(out, again=bool(moments)), self._log)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            moments.append(round(moment, 3))
            if out.exists():
                complete += 1
                lost += self._differences(out, "after a kill")
        if not out.exists():
            try:
                finish(start(self._words(out, again=True), self._log), self._log)
                lost += self._differences(out, "resumed")
            except RuntimeError as error:
                lost.append(f"resume: {error}")
        left = sorted(p.name for p in out.parent.iterdir() if p != out)
        # A kill right after the output is complete may leave the run directory.
        lost += [f"left behind: {name}" for name in left if not complete]
        shutil.rmtree(out.parent)
        return {"command": self._name, "killed_at": moments, "complete": complete, "lost": lost}

    def _words(self, out: Path, *, again: bool) -> list[str]:
        out.parent.mkdir(exist_ok=True)
        resume = ["--resume"] if again and self._command.resumes else []
        return [*self._command.words, "--out", str(out), *resume]

    def _differences(self, out: Path, when: str) -> list[str]:
        now = contents(out)
        names = sorted({*now, *self._whole})
        return [f"{when}: {n} differs" for n in names if now.get(n) != self._whole.get(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="of all commands together")
    parser.add_argument("--commands", default="prune,adapt,shrink,export")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    names, draws = given.commands.split(","), random.Random(given.seed)
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = commands(folder)
        # The other commands read what prune has written.
        made = {n: Trials(table[n], n, folder, draws) for n in dict.fromkeys(["prune", *names])}
        rows = []
        for name in names:
            kills, left = 0, given.kills // len(names)
            trials = complete = lost = 0
            while kills < left:
                trial = made[name].run(left - kills)
                print(json.dumps(trial), flush=True)
                kills += len(trial["killed_at"])
                trials, complete = trials + 1, complete + trial["complete"]
                lost += bool(trial["lost"])
            rows.append((name, f"{made[name].seconds:.1f}", kills, trials, complete, lost))
            failed |= lost > 0
    print("| command | undisturbed, s | kills | trials | output was whole | trials with a loss |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    sys.exit(failed)


if __name__ == "__main__":
    main()
