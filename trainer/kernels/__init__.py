"""Faster kernels with the same results: attention, LoRA products, CUDA graphs, tapes on a CPU, torch.compile."""
