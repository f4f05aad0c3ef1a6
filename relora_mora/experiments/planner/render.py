"""A plan as text for a terminal."""

from __future__ import annotations

from relora_mora.experiments.planner.plan import PROCESS_BYTES, Plan
from relora_mora.sizing.fit import USABLE
from relora_mora.sizing.memory import PARTS
from relora_mora.system.logs import counted


def render(plan: Plan) -> str:
    """The plan as text for a terminal."""
    counts = plan.parameters
    flops = plan.flops
    precision = "bf16" if plan.bf16 else "fp32"
    own = plan.memory[plan.method]
    parts = [
        f"parameters     {counts.total:,} in the model; {plan.method} trains {counts.trainable:,}, "
        f"{counts.adapters:,} of them in adapters",
        f"arithmetic     {flops.total / 1e9:.4g} GFLOP a token: "
        + ", ".join(
            f"{name} {getattr(flops, name) / flops.total:.0%}" for name in ("linears", "adapters", "attention", "head")
        )
        + (f"; {flops.recomputed / 1e9:.4g} more for activation checkpointing" if flops.recomputed else ""),
        *_optimizer(plan),
        f"data           {plan.tokens_per_step:,} tokens a step, {plan.tokens:,} in all, "
        f"{flops.total * plan.tokens:.3g} FLOP",
        f"time           {duration(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s on "
        f"{counted(plan.world_size, 'device')}, {plan.assumption}",
        *_cluster(plan),
        *(f"note           {note}" for note in plan.notes),
        "",
        f"memory of a device ({plan.world_size} in all) in GiB, {plan.method} in {precision}, "
        f"at the peak of a step (* the stage in the settings)",
        _table(
            ["stage", *PARTS, "all", "at", "host: fp32 base", "checkpoint", "start"],
            [
                [
                    _stage(plan, stage),
                    *(_gib(getattr(memory, part)) for part in PARTS),
                    _gib(memory.device),
                    memory.phase,
                    _gib(memory.host_base),
                    _gib(memory.host_checkpoint),
                    _gib(memory.host_start),
                ]
                for stage, memory in own.items()
            ],
        ),
        "",
        "the same for each method, sum of all parts",
        _table(
            ["stage", *plan.memory],
            [[str(stage), *(_gib(stages[stage].device) for stages in plan.memory.values())] for stage in own],
        ),
        *_network(plan),
        "",
        "memory leaves out the CUDA context, fragmentation and Python itself; time leaves out evaluations, checkpoints "
        "and merges",
    ]
    if plan.resident is not None:
        parts.insert(
            -2,
            f"\nresident memory of the first rank: {_gib(plan.resident)} GiB, including {_gib(PROCESS_BYTES)} for "
            "Python, torch and DeepSpeed, and in training a tenth for malloc's fragmentation",
        )
    return "\n".join(parts)


def _optimizer(plan: Plan) -> list[str]:
    """The cost of a matrix optimizer; empty if AdamW trains everything."""
    if not plan.optimizer_flops:
        return []
    share = plan.optimizer_flops / (plan.flops.total * plan.tokens_per_step)
    who = "each device does all of it" if plan.zero_stage == 0 else "the devices share it"
    return [f"optimizer      {plan.matrices}: {plan.optimizer_flops / 1e12:.3g} TFLOP a step, {share:.2%} more; {who}"]


def _cluster(plan: Plan) -> list[str]:
    """The devices, and whether the run fits on them."""
    cluster = plan.cluster
    device = plan.cluster.device
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


def _network(plan: Plan) -> list[str]:
    """Bytes and time of a step by stage; empty if there is one rank."""
    cluster = plan.cluster
    moved = plan.network[plan.method]
    if cluster.world_size == 1:
        return []
    link = _link(plan)
    rows = []
    for stage, step in plan.steps.items():
        traffic = moved[stage]
        # a ring's bytes leave each host once
        per_host = traffic.sent if cluster.nodes > 1 else 0
        given = (traffic.all_reduced, traffic.reduced, traffic.gathered)
        row = [
            _stage(plan, stage),
            *map(_gb, given),
            _gb(traffic.sent),
            _gb(per_host),
            _gb(plan.network["full"][stage].sent),
        ]
        parts = (step.compute, step.optimizer, step.network, step.hidden, step.total)
        rows.append(
            [
                *row,
                *(f"{seconds:.3g}" if seconds else "-" for seconds in parts),
                duration(plan.tokens / plan.tokens_per_step * step.total),
            ]
        )
    columns = ["stage", "all-reduced", "reduced", "gathered", "a device sends", "a host sends", "full: a device"]
    columns += ["compute s", "optimizer s", "network s", "hidden s", "step s", "all steps"]
    own = moved[plan.zero_stage]
    merges = (
        f"a merge: a device sends {_gb(own.sent_in_merge)} GB at stage {plan.zero_stage}, "
        f"{_gb(own.sent_in_merge / plan.merge_every)} GB for each step between merges"
        if plan.merge_every
        else ""
    )
    return [
        "",
        f"one step in GB (1e9 bytes) and seconds, calculated; {link}",
        _table(columns, rows),
        *filter(None, [merges, _advice(plan)]),
    ]


def _advice(plan: Plan) -> str:
    if not plan.sends_less_at_one:
        return ""
    fits = ", and it fits" if plan.fits(1) else ""
    return f"stage 2 sends the gradients after each micro-batch, stage 1 once a step{fits}: try --train.zero_stage=1"


def _link(plan: Plan) -> str:
    cluster = plan.cluster
    within = (
        f"{cluster.device.peer_gbytes_per_s:g} GB/s from device to device" if cluster.device.peer_gbytes_per_s else ""
    )
    between = ""
    if cluster.nodes > 1 and cluster.node_gbits:
        origin = cluster.device.host if cluster.link_gbits is None else "--link_gbits"
        between = f"{cluster.node_gbits:g} Gbit/s from host to host ({origin})"
    remedy = "; give --link_gbits" if cluster.nodes > 1 else ""
    return ", ".join(filter(None, [within, between])) or f"no bandwidth is known{remedy}"


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
