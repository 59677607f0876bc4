"""In their order. What a file here does must never change once it has been shipped: databases hold what it did."""
