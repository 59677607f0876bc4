"""Privacy: events that state a release, accountants that read them, noise, clipping, sampling, mechanisms, the ledger."""
