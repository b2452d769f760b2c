"""Captioners: file names, BLIP, Florence-2, vision-language models and taggers."""
