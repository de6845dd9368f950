"""From shards to batches: manifest, plan, byte access, decoding, clips, augmentation and the loader."""
