"""ReMoRA in a script for Hugging Face's Trainer; two lines are added. A small LLaMA learns Python's own source code.

python examples/huggingface_trainer.py
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import relora_mora as rm

LENGTH = 64  # bytes
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--merge-every", type=int, default=25)
parser.add_argument("--output-dir", default="runs/huggingface_trainer")
args = parser.parse_args()

text = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
rows = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH)  # [N, LENGTH]
dataset = [{"input_ids": row, "labels": row} for row in rows]


class PrintMerges(TrainerCallback):
    """Prints the operator when a merge has switched it; a script does not need this."""

    operator = 1

    def on_step_end(self, args, state, control, **parts):
        if remora.operator != self.operator:
            print(f"step {state.global_step}: merge, operator {self.operator} -> {remora.operator}")
            self.operator = remora.operator


torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)
remora = rm.attach(model, rm.ReMoRA(rank=16, operators=(1, 2), merge_every=args.merge_every))  # the first added line
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        warmup_steps=args.steps // 10,
        lr_scheduler_type="cosine",
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=dataset,
    callbacks=[rm.ReMoRACallback(remora, restart_warmup_steps=5), PrintMerges()],  # the second added line
)
trainer.train()

plain = remora.merged().eval()
plain.save_pretrained(args.output_dir)  # a plain LLaMA
with torch.no_grad():
    difference = (plain(rows[:1]).logits - model.eval()(rows[:1]).logits).abs().max().item()
print(f"the merged model has the same output up to {difference:.1e}")
