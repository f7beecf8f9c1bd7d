.PHONY: check format types test train

check: ## Lint, format check and types, as CI runs them
	ruff check .
	ruff format --check .
	mypy

format: ## Mend what can be mended by machine
	ruff check --fix .
	ruff format .

test: ## The README's test command
	pytest

train: ## The README's first command
	python train_rl.py --out runs/first
