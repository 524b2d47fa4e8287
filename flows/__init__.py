"""The order of the steps, as Prefect flows, and the command line on top of them."""
