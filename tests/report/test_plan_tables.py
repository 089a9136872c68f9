"""What ``plan`` prints: the verdict first, figures whole."""

from __future__ import annotations

from plans import PLAN, PROFILE
from test_tables import printed, row, words

from frugal_bonsai.report.plan_tables import render_plan, render_profile


def test_the_first_lines_say_whether_and_how_it_will_work() -> None:
    text = printed(render_plan, PLAN)
    flat = words(text)
    assert "org/base-7b (llama, 6.7 billion parameters) on Some GPU 48GB" in flat
    assert "fits: GPU memory 5.00 GiB of 24.00 GiB (21%), host memory 768.00 MiB" in flat
    assert (
        "of 8.00 GiB (9%), disk 13.00 GiB; most in masked evaluation: layers, largest: logits"
        in flat
    )
    assert "time: about 2.0 h; the disk sets the pace" in flat
    # Verdict, phases and the roofline, before the items.
    verdict = text.split("memory items")[0]
    assert len(verdict.rstrip().splitlines()) <= 10
    masked = ["disk", "2.0 h", "83 min", "< 1 s", "2.0 h", "30 s"]
    assert row(text, "masked evaluation")[1:] == masked
    assert row(text, "building stores")[1:] == ["disk", "2 min", "-", "20 s", "2 min", "-"]
    assert row(text, "in all")[1:] == ["disk", "2.0 h", "83 min", "20 s", "2.0 h", "30 s"]


def test_items_and_work() -> None:
    text = printed(render_plan, PLAN)
    assert row(text, "logits") == ["logits", "gpu", "tokens * v * 8", "5.00 GiB"]
    assert "[int8]" in text
    flat = words(text)
    assert (
        "98,765,432 forward tokens at most, masks in int8 arithmetic" in flat
        and "rates: measured now" in flat
    )
    assert "note: the text is sampled first" in flat


def test_a_plan_that_does_not_fit_says_what_to_raise() -> None:
    plan = {**PLAN, "caps": {"host": 8 * 2**30, "gpu": 4 * 2**30}}
    text = words(printed(render_plan, plan))
    assert "does NOT fit, raise --max-gpu-mem:" in text and "125%" in text


def test_a_cpu_has_no_gpu_and_copies_nothing() -> None:
    totals = {"host": 2**30, "gpu": 0, "disk": 2**30}
    phases = [{**phase, "copy": 0.0} for phase in PLAN["phases"]]
    plan = {**PLAN, "caps": {"host": 2**31, "gpu": None}, "totals": totals, "items": []}
    text = printed(render_plan, {**plan, "device_name": "a CPU", "phases": phases})
    assert "GPU" not in text and "gpu" not in text and "copy" not in text and "50%" in text


def test_parameters_as_people_say_them() -> None:
    for count, said in ((70_553_706_496, "70.6 billion"), (3_443_136, "3.4 million"), (999, "999")):
        assert f"{said} parameters" in words(printed(render_plan, {**PLAN, "parameters": count}))


def test_a_profiles_rates() -> None:
    text = printed(render_profile, PROFILE)
    assert row(text, "GPU memory")[-1] == "48.00 GiB"
    assert row(text, "disk, cold read")[-1] == "3.46 GB/s"
    assert row(text, "host to GPU, pinned")[-1] == "25.4 GB/s"
    assert row(text, "matrix products, bf16")[-1] == "108 Tflop/s"
    assert row(text, "a layer call")[-1] == "0.96 ms"
    slow = printed(render_profile, {**PROFILE, "call_seconds": 2e-6, "products": {"fp32": 4.2e8}})
    assert row(slow, "matrix products, fp32")[-1] == "420 Mflop/s"  # not zero
    assert row(slow, "a layer call")[-1] == "0.002 ms"
    assert "new blocks" not in text and "a file of 1.00 GiB" in words(text)
    cpu = {**PROFILE, "gpu_bytes": None, "copy_bytes_per_second": None}
    text = printed(render_profile, {**cpu, "name": "a CPU", "fresh_bytes_per_second": 2.8e9})
    assert "GPU" not in text and row(text, "memory, first write")[-1] == "2.80 GB/s"
