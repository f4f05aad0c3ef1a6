"""ReMoRA in the attention of a diffusion model: a small U-Net learns to predict the noise in images of circles.

python examples/diffusion_unet.py
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DModel

import relora_mora as rm

SIZE = 16  # pixels
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--merge-every", type=int, default=25)
args = parser.parse_args()


def circles(count):
    """Images [count, 1, SIZE, SIZE] in -1..1, each with a circle of random place and size."""
    axis = torch.arange(SIZE).float()
    x, y = (torch.rand(2, count, 1, 1) * 0.5 + 0.25) * SIZE
    distance = ((axis.view(1, SIZE, 1) - y) ** 2 + (axis - x) ** 2).sqrt()
    radius = torch.rand(count, 1, 1) * 3 + 2
    return ((distance - radius).abs() < 1).float().unsqueeze(1) * 2 - 1


torch.manual_seed(0)
model = UNet2DModel(
    sample_size=SIZE,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
noising = DDPMScheduler(num_train_timesteps=100)

# every linear, those of the attention and of the time embedding, gets an adapter; convolutions train as they are
remora = rm.attach(model, rm.ReMoRA(rank=8, operators=(1, 2), merge_every=args.merge_every), seed=0)
optimizer = torch.optim.AdamW(remora.parameter_groups(lr=5e-3, lr_other=2e-3))
schedule = remora.schedule(optimizer, total_steps=args.steps, warmup_steps=args.steps // 10, restart_warmup_steps=5)

while remora.step < args.steps:
    images = circles(16)
    noise = torch.randn_like(images)
    times = torch.randint(100, (16,))
    noisy = noising.add_noise(images, noise, times)
    loss = torch.nn.functional.mse_loss(model(noisy, times).sample, noise)
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    record = remora.after_step(optimizer)
    if record:
        print(f"step {remora.step}: merge, operator {record.operator_before} -> {record.operator_after}")
    if remora.step % max(1, args.steps // 10) == 0:
        print(f"step {remora.step}: loss {loss.item():.6f}")

plain = remora.merged()
with torch.no_grad():
    difference = (plain(noisy, times).sample - model(noisy, times).sample).abs().max().item()
print(f"the merged model has the same output up to {difference:.1e}")
