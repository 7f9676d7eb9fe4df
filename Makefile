# PYTHON is used once, to create the virtual environment. PIP_ARGS goes to pip install, for example to name the index of
# torch's CPU wheels. ARGS goes to the command that a target runs: make serve ARGS="--port 9000".
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.stamp-setup
PYTHON_CLIENTS := .venv-clients/.stamp-setup
NODE_CLIENTS := tests/clients/node/node_modules/.stamp-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo serve ray test test-fast test-clients check bench frontier train

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install into .venv; instant when nothing changed

demo: setup ## start a server, draw prompts and make meshes at every budget, write demo/contact_sheet.png
	$(BIN)/python -m examples.demo --out demo $(ARGS)

serve: setup ## serve on 127.0.0.1:8000
	$(BIN)/elastic-dit serve $(ARGS)

ray: setup ## serve on 127.0.0.1:8000 with Ray, which scales the workers of each model; needs redis-server
	$(BIN)/python -m deploy.ray $(ARGS)

test: setup ## run all tests, in three processes
	$(BIN)/python -m pytest -n 3 $(ARGS)

test-fast: setup ## run the tests that start no server, browser or Redis and are not marked slow
	$(BIN)/python -m pytest -n 3 -m "not server and not slow" $(ARGS)

test-clients: setup $(PYTHON_CLIENTS) $(NODE_CLIENTS) ## call a server with the clients that people have; needs node and npm
	$(BIN)/python -m pytest -n 0 -s tests/clients $(ARGS)

check: setup ## formatting, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## time dense, exact and every preset, with their quality: ARGS="--model checkpoints/tiny-qwen-image"
	$(BIN)/python -m benchmarks.engine $(ARGS)

frontier: $(INSTALLED) ## compare ways to buy speed on the small models, with a table and a plot; takes over an hour
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e '.[peers]'
	$(BIN)/python -m benchmarks.frontier --plot docs/images/frontier.svg $(ARGS)

train: setup ## train the small models again, resuming where they stopped
	$(BIN)/python -m training.scenes.tiny_flux $(ARGS)
	$(BIN)/python -m training.scenes.tiny_qwen_image $(ARGS)
	$(BIN)/python -m training.solids.tiny_hunyuan3d $(ARGS)

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "$(PYTHON) is Python %d.%d, 3.11 or newer is needed; name one: make PYTHON=python3.12" % sys.version_info[:2])'
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt $(PIP_ARGS) -e ./client -e '.[test,dev]'
	@touch $@

# Their packages get an environment of their own: LiteLLM does not go with all of ours.
$(PYTHON_CLIENTS): tests/clients/python/requirements.txt
	[ -x .venv-clients/bin/python ] || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q --no-deps --no-compile $(PIP_ARGS) -r $<
	@touch $@

$(NODE_CLIENTS): tests/clients/node/package-lock.json
	npm ci --no-audit --no-fund --prefix tests/clients/node
	@touch $@
