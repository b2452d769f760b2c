"""Every "auto" becomes a number before a weight is loaded."""
