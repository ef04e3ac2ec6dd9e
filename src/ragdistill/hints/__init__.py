"""Hints: mined or written from failures, kept in a bank, retrieved once at episode start.

`mine` extracts without a model (`templates` lifts commands), `extract` by a language model; `bank` stores, `retrieve`
picks by a ranker of `rankers`, `lift` measures. This room works on `records.Trajectory` and a `ChatModel` alone: it
knows no engine of either kind and no evaluation task.
"""
