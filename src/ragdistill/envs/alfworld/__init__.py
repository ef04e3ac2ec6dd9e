"""ALFWorld: official or offline-generated games, played by the real TextWorld engine.

`goals` (task types, sentences, floor-plan sets) is light; `engine`, `generator` import textworld and load slowly.
Knows no model and no agent.
"""
