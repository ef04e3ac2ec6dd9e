"""From evaluation episodes to numbers (`metrics`), terminal tables (`table`), CSV (`csvs`) and one page (`page`).

Knows no environment, model or MLflow; it reads records and writes what people look at.
"""
