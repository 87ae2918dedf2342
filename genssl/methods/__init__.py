"""Self-supervised methods, one short file each."""
