"""Making, verifying and inspecting shards: from videos and images on disk to tar files with a manifest."""
