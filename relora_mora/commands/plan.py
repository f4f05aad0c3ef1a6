"""Reports what a run will need: parameters, memory, arithmetic, network, tokens, time."""

import json as json_module
from typing import Annotated

from annotated_types import Ge, Le

from relora_mora.cli.arguments import PositiveInt
from relora_mora.system.process import many_imports

Rate = Annotated[float, Ge(1e-6), Le(1e15)]  # beyond, the time in seconds would overflow a float


def main(
    config: str,
    *,
    nodes: PositiveInt | None = None,
    gpus_per_node: PositiveInt | None = None,
    device: str | None = None,
    link_gbits: Rate | None = None,
    tokens_per_second: Rate | None = None,
    utilization: Annotated[float, Ge(1e-6), Le(1)] | None = None,
    details: bool = False,
    json: bool = False,
    finetune: bool = False,
    **overrides: str,
) -> None:
    """Answers in three lines whether a run fits, how long it takes, and what it sends.

    Text and tokenizer need not be on this machine, nor the weights that shipped settings start from.

    Arguments:
        config: the settings of a run: a YAML file, or a name that relora-mora configs lists, also of a model
        overrides: settings, as for training

    Machines:
        nodes: number of hosts; default: 1
        gpus_per_node: devices per host; default: 1
        device: the kind of device, such as h100, a100-80gb or cpu; cuda means a100-80gb; default: this machine's
        link_gbits: network of one host in Gbit/s, all cards together; default: the network of the vendor's host

    Speed:
        tokens_per_second: a measured rate over all devices, used to compute the time
        utilization: fraction of the devices' peak that is reached while they compute; default: 0.4

    Output:
        details: print the tables: parameters, memory, arithmetic, network and time, for each ZeRO stage
        json: print one JSON object with everything, sizes in bytes
        finetune: plan a run of relora-mora finetune, with its defaults

    Example:
        relora-mora plan llama_7b --nodes=1 --gpus_per_node=8 --device=h100
    """
    from relora_mora.system.devices import CPU, named_device

    faults = []
    if nodes is not None and nodes > 1 and gpus_per_node is None:
        faults.append(
            f"--gpus_per_node: missing with --nodes={nodes}; give the number of devices per host, "
            "e.g. --gpus_per_node=8"
        )
    if link_gbits is not None and (nodes or 1) == 1:
        faults.append("--link_gbits: a single host does not use its network; give --nodes above 1, or leave it out")
    chosen = CPU
    try:
        chosen = chosen if device is None else named_device(device)
    except ValueError as error:
        faults.append(str(error))
    with many_imports():
        from relora_mora.config.load import ConfigError
        from relora_mora.experiments.planner.given import read_run
        from relora_mora.experiments.planner.plan import Cluster, plan_of
        from relora_mora.experiments.planner.render import answer, tables
        from relora_mora.system.hardware import device_here

    if faults:
        try:
            read_run(config, overrides, world_size=1, finetune=finetune)
        except ConfigError as error:
            faults += error.faults
        raise ConfigError(faults, "the command line")
    if device is None:
        chosen = device_here()
    cluster = Cluster(nodes or 1, gpus_per_node or 1, chosen, link_gbits)
    plan = plan_of(
        config,
        overrides,
        cluster,
        finetune=finetune,
        measured=tokens_per_second,
        utilization=utilization,
        every_stage=details or json,
    )
    print(json_module.dumps(plan) if json else tables(plan) if details else answer(plan))
