"""frugal-bonsai: structured pruning of language models with forward passes only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frugal_bonsai.rewrite.load import load_pruned
    from frugal_bonsai.run.adapt import adapt
    from frugal_bonsai.run.adapt_plan import plan_adapt
    from frugal_bonsai.run.bench import bench
    from frugal_bonsai.run.evaluate import evaluate
    from frugal_bonsai.run.export import export_gguf
    from frugal_bonsai.run.inspect import inspect
    from frugal_bonsai.run.options import AdaptOptions, BenchOptions, PruneOptions
    from frugal_bonsai.run.plan import plan
    from frugal_bonsai.run.profile import profile
    from frugal_bonsai.run.prune import prune
    from frugal_bonsai.run.report import report_page
    from frugal_bonsai.run.runs import list_runs
    from frugal_bonsai.run.shrink import shrink
    from frugal_bonsai.text.windows import load_tokenizer

__all__ = [
    "AdaptOptions",
    "BenchOptions",
    "EvalOptions",
    "PruneOptions",
    "adapt",
    "bench",
    "evaluate",
    "export_gguf",
    "inspect",
    "list_runs",
    "load_pruned",
    "load_tokenizer",
    "plan",
    "plan_adapt",
    "profile",
    "prune",
    "report_page",
    "shrink",
]

# Public name -> its module, which is imported when the name is first used. `import frugal_bonsai`
# and `frugal-bonsai --help` therefore do not import torch.
_HOMES = {
    "AdaptOptions": "frugal_bonsai.run.options",
    "BenchOptions": "frugal_bonsai.run.options",
    "EvalOptions": "frugal_bonsai.run.options",
    "PruneOptions": "frugal_bonsai.run.options",
    "adapt": "frugal_bonsai.run.adapt",
    "bench": "frugal_bonsai.run.bench",
    "evaluate": "frugal_bonsai.run.evaluate",
    "export_gguf": "frugal_bonsai.run.export",
    "inspect": "frugal_bonsai.run.inspect",
    "list_runs": "frugal_bonsai.run.runs",
    "load_pruned": "frugal_bonsai.rewrite.load",
    "load_tokenizer": "frugal_bonsai.text.windows",
    "plan": "frugal_bonsai.run.plan",
    "plan_adapt": "frugal_bonsai.run.adapt_plan",
    "profile": "frugal_bonsai.run.profile",
    "prune": "frugal_bonsai.run.prune",
    "report_page": "frugal_bonsai.run.report",
    "shrink": "frugal_bonsai.run.shrink",
}


def __getattr__(name: str) -> Any:
    """Return a public name, importing its module at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return all public names, imported or not."""
    return sorted({*globals(), *_HOMES})
