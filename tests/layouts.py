"""Real model layouts: the base config of each family, and a regex for layers outside the blocks."""

LAYOUTS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
OTHERS = r"(conv_in|conv_out|(time|add)_embedding\.linear_[12])"
