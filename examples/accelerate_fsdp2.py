"""ReMoRA with accelerate and FSDP2: the weights, adapters and optimizer state are sharded over two processes.

torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py

accelerate shards on GPUs only; on CPUs, each process has a copy.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import relora_mora as rm

LENGTH = 64  # bytes
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--merge-every", type=int, default=20)
args = parser.parse_args()

text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
rows = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH)  # [N, LENGTH]
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)

plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
torch.manual_seed(0)
model = LlamaForCausalLM(config)
remora = rm.attach(model, rm.ReMoRA(rank=16, operators=(1, 2), merge_every=args.merge_every))  # before prepare()
optimizer = torch.optim.AdamW(remora.parameter_groups(lr=5e-3, lr_other=2e-3))
loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
layout = "sharded" if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else "copied"
accelerator.print(f"the parameters are {layout}")
# accelerate would step a prepared schedule once for each process
schedule = remora.schedule(optimizer, total_steps=args.steps, warmup_steps=args.steps // 10, restart_warmup_steps=5)

while remora.step < args.steps:
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        record = remora.after_step(optimizer)
        if record:
            accelerator.print(
                f"step {remora.step}: merge, operator {record.operator_before} -> {record.operator_after}"
            )
        if remora.step % max(1, args.steps // 10) == 0:
            accelerator.print(f"step {remora.step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.6f}")
        if remora.step == args.steps:
            break

state = remora.merged_state_dict()  # on the first rank
with torch.no_grad():
    logits = model(input_ids=rows[:1].to(accelerator.device)).logits.cpu()
if accelerator.is_main_process:
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(state)
    difference = (plain(rows[:1]).logits - logits).abs().max().item()
    print(f"the merged model has the same output up to {difference:.1e}")
accelerator.end_training()
