"""Compare ``adapt`` with distillation that holds teacher and student in memory.

Both use the same windows, order, rank, loss weights, schedule and seed. The reference is plain
transformers and peft with the teacher's whole distribution; the same trainer drives its steps. Each
runs in a fresh process, one after the other, and reports its perplexity, its peak memory, and its
memory after imports.

    python tools/bench_adapt.py [--dtype float32] [--summary FILE] -- ADAPT'S OWN WORDS

``--summary`` reads the output of an earlier ``adapt ... --json`` with the same words instead of
running it again. Then name the ``--teacher-cache`` that holds its sampled windows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from frugal_bonsai.adaptation.objective import Sums
from frugal_bonsai.adaptation.settings import AdaptSettings, Objective
from frugal_bonsai.adaptation.state import TrainingFolder
from frugal_bonsai.adaptation.student import Student
from frugal_bonsai.adaptation.train import Trainer
from frugal_bonsai.adaptation.training_data import MicroBatch, TrainingData
from frugal_bonsai.checkpoint.locate import find_model
from frugal_bonsai.dtypes import TORCH_NAMES
from frugal_bonsai.memory.meter import peak_resident_bytes
from frugal_bonsai.memory.work import BASE
from frugal_bonsai.progress import Silent
from frugal_bonsai.rewrite.load import load_pruned
from frugal_bonsai.run.engine import LATE_BYTES
from frugal_bonsai.run.open import open_model
from frugal_bonsai.sizes import MIB


class ResidentStudent:
    """Stands where :class:`frugal_bonsai.adaptation.student.Student` does.

    Both models are in memory.
    """

    def __init__(self, student: Any, teacher: Any | None, opened: Any) -> None:
        self.spec, self.checkpoint = opened.spec, opened.checkpoint
        self._student, self._teacher = student, teacher

    def gradients(self, parts: list[MicroBatch], objective: Objective, *, scale: float) -> Sums:
        """Add the gradients of ``scale`` times the loss."""
        total = Sums()
        for part in parts:
            loss, sums = self._loss(part, objective)
            (loss * scale).backward()
            total.add(sums)
        return total

    @torch.no_grad()
    def measure(self, parts: list[MicroBatch], objective: Objective) -> Sums:
        """The sums alone."""
        total = Sums()
        for part in parts:
            total.add(self._loss(part, objective)[1])
        return total

    def _loss(self, part: MicroBatch, objective: Objective) -> tuple[torch.Tensor, Sums]:
        logits = self._student(part.tokens_BS).logits[:, :-1].float().flatten(0, 1)
        following = part.tokens_BS[:, 1:].flatten()
        nll = torch.nn.functional.cross_entropy(logits, following, reduction="sum")
        sums = Sums(tokens=following.numel(), lm=float(nll.detach()))
        loss = objective.lm * nll
        if self._teacher is not None:
            with torch.no_grad():
                wanted = self._teacher(part.tokens_BS).logits[:, :-1].float().flatten(0, 1)
            heat = objective.temperature
            kl = torch.nn.functional.kl_div(
                (logits / heat).log_softmax(-1),
                (wanted / heat).log_softmax(-1),
                reduction="sum",
                log_target=True,
            )
            sums.kl = sums.kl_upper = float(kl.detach())
            loss = loss + objective.kl * heat**2 * kl
        return loss, sums


def load(folder: str, dtype: torch.dtype) -> Any:
    """A model as users load it, dense or pruned."""
    return load_pruned(folder, dtype=dtype).eval()


def with_adapters(model: Any, opened: Any, settings: AdaptSettings) -> Any:
    """LoRA by peft on the projections that ``adapt`` trains, in fp32."""
    import peft

    owned = {p.tensor for group in opened.spec.table.groups for p in group.slices}
    targets = sorted(
        {n.removesuffix(".weight").rpartition(".")[2] for n in owned if "bias" not in n}
    )
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=targets
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True)


@torch.no_grad()
def perplexity(model: Any, windows_NS: torch.Tensor) -> float:
    """exp(mean NLL of tokens 2..S)."""
    total = 0.0
    for tokens_S in windows_NS:
        logits = model(tokens_S[None]).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens_S[1:], reduction="sum"))
    return float(torch.tensor(total / windows_NS[:, 1:].numel()).exp())


def reference(job_file: Path) -> dict[str, Any]:
    """Train the reference and return its figures. Runs in a separate process."""
    import peft  # noqa: F401  # imported before memory is read

    job = torch.load(job_file)
    settings, dtype = AdaptSettings(**job["settings"]), getattr(torch, job["dtype"])
    imported = peak_resident_bytes()
    with open_model(job["pruned"]) as opened, tempfile.TemporaryDirectory() as folder:
        objective = settings.objective(job["temperature"])
        teacher = load(job["teacher"], dtype) if objective.needs_teacher else None
        model = with_adapters(load(job["pruned"], dtype), opened, settings)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        trainer = Trainer(
            cast(Student, ResidentStudent(model, teacher, opened)),
            parameters,
            TrainingData(windows_NS=job["windows_NS"], held_out=job["held_out"]),
            settings,
            objective,
            micro_batch=job["micro_batch"],
            folder=TrainingFolder(Path(folder), {}),
            progress=Silent(),
        )
        done = trainer.run()
        peak = peak_resident_bytes()
        # As `adapt` writes it: merged, rounded to the checkpoint's dtype.
        merged = model.merge_and_unload().to(getattr(torch, job["stored"])).to(dtype)
        eval_NS = job["eval_NS"]
        on_text = None if eval_NS is None else perplexity(merged, eval_NS)
    return {
        "before": done.before["perplexity"],
        "held_out": done.after["perplexity"],
        "eval": on_text,
        "seconds": done.seconds,
        "imported_bytes": imported,
        "peak_bytes": peak,
    }


def prepare(words: list[str], summary: dict[str, Any], dtype: str, path: Path) -> None:
    """Write what the reference needs: the windows and settings of the run that was summed up."""
    from frugal_bonsai.cli.adapt import adapt_command
    from frugal_bonsai.run.adapt_plan import plan_adaptation
    from frugal_bonsai.run.adaptation import prepare_adaptation
    from frugal_bonsai.run.keywords import adapt_options
    from frugal_bonsai.run.training_data import make_training_data

    given = adapt_command.make_context("adapt", list(words)).params
    pruned = given.pop("pruned")
    for name in ("out", "dry_run", "resume", "overwrite", "as_json", "threads"):
        given.pop(name)
    options = adapt_options(given)
    with ExitStack() as stack:
        job = prepare_adaptation(pruned, options, path.parent, stack=stack, progress=Silent())
        teacher_plan = plan_adaptation(job).teacher
        data = make_training_data(replace(job, teacher_settings=None), teacher_plan)
        stored = {entry.dtype for entry in job.pruned.checkpoint.tensors.values()}
        torch.save(
            {
                "pruned": str(find_model(pruned)),
                "teacher": None if options.teacher is None else str(find_model(options.teacher)),
                "settings": summary["settings"],
                "temperature": options.temperature,
                "windows_NS": data.windows_NS,
                "held_out": data.held_out,
                "eval_NS": None if job.eval_text is None else job.eval_text[1],
                "micro_batch": summary["training"]["micro_batch"],
                "dtype": dtype,
                "stored": TORCH_NAMES[min(stored)],
            },
            path,
        )


def run_json(command: list[str]) -> dict[str, Any]:
    """Run a command in a fresh process; the JSON object of its last line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def of_adapt(summary: dict[str, Any]) -> dict[str, Any]:
    """The same figures of a run of ``adapt``."""
    memory = summary["memory"]
    items = [item for plan in memory["plans"].values() for item in plan["items"]]
    return {
        "before": summary["before"]["perplexity"],
        "held_out": summary["after"]["perplexity"],
        "eval": summary["after"]["eval_perplexity"],
        "seconds": summary["training"]["seconds"],
        "imported_bytes": max(i["size_bytes"] for i in items if i["name"] == BASE) - LATE_BYTES,
        "peak_bytes": memory["host_peak_bytes"],
        "predicted_bytes": memory["host_predicted_bytes"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of all figures."""
    lines = [
        "| | perplexity, text | held-out | training, s | peak MiB | of that after imports |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        text = "-" if row["eval"] is None else f"{row['eval']:.3f}"
        sizes = [f"{row[key] / MIB:,.0f}" for key in ("peak_bytes", "imported_bytes")]
        lines.append(
            f"| {name} | {text} | {row['held_out']:.3f} | {row['seconds']:.0f} | "
            f"{' | '.join(sizes)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", help="of the reference's two models")
    parser.add_argument("--summary", type=Path, help="of a run of adapt with the same words")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help="adapt's own, behind --")
    given = parser.parse_args()
    if given.reference is not None:
        print(json.dumps(reference(given.reference)))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        if given.summary is not None:
            summary = json.loads(given.summary.read_text(encoding="utf-8"))
        else:
            words = [*given.words, "--out", str(Path(folder) / "adapted"), "--json"]
            summary = run_json([sys.executable, "-m", "frugal_bonsai", "adapt", *words])
        job = Path(folder) / "job.pt"
        prepare(given.words, summary, given.dtype, job)
        rows = {"`adapt`": of_adapt(summary)}
        rows["both models resident"] = run_json([sys.executable, __file__, "--reference", str(job)])
    print(json.dumps(rows), file=sys.stderr)
    print(table(rows))
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
