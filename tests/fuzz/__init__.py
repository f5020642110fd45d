"""Campaigns: each runs as long as one likes, prints a table of outcomes, and exits with 1 on a fault."""
