"""Data: manifest, plan, byte access, decode, clip sampling, augmentation and the loader over them."""
