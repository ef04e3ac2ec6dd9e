"""A student leaves the project: written out with a proof that it is the same model, or put behind an HTTP endpoint.

`parity` compares models by numbers, `export` writes them, `card` describes them, `api` and `http` speak OpenAI's
protocol in front of any `ChatModel`. No module here knows a task or a stage's files.
"""
