"""The server: it draws, admits, aggregates and stores, and never loads the model (no torch here)."""
