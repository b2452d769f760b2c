"""From a folder to examples: images, captions, masks and what is left out."""
