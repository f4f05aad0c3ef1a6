"""ReMoRA in a plain PyTorch loop with save and resume. It learns to predict the next byte of Python's own source code.

python examples/plain_loop.py
python examples/plain_loop.py --stop-after 75     # saves and stops
python examples/plain_loop.py --resume             # continues with the same numbers
"""

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

import relora_mora as rm

CONTEXT = 16  # bytes
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--merge-every", type=int, default=50)
parser.add_argument("--stop-after", type=int, help="save and stop after this step")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--checkpoint", type=Path, default=Path("runs/plain_loop.pt"))
args = parser.parse_args()

text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
windows = torch.tensor(list(text)).unfold(0, CONTEXT + 1, 1)  # [N, CONTEXT + 1]


def batch_of(step):
    rows = torch.randint(len(windows), (64,), generator=torch.Generator().manual_seed(step))
    return windows[rows, :-1], windows[rows, -1]


torch.manual_seed(0)
layers = OrderedDict(embedding=nn.Embedding(256, 32), flatten=nn.Flatten(), first=nn.Linear(32 * CONTEXT, 256))
layers |= OrderedDict(gelu=nn.GELU(), second=nn.Linear(256, 256), gelu2=nn.GELU(), head=nn.Linear(256, 256))
model = nn.Sequential(layers)

method = rm.ReMoRA(rank=32, operators=(1, 2), merge_every=args.merge_every)
remora = rm.attach(model, method, targets=["first", "second"], seed=0)
optimizer = torch.optim.AdamW(remora.parameter_groups(lr=5e-3, lr_other=2e-3, weight_decay=0.01))
schedule = remora.schedule(optimizer, total_steps=args.steps, warmup_steps=args.steps // 10, restart_warmup_steps=5)
parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "remora": remora}  # remora comes last
if args.resume:
    saved = torch.load(args.checkpoint)
    for name, part in parts.items():
        part.load_state_dict(saved[name])

while remora.step < args.steps:
    inputs, targets = batch_of(remora.step)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    record = remora.after_step(optimizer)
    if record:
        print(f"step {remora.step}: merge, operator {record.operator_before} -> {record.operator_after}")
    if remora.step % max(1, args.steps // 10) == 0:
        print(f"step {remora.step}: loss {loss.item():.6f}")
    if remora.step == args.stop_after:
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint)
        print(f"step {remora.step}: saved {args.checkpoint}")
        raise SystemExit

plain = remora.merged()
with torch.no_grad():
    difference = (plain(inputs) - model(inputs)).abs().max().item()
print(f"the merged model has the same output up to {difference:.1e}")
