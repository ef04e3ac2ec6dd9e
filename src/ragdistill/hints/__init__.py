"""Hints: mined from failures, kept in a bank, retrieved once at episode start.

`templates` lifts commands, `mine` extracts, `bank` stores, `retrieve` picks, `render` shows.
This room works on `records.Trajectory` alone: it knows no model, no environment engine and no evaluation task.
"""
