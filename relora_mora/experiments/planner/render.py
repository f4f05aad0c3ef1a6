"""A plan as text for a terminal: an answer in three lines, or its tables. No line has more than 100 columns."""

import textwrap
from collections.abc import Mapping

from relora_mora.experiments.planner.cluster import Cluster
from relora_mora.experiments.planner.plan import ASSUMED_UTILIZATION, PROCESS_BYTES, STAGES, Plan
from relora_mora.sizing.fit import USABLE
from relora_mora.sizing.memory import PARTS
from relora_mora.system.hardware import host_memory_bytes

COLUMNS = 100


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
    memory = plan.needs(stage).memory
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
    sent = _gb(plan.needs(plan.zero_stage).network.sent)
    if plan.cluster.nodes == 1:
        return f"{sent} GB per step from each device, within the host"
    waits = plan.step(plan.zero_stage)
    return (
        f"{sent} GB per step between hosts: {waits.network - waits.hidden:.3g} of {waits.total:.3g} s of a step "
        "wait for it"
    )


def tables(plan: Plan) -> str:
    """All numbers, in tables with a column for each ZeRO stage."""
    sections = [_run(plan), _memory(plan), _network(plan)]
    if plan.resident is not None:
        sections.append(
            f"resident memory of the first rank: {_gib(plan.resident)} GiB, including {_gib(PROCESS_BYTES)} for "
            "Python, torch and DeepSpeed, and in training a tenth for malloc's fragmentation"
        )
    sections.append(
        f"Memory leaves out the CUDA context, fragmentation and Python itself, so a run fits if it takes {USABLE:.0%} "
        "of a device. Time leaves out evaluations, checkpoints and merges."
    )
    return "\n\n".join("\n".join(map(_line, section.split("\n"))) for section in sections if section)


def _run(plan: Plan) -> str:
    counts = plan.parameters
    flops = plan.flops
    of_a_step = flops.total * plan.config.tokens_per_step
    parts = [
        f"{name} {getattr(flops, name) / flops.total:.0%}" for name in ("linears", "adapters", "attention", "head")
    ]
    parts += [f"{flops.recomputed / 1e9:.4g} more for activation checkpointing"] if flops.recomputed else []
    lines = [
        f"parameters: {counts.total:,} in the model; {plan.method} trains {counts.trainable:,}, "
        f"{counts.adapters:,} of them in adapters",
        f"arithmetic: {flops.total / 1e9:.4g} GFLOP a token: {', '.join(parts)}",
        f"data: {plan.config.tokens_per_step:,} tokens a step, {plan.tokens:,} in all, "
        f"{flops.total * plan.tokens:.3g} FLOP",
        f"time: {plan.assumption}",
    ]
    if plan.optimizer_flops:
        optim = plan.config.optim
        names = (
            optim.matrices if optim.others == "adamw" else f"{optim.matrices}, {optim.others} of embeddings and head"
        )
        who = "each device does all of it" if plan.zero_stage == 0 else "the devices share it"
        share = plan.optimizer_flops / of_a_step
        lines.append(f"optimizer: {names}: {plan.optimizer_flops / 1e12:.3g} TFLOP a step, {share:.2%} more; {who}")
    device = plan.cluster.device
    if device.memory_gb:
        hosts = f"{plan.cluster.nodes} x {plan.cluster.devices_per_node} {device.name}"
        lines.append(f"devices: {hosts}, {device.memory_gb:.3g} GB each ({device.source})")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    own = [plan.needs(stage).memory for stage in STAGES]
    host = {"fp32 base": "host_base", "checkpoint": "host_checkpoint", "start": "host_start"}
    rows = {
        **{part: [_gib(getattr(memory, part)) for memory in own] for part in PARTS},
        f"all with {plan.method}": [_gib(memory.device) for memory in own],
        "at": [memory.phase for memory in own],
        **{f"on the host: {name}": [_gib(getattr(memory, key)) for memory in own] for name, key in host.items()},
        **{
            f"all with {name}": [_gib(stages[stage].device) for stage in STAGES]
            for name, stages in plan.memory.items()
            if name != plan.method
        },
    }
    title = f"GiB of a device in {'bf16' if plan.bf16 else 'fp32'}, at the peak of a step"
    return f"{title}\n{_table(plan, rows)}"


def _network(plan: Plan) -> str:
    """Bytes and time of a step by stage."""
    cluster = plan.cluster
    steps = plan.steps
    own = [plan.needs(stage).network for stage in STAGES]
    seconds = ("compute", "optimizer", "network", "hidden", "total")
    rows: dict[str, list[str]] = {}
    if cluster.world_size > 1:
        rows |= {
            **{
                f"{name}, GB": [_gb(getattr(moved, name)) for moved in own]
                for name in ("all_reduced", "reduced", "gathered")
            },
            "a device sends, GB": [_gb(moved.sent) for moved in own],
            "full rank: a device sends, GB": [_gb(moved.sent) for moved in plan.network["full"].values()],
        }
    rows |= {
        **{
            f"{name}, s": [f"{value:.3g}" if (value := getattr(step, name)) else "-" for step in steps.values()]
            for name in seconds
        },
        "all steps": [duration(step.total * plan.config.train.steps) for step in steps.values()],
    }
    lines = [f"one step; {_link(cluster)}" if cluster.world_size > 1 else "one step", _table(plan, rows)]
    if plan.merge_every and cluster.world_size > 1:
        sent = plan.needs(plan.zero_stage).network.sent_in_merge
        each = _gb(sent / plan.merge_every)
        lines.append(f"a merge: a device sends {_gb(sent)} GB, {each} GB for each step between merges")
    if plan.sends_less_at_one:
        fits = ", and it fits" if plan.fits(1) else ""
        lines.append(
            f"stage 2 sends the gradients after each micro-batch, stage 1 once a step{fits}: try --train.zero_stage=1"
        )
    return "\n".join(lines)


def _link(cluster: Cluster) -> str:
    """The bandwidths in words."""
    within = cluster.device.peer_gbytes_per_s
    links = [f"{within:g} GB/s from device to device"] if within else []
    if cluster.nodes > 1 and cluster.node_gbits:
        origin = cluster.device.host if cluster.link_gbits is None else "--link_gbits"
        links.append(
            f"{cluster.node_gbits:g} Gbit/s from host to host ({origin}); in a ring a host sends what a device does"
        )
    remedy = "; give --link_gbits" if cluster.nodes > 1 else ""
    return ", ".join(links) or f"no bandwidth is known{remedy}"


def _table(plan: Plan, rows: Mapping[str, list[str]]) -> str:
    """The rows that have a number, in a column for each stage."""
    stages = [
        f"{stage}{'*' * (stage == plan.zero_stage)}{' too large' * (plan.fits(stage) is False)}" for stage in STAGES
    ]
    shown = {"ZeRO stage (* in the settings)": stages} | {name: row for name, row in rows.items() if {*row} != {"-"}}
    return "\n".join(
        name.replace("_", "-").ljust(32) + "".join(cell.rjust(17) for cell in row) for name, row in shown.items()
    )


def _line(text: str) -> str:
    """A line that is wrapped if it is too long; a table's never is."""
    return textwrap.fill(text, COLUMNS, subsequent_indent="  ") if len(text) > COLUMNS else text


def duration(seconds: float) -> str:
    """3 d 4 h, 4 h 5 min, 5 min 6 s or 6.1 s"""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    hours = minutes / 60
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
