"""Commands that look things up: what there is, what a file says, which runs were made."""
