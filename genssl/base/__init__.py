"""What any floor may use: devices, files and locks, ranks of a run, words."""
