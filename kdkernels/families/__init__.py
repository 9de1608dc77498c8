"""A family's problem, and what every backend shares of it."""
