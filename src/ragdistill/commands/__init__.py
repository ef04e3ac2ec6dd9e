"""What a person runs beside the DAG: promote, rollback, smoke. Thin rooms on top of the others."""
