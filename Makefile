.PHONY: check format types test test-slow test-all docs train audit gpu small

check: ## Lint, format check, types and which room imports which, as CI runs them
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format: ## Mend what can be mended by machine
	ruff check --fix .
	ruff format .

test: ## The README's test command: the fast tests
	pytest

test-slow: ## The others, on all cores
	pytest -m slow -n auto

test-all: ## Both
	pytest -m "slow or not slow" -n auto

audit: ## Licences of what is installed; known vulnerabilities where pip-audit is, and its service answers
	python -m tests.audit

docs: ## The site, into site/; needs pip install -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

train: ## The README's first command
	python train_rl.py --out runs/first

gpu: ## What the project claims, measured on the GPU that is here: 150 seconds, figures in results/gpu
	python -m maskgym.eval gpu --out results/gpu

small: ## Grow the backbone small anew on the GPU that is here: ten minutes, into runs/small
	python -m maskgym.training.grow plans --out runs/small
	python -m maskgym.training.grow tower --out runs/small --images 128 --seconds 75
	python -m maskgym.training.grow language --out runs/small --seconds 425 --compile
