"""A plan as text for a terminal: an answer in three lines, or its tables. No line has more than 100 columns."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relora_mora.experiments.planner.plan import ASSUMED_UTILIZATION, STAGES, Plan
from relora_mora.sizing.fit import USABLE
from relora_mora.sizing.memory import PARTS
from relora_mora.system.hardware import host_memory_bytes

COLUMNS = 100
Rows = dict[str, list[str]]


def answer(plan: Plan) -> str:
    """Whether the run fits, how long it takes and what it sends, each in a line; and what the plan assumes."""
    devices = f"{plan.cluster.world_size} {plan.cluster.device.name}"
    basis = f"at {plan.utilization or ASSUMED_UTILIZATION:.0%} of the peak" if plan.measured is None else "as measured"
    time = f"{duration(plan.seconds)} on {devices} for {_rounded(plan.tokens)} tokens: "
    time += f"{_rounded(plan.tokens_per_second)} tokens/s {basis}"
    notes = plan.notes
    if plan.cluster.device.memory_gb and not any(map(plan.fits, STAGES)):
        *savings, last = plan.savings
        notes = [f"to make it fit: {', '.join([*savings, f'or {last}']) if savings else last}", *notes]
    return "\n".join(map(_line, [_verdict(plan), time, _sent(plan), *(f"note: {note}" for note in notes)]))


def _verdict(plan: Plan) -> str:
    """Whether the run fits."""
    device = plan.cluster.device
    stage = plan.zero_stage
    memory = plan.at(stage).memory
    if plan.resident is not None:
        here = f"this host has {_gib(host_memory_bytes())} (for GPUs: --device=a100)"
        return f"needs {_gib(plan.resident)} GiB for each process; {here}"
    if not device.memory_gb:
        return f"needs {_gib(memory.device)} GiB on each {device.name} at ZeRO {stage}; its memory is not known"
    sizes = f"{_gib(memory.device)} of {_gib(device.memory_gb * 1e9)} GiB on each {device.name} at ZeRO {stage}"
    if plan.fits(stage):
        host = memory.host_base * plan.cluster.devices_per_node
        return f"fits: {sizes}" + (f", and {_gib(host)} GiB in host memory" if host else "")
    others = [each for each in STAGES if plan.fits(each)]
    return f"does NOT fit: {sizes}" + (f"; it fits with --train.zero_stage={others[0]}" if others else "")


def _sent(plan: Plan) -> str:
    """What a step sends, and over which links."""
    if plan.cluster.world_size == 1:
        return "sends nothing: there is one device"
    sent = _gb(plan.at(plan.zero_stage).network.sent)
    if plan.cluster.nodes == 1:
        return f"{sent} GB per step from each device, within the host"
    waits = plan.at(plan.zero_stage).step
    return (
        f"{sent} GB per step between hosts: {waits.network - waits.hidden:.3g} of {waits.total:.3g} s of a step "
        "wait for it"
    )


def tables(plan: Plan) -> str:
    """The answer, and all numbers in tables with a column for each ZeRO stage."""
    stages = [plan.at(stage) for stage in STAGES]
    memory, network, steps = ([getattr(each, part) for each in stages] for part in ("memory", "network", "step"))
    host = {"host: float32 base": "host_base", "host: checkpoint": "host_checkpoint", "host: start": "host_start"}
    sent = {"all-reduced": "all_reduced", "reduced": "reduced", "gathered": "gathered", "a device sends": "sent"}
    times = {**{part: part for part in ("compute", "optimizer", "network", "hidden")}, "a step": "total"}
    sizes = {
        **_rows(memory, _gib, {**{part: part for part in PARTS}, "all": "device"}),
        "at": [each.phase for each in memory],
        **_rows(memory, _gib, host),
    }
    step = {
        **_rows(network, _gb, sent, ", GB"),
        **_rows(steps, "{:.3g}".format, times, ", s"),
        "all steps": [duration(each.total * plan.config.train.steps) for each in steps],
    }
    sections = [
        f"{answer(plan)}\n{_run(plan)}",
        f"GiB of a device in {'bf16' if plan.bf16 else 'fp32'}, at the peak of a step\n{_table(plan, sizes)}",
        f"one step\n{_table(plan, step)}",
        f"Memory leaves out the CUDA context, fragmentation and Python itself, so a run fits if it takes {USABLE:.0%} "
        "of a device. Time leaves out evaluations, checkpoints and merges. For another method, give --method.name.",
    ]
    return "\n\n".join("\n".join(map(_line, section.split("\n"))) for section in sections)


def _run(plan: Plan) -> str:
    """What does not depend on the stage."""
    counts = plan.parameters
    flops = plan.flops
    optim = plan.config.optim
    cluster = plan.cluster
    device = cluster.device
    again = f", {flops.recomputed / 1e9:.4g} more for activation checkpointing" if flops.recomputed else ""
    lines = [
        f"parameters: {counts.total:,} in the model; {plan.method} trains {counts.trainable:,}, "
        f"{counts.adapters:,} of them in adapters",
        f"arithmetic: {flops.total / 1e9:.4g} GFLOP a token{again}",
        f"data: {plan.config.tokens_per_step:,} tokens a step, {plan.tokens:,} in all, "
        f"{flops.total * plan.tokens:.3g} FLOP",
        f"time: {plan.assumption}",
    ]
    if plan.optimizer_flops:
        names = f"{optim.matrices}" + (f", {optim.others} of embeddings and head" if optim.others != "adamw" else "")
        share = plan.optimizer_flops / (flops.total * plan.config.tokens_per_step)
        lines.append(
            f"optimizer: {names}: {plan.optimizer_flops / 1e12:.3g} TFLOP a step, {share:.2%} more, in all ranks"
        )
    if device.source:
        rates = f"{device.memory_gb:.3g} GB each, {device.peer_gbytes_per_s:g} GB/s between two"
        lines.append(f"devices: {cluster.nodes} x {cluster.devices_per_node} {device.name}, {rates} ({device.source})")
    if cluster.nodes > 1:
        rate = f"{cluster.node_gbits:g} Gbit/s" if cluster.node_gbits else "an unknown rate; give --link_gbits"
        origin = device.host if cluster.link_gbits is None else "--link_gbits"
        lines.append(f"hosts: {rate} from host to host ({origin}); in a ring, a host sends what a device does")
    return "\n".join(lines)


def _rows(things: Sequence[Any], show: Callable[[float], str], names: Mapping[str, str], unit: str = "") -> Rows:
    """A row for each attribute in ``names``, by its label."""
    return {f"{label}{unit}": [show(getattr(thing, name)) for thing in things] for label, name in names.items()}


def _table(plan: Plan, rows: Rows) -> str:
    """The rows that are not all zero, in a column for each stage."""
    marks = [f"{stage}{'*' * (stage == plan.zero_stage)}" for stage in STAGES]
    head = [mark + " too large" * (plan.fits(stage) is False) for stage, mark in zip(STAGES, marks, strict=True)]
    shown = {"ZeRO stage (* in the settings)": head} | {
        name: row for name, row in rows.items() if not {*row} <= {"-", "0"}
    }
    return "\n".join(name.ljust(32) + "".join(cell.rjust(17) for cell in row) for name, row in shown.items())


def _line(text: str) -> str:
    """A line that is wrapped if it is too long; a table's never is."""
    return textwrap.fill(text, COLUMNS, subsequent_indent="  ") if len(text) > COLUMNS else text


def duration(seconds: float) -> str:
    """2.5 years, 3 d 4 h, 4 h 5 min, 5 min 6 s or 6.1 s"""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    hours = minutes / 60
    if hours > 2 * 365 * 24:
        return f"{hours / 24 / 365:.1f} years"
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(hours // 24)} d {int(hours % 24)} h"


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
