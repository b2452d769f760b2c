"""The same numbers, faster: attention, LoRA products, CUDA graphs, compiled and recorded passes."""
