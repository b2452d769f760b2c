"""The check-up: measures images and captions, and explains their problems."""
