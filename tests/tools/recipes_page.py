"""What fits on which GPU in docs/recipes.md, as ``relora-mora plan`` says."""

import itertools
from collections.abc import Iterator

from relora_mora.experiments.planner.plan import Cluster, Plan, plan_of
from relora_mora.system.devices import DEVICES, named_device

CARDS = {"rtx3060": 1, "rtx4080": 1, "rtx4090": 1, "l40s": 1, "a100-80gb": 1, "8 x a100-80gb": 8}
METHODS = {"ReMoRA": ["remora"], "full rank": ["full"], "ReMoRA, int8 base": ["remora", "--method.base=int8"]}
MODELS = ("llama_7b", "llama_3b", "llama_1_3b", "llama_350m", "llama_250m", "llama_130m")  # from the largest


def choices(devices: int) -> Iterator[list[str]]:
    """Settings in the order in which they are tried: without recomputing, and with large micro-batches, first."""
    stages = (1, 2, 3) if devices > 1 else (1, 2)
    for (micro, again), stage in itertools.product(
        [(16, False), (8, False), (4, False), (16, True), (8, True), (4, True), (2, True), (1, True)], stages
    ):
        yield [
            *([f"--train.micro_batch_size={micro}"] if micro != 16 else []),
            *(["--model.activation_checkpointing=true"] if again else []),
            *([f"--train.zero_stage={stage}"] if stage != 1 else []),
        ]


def planned(words: list[str], card: str) -> Plan:
    """The plan for the words after ``relora-mora pretrain``."""
    name, *flags = words
    settings = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    return plan_of(name, settings, Cluster(1, CARDS[card], named_device(card.split()[-1])))


def largest(card: str, method: str, *flags: str) -> tuple[list[str], Plan]:
    """The words of the command for the largest model that fits, and its plan."""
    for model in MODELS:
        size = "250m" if model == "llama_250m" else "1_3b"
        start = [f"paper_{size}_{method}"]
        if model not in ("llama_250m", "llama_1_3b"):
            start += [f"--model.config={model}", "--model.overrides={vocab_size: 32000}"]
        start += [*flags, f"--train.run_dir=runs/{model.removeprefix('llama_')}_{method}"]
        options = [start + choice for choice in choices(CARDS[card])]
        for words in options if any(_fits(words, card) for words in options[-2:]) else ():
            if _fits(words, card):
                return words, planned(words, card)
    raise AssertionError(f"nothing fits on {card}")


def _fits(words: list[str], card: str) -> bool:
    plan = planned(words, card)
    return bool(plan["memory"][plan["zero_stage"]]["fits"])


def command(words: list[str], card: str) -> str:
    start = (
        "relora-mora pretrain"
        if CARDS[card] == 1
        else f"deepspeed --num_gpus={CARDS[card]} --module relora_mora pretrain"
    )
    return " ".join([start, *(f"'{word}'" if " " in word else word for word in words)])


def row(title: str, words: list[str], plan: Plan) -> str:
    """A row of a table: what the plan of the command's ``words`` says."""
    memory = plan["memory"][plan["zero_stage"]]
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    start = words[0].removeprefix("paper_").rpartition("_")[0]
    model = flags.get("model.config", f"llama_{start}")
    again = "*" * ("model.activation_checkpointing" in flags)
    hours, days = 1e9 / plan["tokens_per_second"] / 3600, plan["seconds"] / 86400
    sizes = (memory["device"], memory["host_base"] * plan["world_size"])
    micro = flags.get("train.micro_batch_size", "16")
    cells = [title, f"`{model}`", f"{micro}{again}", *(f"{size / 2**30:.1f}" for size in sizes)]
    return f"| {' | '.join([*cells, f'{hours:,.1f}', f'{days:,.1f}'])} |"


def generated() -> str:
    """A section for each card."""
    parts = []
    for card, devices in CARDS.items():
        device = named_device(card.split()[-1])
        also = [each.name for each in DEVICES if each.memory_gb == device.memory_gb and each != device]
        lines = [f"## {card.replace(device.name, f'{device.memory_gb:g} GB')}: {device.in_name}\n"]
        if also and devices == 1:
            lines.append(f"{', '.join(also)} have as much memory, and take another time.\n")
        lines.append(
            "| | model | micro-batch | GiB of a card | GiB of the host | hours per billion tokens | days of the run |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        found = {title: largest(card, *start) for title, start in METHODS.items()}
        lines += [row(title, words, plan) for title, (words, plan) in found.items()]
        commands = [command(words, card) for words, _ in found.values()]
        parts.append("\n".join([*lines, "", "```bash", *commands, "```", ""]))
    return "\n".join(parts)
