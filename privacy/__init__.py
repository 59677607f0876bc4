"""Privacy: no mechanism is offered in this version, so every run is labelled "no formal guarantee"."""
