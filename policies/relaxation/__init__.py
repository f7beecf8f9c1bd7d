"""The controller by relaxed plans: estimators, and their training."""
