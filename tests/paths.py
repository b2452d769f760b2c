"""The path of the checkout."""

from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
