"""The mathematics and the parts of the loop."""
