"""Make the tables."""
