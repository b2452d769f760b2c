"""Module names of the real layouts."""

LAYOUTS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
OTHERS = r"(conv_in|conv_out|(time|add)_embedding\.linear_[12])"
