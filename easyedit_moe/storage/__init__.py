"""Files: written in full or not at all, tensors under keys that are checked when read, checksums."""
