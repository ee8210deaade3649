"""Dataset files, strict media decoding, buckets, and the scan that turns them into clips."""
