"""Fast maths with a plain reference beside each."""
