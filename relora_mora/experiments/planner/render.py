"""A plan as text for a terminal: an answer in three lines, or its tables. No line has more than 100 columns."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from relora_mora.experiments.planner.plan import Plan
from relora_mora.sizing.fit import USABLE
from relora_mora.sizing.memory import PARTS
from relora_mora.system.hardware import host_memory_bytes

COLUMNS = 100
HOST = ("host_base", "host_checkpoint", "host_start")
SENT = ("all_reduced", "reduced", "gathered", "exchanged", "sent")
TIMES = ("compute", "optimizer", "network", "hidden", "seconds")


def answer(plan: Plan) -> str:
    """Whether the run fits, how long it takes and what it sends, each in a line; and what the plan assumes."""
    time = (
        f"{duration(plan['seconds'])} on {plan['world_size']} {plan['cluster']['device']['name']} for "
        f"{_rounded(plan['tokens'])} tokens: {_rounded(plan['tokens_per_second'])} tokens/s {plan['basis']}"
    )
    return _lines([_verdict(plan), time, _sent(plan), *(f"note: {note}" for note in plan["notes"])])


def _verdict(plan: Plan) -> str:
    """Whether the run fits."""
    device, stage = plan["cluster"]["device"], plan["zero_stage"]
    memory = plan["memory"][stage]
    if plan["resident"] is not None:
        host = host_memory_bytes()
        verdict = "fits" if plan["resident"] * plan["cluster"]["devices_per_node"] <= host else "does NOT fit"
        here = f"this host has {_gib(host)} GiB (for GPUs: --device=a100)"
        return f"{verdict}: {_gib(plan['resident'])} GiB for each process; {here}"
    needed, name = _gib(memory["device"]), device["name"]
    if memory["fits"] is None:
        return f"needs {needed} GiB on each {name} at ZeRO {stage}; its memory is not known"
    sizes = f"{needed} of {_gib(device['memory_gb'] * 1e9)} GiB on each {name} at ZeRO {stage}"
    if memory["fits"]:
        host = memory["host_base"] * plan["cluster"]["devices_per_node"]
        return f"fits: {sizes}" + (f", and {_gib(host)} GiB in host memory" if host else "")
    others = [other for other, each in plan["memory"].items() if each["fits"]]
    return f"does NOT fit: {sizes}" + (f"; it fits with --train.zero_stage={others[0]}" if others else "")


def _sent(plan: Plan) -> str:
    """What a step sends, and over which links."""
    step = plan["steps"][plan["zero_stage"]]
    if plan["world_size"] == 1:
        return "sends nothing: there is one device"
    if plan["cluster"]["nodes"] == 1:
        return f"{_gb(step['sent'])} GB per step from each device, within the host"
    waits = f"{step['network'] - step['hidden']:.3g} of {step['seconds']:.3g} s of a step wait for it"
    return f"{_gb(step['sent'])} GB per step between hosts: {waits}"


def tables(plan: Plan) -> str:
    """The answer, and all numbers in tables with a column for each ZeRO stage."""
    names = ("method", "parameters", "flops", "matrices", "others", "optimizer_flops", "tokens_per_step", "assumption")
    leaves_out = (
        f"Memory leaves out the CUDA context, fragmentation and Python itself, so a run fits if it takes {USABLE:.0%} "
        "of a device. Time leaves out evaluations, checkpoints and merges."
    )
    parts = [
        answer(plan),
        _lines([f"{name.replace('_', ' ')}: {_shown(plan[name])}" for name in (*names, "cluster")]),
        f"GiB of a device in {'bf16' if plan['bf16'] else 'fp32'}, at the peak of a step",
        _table(plan, "memory", dict.fromkeys((*PARTS, "device", *HOST), _gib) | {"phase": str}),
        "a step: GB of tensors, what a device sends, and seconds",
        _table(plan, "steps", dict.fromkeys(SENT, _gb) | dict.fromkeys(TIMES, "{:.3g}".format)),
        _lines([leaves_out]),
    ]
    return "\n\n".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_shown(each)}" for key, each in value.items() if each)
    return value if isinstance(value, str) else f"{value:,.{0 if value % 1 == 0 else 3}f}"


def _table(plan: Plan, what: str, rows: Mapping[str, Callable[[Any], str]]) -> str:
    """The rows that are not all zero, in a column for each stage."""
    heads = [
        f"{stage}{'*' * (stage == plan['zero_stage'])}{' too large' * (memory['fits'] is False)}"
        for stage, memory in plan["memory"].items()
    ]
    cells = {"ZeRO stage (* in the settings)": heads}
    for name, show in rows.items():
        if any(values := [stage[name] for stage in plan[what].values()]):
            cells[name.replace("_", " ")] = [*map(show, values)]
    return "\n".join(name.ljust(32) + "".join(cell.rjust(17) for cell in row) for name, row in cells.items())


def _lines(texts: list[str]) -> str:
    """Lines that are wrapped if they are too long; a table's never are."""
    return "\n".join(textwrap.fill(text, COLUMNS, subsequent_indent="  ") for text in texts)


def duration(seconds: float) -> str:
    """Such as 5.1 min, 31 h, 3.2 days or 2.5 years."""
    for unit, size, least in (("years", 365 * 86400, 2), ("days", 86400, 2), ("h", 3600, 1), ("min", 60, 1)):
        if seconds >= least * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.2g} s"


def _rounded(number: float) -> str:
    """Three digits of a large number, in words."""
    for size, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:,.0f}"


def _gib(size: float) -> str:
    return _gb(size * 1e9 / 2**30)


def _gb(size: float) -> str:
    """GB with three digits."""
    return "-" if size == 0 else f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"
