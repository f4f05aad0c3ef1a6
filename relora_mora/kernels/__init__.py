"""Sums and copies along groupings, cross-entropy over logits, and both ends of a product in 8 bits, in one pass each.

CPUs have the kernels of kernels.c, and NVIDIA's GPUs those in triton_*.py. They are operators of torch
(``torch.ops.relora_mora``), so torch.compile can call them inside a compiled layer. On other devices, and while
autograd records, torch operations compute the same. Results agree up to rounding: the kernels add bfloat16 in float32
and round once, while torch rounds after every piece of a grouping (tests/kernels/test_kernels.py).
"""
