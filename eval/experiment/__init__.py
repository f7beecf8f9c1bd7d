"""The three experiments: what is compared, training what is missing, and the report."""
