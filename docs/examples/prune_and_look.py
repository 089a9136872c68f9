# %% [markdown]
# # Prune a model and look at the result
#
# Each block that begins with `# %%` is a cell: Jupyter (with jupytext), VS Code and PyCharm open
# this file as a notebook. As a script: `python docs/examples/prune_and_look.py OUT`.

# %%
import sys
from pathlib import Path

import frugal_bonsai

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "out/notebook")

# %% What would it need? Nothing is run.
plan = frugal_bonsai.plan("example", sparsity=0.3, windows=8, window=128, max_cpu_mem="3GB")
print(f"peak: {plan['totals']['host'] / 1e6:.0f} MB, about {plan['seconds']:.0f} s")

# %% Prune. In a notebook a bar shows progress; progress=False shows none.
summary = frugal_bonsai.prune(
    "example",
    OUT / "pruned",
    sparsity=0.3,
    method="local-only",
    windows=8,
    window=128,
    self_windows=0,
    refine=0,
    max_cpu_mem="3GB",
)
for when in ("before", "after"):
    figures = summary[when]
    print(f"{when}: {figures['parameters']:,} parameters, perplexity {figures['perplexity']:.2f}")

# %% Which layers lost most?
for layer, share in enumerate(summary["layer_sparsity"]):
    print(f"layer {layer}: {share:6.1%} {'#' * round(40 * share)}")

# %% Measure on other text, and generate.
measured = frugal_bonsai.evaluate(
    str(OUT / "pruned"), text="stdlib", window=128, windows=4, max_cpu_mem="3GB"
)
print(f"perplexity of other text: {measured['perplexity']:.2f}")

model = frugal_bonsai.load_pruned(OUT / "pruned")
tokenizer = frugal_bonsai.load_tokenizer(OUT / "pruned")
prompt = tokenizer("Return the number of", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))

# %% The page on this prune (matplotlib draws its figures; Markdown needs none).
print(frugal_bonsai.report_page(OUT / "pruned", kind="md")[:200])
