"""A plan as text for a terminal."""

from relora_mora.experiments.planner.cluster import Cluster
from relora_mora.experiments.planner.plan import PROCESS_BYTES, Plan
from relora_mora.sizing.fit import USABLE
from relora_mora.sizing.memory import PARTS
from relora_mora.system.logs import counted


def render(plan: Plan) -> str:
    """The plan as text for a terminal."""
    own = plan.memory[plan.method]
    sums = [[str(stage), *(_gib(stages[stage].device) for stages in plan.memory.values())] for stage in own]
    sections = [
        _summary(plan),
        _memory(plan),
        f"the same for each method, sum of all parts\n{_table(['stage', *plan.memory], sums)}",
        _network(plan),
    ]
    if plan.resident is not None:
        sections.append(
            f"resident memory of the first rank: {_gib(plan.resident)} GiB, including {_gib(PROCESS_BYTES)} for "
            "Python, torch and DeepSpeed, and in training a tenth for malloc's fragmentation"
        )
    sections.append(
        "memory leaves out the CUDA context, fragmentation and Python itself; time leaves out evaluations, checkpoints "
        "and merges"
    )
    return "\n\n".join(filter(None, sections))


def _summary(plan: Plan) -> str:
    counts = plan.parameters
    flops = plan.flops
    time = plan.time
    tokens_per_step = plan.config.tokens_per_step
    parts = (
        f"{name} {getattr(flops, name) / flops.total:.0%}" for name in ("linears", "adapters", "attention", "head")
    )
    again = f"; {flops.recomputed / 1e9:.4g} more for activation checkpointing" if flops.recomputed else ""
    lines = [
        f"parameters     {counts.total:,} in the model; {plan.method} trains {counts.trainable:,}, "
        f"{counts.adapters:,} of them in adapters",
        f"arithmetic     {flops.total / 1e9:.4g} GFLOP a token: {', '.join(parts)}{again}",
    ]
    if plan.optimizer_flops:
        share = plan.optimizer_flops / (flops.total * tokens_per_step)
        who = "each device does all of it" if plan.zero_stage == 0 else "the devices share it"
        work = f"{plan.optimizer_flops / 1e12:.3g} TFLOP a step, {share:.2%} more"
        optim = plan.config.optim
        names = (
            optim.matrices if optim.others == "adamw" else f"{optim.matrices}, {optim.others} of embeddings and head"
        )
        lines.append(f"optimizer      {names}: {work}; {who}")
    lines += [
        f"data           {tokens_per_step:,} tokens a step, {time.tokens:,} in all, "
        f"{flops.total * time.tokens:.3g} FLOP",
        f"time           {duration(time.seconds)} at {time.tokens_per_second:,.0f} tokens/s on "
        f"{counted(plan.cluster.world_size, 'device')}, {time.assumption}",
        *_devices(plan),
        *(f"note           {note}" for note in plan.notes),
    ]
    return "\n".join(lines)


def _devices(plan: Plan) -> list[str]:
    """The devices, and whether the run fits on them; empty if their memory is unknown."""
    cluster = plan.cluster
    device = cluster.device
    if not device.memory_gb:
        return []
    fitting = [stage for stage in plan.memory[plan.method] if plan.fits(stage)]
    if fitting:
        verdict = f"fits at ZeRO stage {', '.join(map(str, fitting))}"
        if plan.zero_stage not in fitting:
            verdict += f"; NOT at {plan.zero_stage} as in the settings: use --train.zero_stage={fitting[0]}"
    else:
        *others, last = plan.savings
        verdict = f"fits at NO stage: {', '.join([*others, f'or {last}']) if others else last}"
    return [
        f"devices        {cluster.nodes} x {cluster.devices_per_node} {device.name}, "
        f"{device.memory_gb:g} GB each ({device.source})",
        f"memory         {verdict} (within {USABLE:.0%} of a device)",
    ]


def _memory(plan: Plan) -> str:
    precision = "bf16" if plan.bf16 else "fp32"
    rows = [
        [
            _stage(plan, stage),
            *(_gib(getattr(memory, part)) for part in PARTS),
            _gib(memory.device),
            memory.phase,
            *map(_gib, (memory.host_base, memory.host_checkpoint, memory.host_start)),
        ]
        for stage, memory in plan.memory[plan.method].items()
    ]
    return (
        f"memory of a device ({plan.cluster.world_size} in all) in GiB, {plan.method} in {precision}, "
        f"at the peak of a step (* the stage in the settings)\n"
        + _table(["stage", *PARTS, "all", "at", "host: fp32 base", "checkpoint", "start"], rows)
    )


def _network(plan: Plan) -> str:
    """Bytes and time of a step by stage; empty if there is one rank."""
    cluster = plan.cluster
    if cluster.world_size == 1:
        return ""
    traffic = plan.network[plan.method]
    rows = []
    for stage, step in plan.time.steps.items():
        moved = traffic[stage]
        per_host = moved.sent if cluster.nodes > 1 else 0  # a ring's bytes leave each host once
        full = plan.network["full"][stage].sent
        sizes = (moved.all_reduced, moved.reduced, moved.gathered, moved.sent, per_host, full)
        times = (step.compute, step.optimizer, step.network, step.hidden, step.total)
        rows.append(
            [
                _stage(plan, stage),
                *map(_gb, sizes),
                *(f"{seconds:.3g}" if seconds else "-" for seconds in times),
                duration(step.total * plan.config.train.steps),
            ]
        )
    columns = ["stage", "all-reduced", "reduced", "gathered", "a device sends", "a host sends", "full: a device"]
    columns += ["compute s", "optimizer s", "network s", "hidden s", "step s", "all steps"]
    lines = [f"one step in GB (1e9 bytes) and seconds, calculated; {_link(cluster)}", _table(columns, rows)]
    if plan.merge_every:
        sent = traffic[plan.zero_stage].sent_in_merge
        lines.append(
            f"a merge: a device sends {_gb(sent)} GB at stage {plan.zero_stage}, "
            f"{_gb(sent / plan.merge_every)} GB for each step between merges"
        )
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
        links.append(f"{cluster.node_gbits:g} Gbit/s from host to host ({origin})")
    remedy = "; give --link_gbits" if cluster.nodes > 1 else ""
    return ", ".join(links) or f"no bandwidth is known{remedy}"


def _stage(plan: Plan, stage: int) -> str:
    return f"{stage}{'*' if stage == plan.zero_stage else ''}{' too large' if plan.fits(stage) is False else ''}"


def duration(seconds: float) -> str:
    """3 d 4 h, 4 h 5 min, 5 min 6 s or 6.1 s"""
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    hours = minutes / 60
    return f"{int(hours)} h {int(minutes % 60)} min" if hours < 48 else f"{int(hours // 24)} d {int(hours % 24)} h"


def _gib(size: float) -> str:
    return "-" if size == 0 else f"{size / 2**30:.3g}" if size < 2**30 else f"{size / 2**30:.1f}"


def _gb(size: float) -> str:
    return "-" if size == 0 else f"{size / 1e9:.3g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    )
