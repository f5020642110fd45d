"""Campaigns: thousands of generated cases, with a table of what came of them. Tests run small samples of the same."""
