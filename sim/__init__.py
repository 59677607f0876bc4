"""Many virtual clients in one process."""
