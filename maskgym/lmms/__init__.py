"""The plug-in for lmms-eval: its requests answered under one or several budgets."""
