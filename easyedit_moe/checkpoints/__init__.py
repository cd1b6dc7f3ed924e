"""Checkpoints on disk: edited or reverted shard by shard, and edited models saved so that any loader reads them."""
