"""The check-up: what is wrong with images and captions, measured and explained."""
