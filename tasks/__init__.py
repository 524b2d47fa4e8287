"""One step of the pipeline each, as Prefect tasks; the only place that knows MLflow and DVC."""
