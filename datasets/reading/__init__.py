"""From a folder to training examples: images, captions, masks, and what is left out."""
