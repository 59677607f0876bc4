"""What travels between server and nodes, and the spec that says what a run is."""
