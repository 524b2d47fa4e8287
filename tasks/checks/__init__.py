"""What `ckptfuse doctor` finds out of Prefect, MLflow, Git and DVC; the rest is ckptfuse/checks."""
