"""Reports what a run will need: parameters, memory, arithmetic, network, tokens, time."""

import json as json_module
import math

from relora_mora.cli.arguments import PositiveInt
from relora_mora.system.process import many_imports

SLOWEST = 1e-6  # at a lower rate, the time in seconds would overflow a float


def main(
    config: str,
    *,
    world_size: PositiveInt | None = None,
    nodes: PositiveInt | None = None,
    gpus_per_node: PositiveInt | None = None,
    device: str | None = None,
    link_gbits: float | None = None,
    tokens_per_second: float | None = None,
    utilization: float | None = None,
    json: bool = False,
    finetune: bool = False,
    **overrides: str,
) -> None:
    """Prints what a run needs: memory, arithmetic, network, tokens and time.

    Arguments:
        config: the settings of a run: a YAML file, or the name of a shipped one (relora-mora configs)
        overrides: settings, as for training

    Machines:
        nodes: number of hosts
        gpus_per_node: devices per host
        world_size: number of devices, all in one host, instead of nodes and gpus_per_node
        device: the kind of device, such as h100, a100-80gb or cpu; cuda means a100-80gb; default: this machine's
        link_gbits: network of one host in Gbit/s, all cards together; default: the network of the vendor's host

    Speed:
        tokens_per_second: a measured rate over all devices, used to compute the time
        utilization: fraction of the devices' peak that is reached while they compute; default: 0.4

    Output:
        json: print one JSON object with everything, sizes in bytes
        finetune: plan a run of relora-mora finetune, with its defaults

    Example:
        relora-mora plan paper_250m_remora --nodes=1 --gpus_per_node=8 --device=h100
    """
    from relora_mora.config.load import FINETUNING, ConfigError, load_config

    for name, rate in (("tokens_per_second", tokens_per_second), ("link_gbits", link_gbits)):
        if rate is not None and not (math.isfinite(rate) and rate > SLOWEST):
            raise ValueError(f"--{name}: got {rate}, expected a finite rate above {SLOWEST:g}")
    if world_size is not None and (nodes is not None or gpus_per_node is not None):
        raise ValueError(
            "--world_size: given together with --nodes or --gpus_per_node; give only it (for one host) or those two"
        )
    if nodes is not None and nodes > 1 and gpus_per_node is None:
        raise ValueError(
            f"--gpus_per_node: missing with --nodes={nodes}; give the number of devices per host, "
            "e.g. --gpus_per_node=8"
        )
    if link_gbits is not None and (nodes or 1) == 1:
        raise ValueError("--link_gbits: a single host does not use its network; give --nodes above 1, or leave it out")
    with many_imports():  # takes seconds, so arguments are checked first
        import torch

        from relora_mora.adapters.stored import check_precision, with_products
        from relora_mora.experiments.planner.cluster import Cluster
        from relora_mora.experiments.planner.plan import make_plan
        from relora_mora.experiments.planner.render import render
        from relora_mora.model.config import check_length
        from relora_mora.optim.own import with_rule
        from relora_mora.sizing.fit import check_adapters
        from relora_mora.system.devices import named_device
        from relora_mora.system.hardware import device_here, fast_bf16, peak_flops
        from relora_mora.train.begin.start_adapter import check_start
        from relora_mora.weights.load import model_config_of

    here = device_here()
    chosen = here if device is None else named_device(device)
    on_cpu = chosen.name == "cpu"
    cluster = Cluster(nodes or 1, gpus_per_node or world_size or 1, chosen, link_gbits)
    defaults = FINETUNING if finetune else None
    settings = with_rule(load_config(config, overrides, world_size=cluster.world_size, defaults=defaults))
    if settings.train.epochs is not None:
        fault = (
            "train.epochs: the number of steps is not known before a run has counted its text; "
            "plan with --train.epochs=null and --train.steps or --train.tokens"
        )
        raise ConfigError([fault], config)
    if settings.model.config is None:  # otherwise the weights need not be on this machine
        check_start(settings)
    model_config = model_config_of(settings.model)
    source = settings.model.config or str(settings.model.init_from)
    check_length(model_config, settings.data.sequence_length, source, separate_documents=settings.data.masks_documents)
    check_adapters(model_config, settings.method)
    auto = fast_bf16() if chosen == here else not on_cpu
    bf16 = auto if settings.train.precision == "auto" else settings.train.precision == "bf16"
    if on_cpu:
        capability = None
    else:
        capability = torch.cuda.get_device_capability() if chosen == here else chosen.capability
    method, _ = with_products(settings.method, bf16=bf16, capability=capability, vnni=torch.cpu._is_vnni_supported())
    settings = settings.model_copy(update={"method": method})
    check_precision(settings.method, bf16=bf16, on_gpu=not on_cpu)
    measured = on_cpu or chosen == here
    peak_name = "bf16" if bf16 else "the peak of bf16; float32 is slower, so give log.peak_tflops"
    peak = peak_flops(bf16=bf16, on_cpu=on_cpu) if measured else (chosen.tflops * 1e12, f"{peak_name}, {chosen.source}")
    if on_cpu:  # measured on all cores, which the host's ranks share
        peak = (peak[0] / cluster.devices_per_node, peak[1])
    plan = make_plan(
        model_config,
        settings,
        cluster=cluster,
        bf16=bf16,
        on_cpu=on_cpu,
        peak=peak,
        tokens_per_second=tokens_per_second,
        utilization=utilization,
    )
    print(json_module.dumps(plan.as_dict()) if json else render(plan))
